"""Heal SmolLM2 at 3 and 6 of 30 blocks removed, and evaluate it before and after.

Usage: smollm2.py FOLDER. The blocks are SLEB's own choice, from the records of a study. It heals on
WikiText-2's train split, Wikipedia articles, everyday texts and text that the dense model wrote. It
evaluates on WikiText-2's test split, on Python's help topics, which are not trained on, and on the
first 1,000 rows of three zero-shot tasks. Everything goes to FOLDER; run it again to continue.
Texts and tasks come from the hub or its cache, Wikipedia from the package index (wikipedia.py).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sleb_bench.demo_model import demo_model
from sleb_bench.files import write_texts
from sleb_serve import read_manifest

ROOT = Path(__file__).resolve().parent.parent.parent
MANIFEST = ROOT / "benchmarks" / "records" / "healing" / "study" / "manifest.json"
HEALED = {
    3: ("--minutes", "54", "--batch-size", "2", "--sequences-at-once", "2"),
    6: ("--minutes", "44", "--batch-size", "1", "--learning-rate", "2e-3"),
}
"""Options of the healing by number of removed blocks."""
SHARED = (
    *("--sequence-length", "1024", "--held-out", "8", "--rank", "64", "--patience", "20"),
    *("--no-checkpointing", "--resume"),
)
JUDGED = (
    *("--perplexity", "wikitext2,python-docs", "--sequence-length", "1024", "--sequences", "24"),
    *("--tasks", "piqa,arc_easy,winogrande", "--limit", "1000", "--resume"),
)


def main() -> None:
    """Run the missing steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    model = str(demo_model(ROOT / ".cache" / "demo"))
    texts = written(folder, model)
    for blocks, options in HEALED.items():
        pruned, healed = folder / f"{blocks}.json", folder / f"healed-{blocks}.json"
        read_manifest(MANIFEST).prefix(blocks).write(pruned)
        if not healed.exists():
            sleb_serve(
                *("heal", model, "-m", str(pruned), "-o", str(healed)),
                *(*SHARED, *options, "--text", texts),
            )
        evaluate(model, healed, f"{blocks}")
    # The last manifest has all removals.
    evaluate(model, pruned, ",".join(map(str, (0, *HEALED))))


def written(folder: Path, model: str) -> str:
    """Write the missing texts, and return the mixture."""
    own, wikipedia, everyday = (
        folder / name for name in ("own.jsonl", "wikipedia.jsonl", "everyday.jsonl")
    )
    scripts = Path(__file__).parent
    if not own.exists():
        run(str(scripts / "own_text.py"), model, str(own))
    if not wikipedia.exists():
        run(str(scripts / "wikipedia.py"), str(wikipedia))
    if not everyday.exists():
        write_texts(everyday, everyday_rows())
    return f"wikitext2:2,{wikipedia}:2,{everyday}:1,{own}:0.5"


def evaluate(model: str, manifest: Path, blocks: str) -> None:
    """Evaluate some numbers of removals."""
    output = manifest.with_suffix(".eval.json")
    sleb_serve("eval", model, "-m", str(manifest), "--blocks", blocks, *JUDGED, "-o", str(output))


def everyday_rows() -> Iterator[str]:
    """Yield short texts on everyday tasks: HellaSwag's rows with their correct endings."""
    from datasets import load_dataset

    for row in load_dataset("Rowan/hellaswag", split="validation"):
        yield f"{row['ctx'].strip()} {row['endings'][int(row['label'])].strip()}"


def sleb_serve(*arguments: str) -> None:
    """Run a command to its end."""
    run("-m", "sleb_serve.cli", *arguments)


def run(*arguments: str) -> None:
    """Run Python with these arguments to its end."""
    print(*arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    main()
