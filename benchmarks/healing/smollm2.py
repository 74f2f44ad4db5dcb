"""Study SmolLM2 at 3 and 6 of 30 blocks removed, then heal 6 further, and evaluate all of them.

Usage: smollm2.py FOLDER [--heal-minutes M] [--further-minutes M]. It heals on WikiText-2's train
split and half as much everyday text (HellaSwag's validation rows with their correct endings) and
questions (ARC's train split, easy and challenge). It evaluates the dense, the pruned and the healed
models on WikiText-2's test split, on Python's help topics, which are not trained on, and on the
first 400 rows of three zero-shot tasks. Everything goes to FOLDER; run it again to continue. Texts
and tasks come from the hub or its cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from sleb_bench.demo_model import demo_model
from sleb_serve.utils.atomic_io import write_atomically

ROOT = Path(__file__).resolve().parent.parent.parent
SHALLOW, DEEP = 3, 6
"""Numbers of removed blocks."""
SELECTED = ("--sequences", "16", "--sequence-length", "512")
HEALED = ("--rank", "64", "--heal-batch-size", "4")
JUDGED = (
    *("--perplexity", "wikitext2,python-docs", "--sequence-length", "1024", "--sequences", "24"),
    *("--tasks", "piqa,arc_easy,winogrande", "--limit", "400", "--resume"),
)


def main() -> None:
    """Run the missing steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heal-minutes", default="27", help="for each depth of the study")
    parser.add_argument("--further-minutes", default="13", help="for the deeper one")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = str(demo_model(ROOT / ".cache" / "demo"))
    everyday = write_texts(folder / "everyday.jsonl", everyday_rows())
    questions = write_texts(folder / "questions.jsonl", question_rows())
    texts = ("--text", f"wikitext2:2,{everyday}:1,{questions}:1")
    study, further = folder / "study", folder / "further.json"
    run(
        *("study", model, "-o", str(study), "--blocks", f"{SHALLOW},{DEEP}", *SELECTED, *HEALED),
        *(*texts, "--heal-minutes", options.heal_minutes),
        *("--perplexity", "wikitext2,python-docs", "--minutes", "5"),
    )
    if not further.exists():
        run(
            *("heal", model, "-m", str(study / "healed.json"), "--further", "-o", str(further)),
            *(*texts, "--minutes", options.further_minutes, "--batch-size", "4"),
            *("--no-checkpointing", "--resume", "--seed", "1", "--patience", "20"),
            *("--learning-rate", "4e-4"),
        )
    for manifest, name, blocks in (
        (further, "further", f"{DEEP}"),
        (study / "healed.json", "healed", f"{SHALLOW},{DEEP}"),
        (study / "manifest.json", "pruned", f"0,{SHALLOW},{DEEP}"),
    ):
        output = folder / f"{name}.eval.json"
        run("eval", model, "-m", str(manifest), "--blocks", blocks, *JUDGED, "-o", str(output))


def everyday_rows() -> Iterable[str]:
    """Yield short texts on everyday tasks."""
    from datasets import load_dataset

    for row in load_dataset("Rowan/hellaswag", split="validation"):
        yield f"{row['ctx'].strip()} {row['endings'][int(row['label'])].strip()}"


def question_rows() -> Iterable[str]:
    """Yield school questions with their answers."""
    from datasets import load_dataset

    for name in ("ARC-Easy", "ARC-Challenge"):
        for row in load_dataset("allenai/ai2_arc", name, split="train"):
            answers = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
            yield f"Question: {row['question']}\nAnswer: {answers[row['answerKey']]}"


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    """Write a file with one text per row."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    write_atomically(path, rows.encode())
    return path


def run(*arguments: str) -> None:
    """Run a command of sleb-serve to its end."""
    print("sleb-serve", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "sleb_serve.cli", *arguments], check=True)


if __name__ == "__main__":
    main()
