"""Measure the quality that healing recovers: SmolLM2, 6 (or 3) of 30 blocks removed.

Usage: smollm2.py FOLDER [--blocks K] [--from HEALED.json] [heal's own options]. It trains on
WikiText-2's train split and as much everyday text, HellaSwag's validation rows with their correct
endings; it continues from HEALED.json, if given. It evaluates the dense, the pruned and the healed
model on WikiText-2's test split, on Python's help topics, which were not trained on, and on the
first 400 rows of three zero-shot tasks other than HellaSwag. Manifest, sidecar and evaluations go
to FOLDER; texts and tasks come from the hub or its cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from sleb_bench.demo_model import demo_model
from sleb_serve import read_manifest
from sleb_serve.utils.atomic_io import write_atomically

ROOT = Path(__file__).resolve().parent.parent.parent
FOUND = ROOT / "benchmarks" / "records" / "evaluation" / "manifest.json"
JUDGED = (
    *("--perplexity", "wikitext2,python-docs", "--sequence-length", "1024", "--sequences", "24"),
    *("--tasks", "piqa,arc_easy,winogrande", "--limit", "400", "--resume"),
)


def main() -> None:
    """Heal, and run missing evaluations."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--from", dest="healed", type=Path)
    options, own = parser.parse_known_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = str(demo_model(ROOT / ".cache" / "demo"))
    pruned, healed = folder / "pruned.json", folder / "healed.json"
    manifest = read_manifest(FOUND).prefix(options.blocks)
    # Other evaluations of the same blocks used other settings.
    write_atomically(pruned, replace(manifest, evaluation={}).to_json())
    if not healed.exists():
        texts = ("--text", f"wikitext2:1,{everyday(folder)}:1")
        start = (str(pruned),) if options.healed is None else (str(options.healed), "--further")
        run("heal", model, "-o", str(healed), "--resume", *texts, *own, "-m", *start)
    for name, which in (("pruned", pruned), ("healed", healed)):
        blocks = f"0,{options.blocks}" if which == pruned else str(options.blocks)
        output = folder / f"{name}.eval.json"
        run("eval", model, "-m", str(which), "--blocks", blocks, *JUDGED, "-o", str(output))


def everyday(folder: Path) -> Path:
    """Write a file of short texts on everyday tasks, one per row."""
    from datasets import load_dataset

    rows = load_dataset("Rowan/hellaswag", split="validation")
    texts = (f"{row['ctx'].strip()} {row['endings'][int(row['label'])].strip()}" for row in rows)
    path = folder / "everyday.jsonl"
    rows_text = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    write_atomically(path, rows_text.encode())
    return path


def run(*arguments: str) -> None:
    """Run a command of sleb-serve to its end."""
    print("sleb-serve", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "sleb_serve.cli", *arguments], check=True)


if __name__ == "__main__":
    main()
