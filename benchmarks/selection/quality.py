"""Measure the quality of selection and repair: perplexity and zero-shot accuracy of SmolLM2.

Usage: quality.py FOLDER [--counts 3 6 9] [--models sleb sleb+fold …] [--zero-shot N]. Calibrated on
WikiText-2's train split, evaluated on its test split, on Python's help topics, and on N rows of
each lm-eval task. Results are lines of FOLDER/quality.jsonl, search steps lines of
FOLDER/scores.jsonl; existing ones are kept. Everything runs in bfloat16, or in float32 on CPUs
without native support; results in another dtype are not reused.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from searches import as_repaired, beam, swap
from torch import nn

from sleb_bench.demo_model import demo_model
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.data.calibration import Sequences, held_out_sequences, make_sequences
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.evaluation.perplexity import perplexity
from sleb_serve.manifest.repair_file import WeightChanges
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.models.loading import has_fast, load_model
from sleb_serve.models.pruned import blocks_deleted
from sleb_serve.selection.repair import Gap, fit
from sleb_serve.selection.scorer import Scorer
from sleb_serve.selection.search import Scores, greedy
from sleb_serve.utils.distributed import Ranks

COUNTS = (3, 6, 9)
SEARCH = {"sequences": 16, "sequence_length": 512}
REPAIR = {"sequences": 192, "sequence_length": 512}
BEAM, SHORTLIST = 2, 4
MODELS = (
    "dense",
    "sleb",
    "sleb+scale",
    "sleb+fold",
    "sleb+map",
    "beam",
    "swap",
    "chosen as folded",
    "shortgpt",
    "last",
)
JUDGED_SEQUENCES, JUDGED_LENGTH = 24, 1024
TASKS = ("piqa", "arc_easy", "winogrande")


def main() -> None:
    """Select, repair and evaluate; write a line per model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--zero-shot", type=int, default=0, metavar="ROWS")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    study = Study(options.folder / "quality.jsonl", options.zero_shot)
    chosen: dict[str, Callable[[int], list[int]]] = {
        "sleb": study.sleb,
        "beam": partial(study.search, "beam"),
        "swap": partial(study.search, "swap"),
        "chosen as folded": partial(study.search, "chosen as folded"),
        "shortgpt": study.shortgpt,
        "last": last,
    }
    for name in options.models:
        for count in options.counts if name != "dense" else [0]:
            plain, _, kind = name.partition("+")
            kind = "fold" if name == "chosen as folded" else kind
            choose = chosen.get(plain, lambda count: [])
            study.judge(name, count, partial(choose, count), kind)


def lines(path: Path) -> list[dict[str, Any]]:
    """Read the output of `append`, if it exists."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, **entry: Any) -> None:
    """Append a line to a file."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def last(count: int) -> list[int]:
    """Return the last blocks except the final one."""
    return list(range(29 - count, 29))


class Study:
    """Evaluates prunings of one model, and caches results."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path, self.rows = path, rows
        self.folder = demo_model(Path(".cache/demo").resolve())
        self.checkpoint = open_checkpoint(str(self.folder))
        self.tokenize = load_tokenizer(self.checkpoint)
        self.dtype = "bfloat16" if has_fast("bfloat16") else "float32"
        self.known = {
            (entry["model"], entry["removed_count"], entry["rows"], entry["dtype"])
            for entry in lines(path)
        }
        self._kept_scores = path.with_name("scores.jsonl")
        self._scores = {
            (tuple(entry["removed"]), tuple(entry["candidates"])): Scores(
                tuple(entry["losses"]), tuple(entry["exact"])
            )
            for entry in lines(self._kept_scores)
            if entry["dtype"] == self.dtype
        }
        test = self._wikitext("test")
        self.texts = {
            "wikitext2": [
                test[i * JUDGED_LENGTH : (i + 1) * JUDGED_LENGTH] for i in range(JUDGED_SEQUENCES)
            ],
            "python-docs": held_out_sequences(self.tokenize, JUDGED_SEQUENCES, JUDGED_LENGTH, None),
        }
        self._order: list[int] = []

    def _wikitext(self, split: str) -> Sequence[int]:
        from datasets import load_dataset

        data = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return self.tokenize("\n\n".join(data["text"]))

    def sleb(self, count: int) -> list[int]:
        """Return SLEB's greedy choice, in order."""
        order = self.path.with_name("order.json")
        if order.exists():
            self._order = json.loads(order.read_text())
        if not self._order:
            steps = greedy(self._score, num_blocks=self.checkpoint.num_blocks, remove=max(COUNTS))
            self._order = [step.block for step in steps]
            order.write_text(json.dumps(self._order) + "\n")
        return self._order[:count]

    def search(self, name: str, count: int) -> list[int]:
        """Return the choice of another search."""
        blocks = self.checkpoint.num_blocks
        if name == "beam":
            found = beam(self._score, width=BEAM, num_blocks=blocks, remove=count)
        elif name == "swap":
            found = swap(self._score, num_blocks=blocks, remove=count)
        else:
            found = greedy(self._score_folded, num_blocks=blocks, remove=count)
        return [choice.block for choice in found]

    def _score(self, removed: Sequence[int], candidates: Sequence[int]) -> Scores:
        """Compute the search's scores, each once."""
        key = (tuple(removed), tuple(candidates))
        if key not in self._scores:
            begin = time.time()
            least = max(BEAM, SHORTLIST)
            scores = self._scorer.sweep.score(removed, candidates, least=least)
            self._scores[key] = scores
            append(
                self._kept_scores,
                removed=removed,
                candidates=candidates,
                losses=scores.losses,
                exact=scores.exact,
                dtype=self.dtype,
            )
            seconds = round(time.time() - begin)
            print("scored", removed, min(scores.losses), seconds, "s", flush=True)
        return self._scores[key]

    def _score_folded(self, removed: Sequence[int], candidates: Sequence[int]) -> Scores:
        scores = self._score(removed, candidates)

        def loss_of(block: int) -> float:
            return self._scorer.repair(self._sequences.tokens, [*removed, block])[1]

        return as_repaired(scores, candidates, SHORTLIST, loss_of)

    @cached_property
    def _sequences(self) -> Sequences:
        """Return the searches' text."""
        return make_sequences("wikitext2", self.tokenize, **SEARCH)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(
            self.checkpoint,
            self._sequences,
            Ranks(),
            dtype=self.dtype,
            budget=None,
            steps=max(COUNTS),
            fast=False,
        )

    def shortgpt(self, count: int) -> list[int]:
        """Return the blocks with the most similar input and output by cosine (ShortGPT)."""
        sequences = self._sequences.tokens
        model = CausalLM(load_model(self.checkpoint, self.dtype), sequences[0])
        turn = [0.0] * len(model.layers)
        for sequence in sequences:
            state, calls = model.begin(sequence)
            for index in range(len(model.layers)):
                with model.loaded(index) as layer:
                    (moved,) = model.run(layer, [state], calls[index])
                cosine = nn.functional.cosine_similarity(state.float(), moved.float(), dim=-1)
                turn[index] += 1 - float(cosine.mean())
                state = moved
        return sorted(range(len(turn)), key=lambda index: turn[index])[:count]

    def repair(self, kind: str, removed: Sequence[int]) -> list[Gap]:
        """Return a cached repair, fitted on more sequences than the search."""
        name = "-".join(map(str, (kind, self.dtype, REPAIR["sequences"], *removed)))
        kept = Path(".cache/quality").resolve() / f"{name}.pt"
        if kept.exists():
            return [Gap(**values) for values in torch.load(kept)]
        sequences = make_sequences("wikitext2", self.tokenize, **REPAIR).tokens
        model = CausalLM(load_model(self.checkpoint, self.dtype), sequences[0])
        begin = time.time()
        own = getattr(torch, self.checkpoint.dtype)
        found, loss = fit(model, sequences, removed, kind, own)
        print(kind, "fitted in", round(time.time() - begin), "s, loss", loss, flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save([vars(gap) for gap in found], kept)
        return list(found)

    def judge(self, name: str, count: int, choose: Callable[[], list[int]], kind: str) -> None:
        """Return perplexity and accuracy of one model as a record line."""
        if (name, count, self.rows, self.dtype) in self.known:
            return
        removed = choose()
        gaps = self.repair(kind, removed) if kind else []
        model = load_model(self.checkpoint, self.dtype)
        with blocks_deleted(model, removed, WeightChanges({gap.name: gap.weight for gap in gaps})):
            entry: dict[str, Any] = {
                "model": name,
                "removed_count": count,
                "removed": list(removed),
                "rows": self.rows,
                "perplexity": {text: perplexity(model, w) for text, w in self.texts.items()},
                "ridges": [gap.ridge for gap in gaps],
                "missing": [gap.missing for gap in gaps],
                "dtype": self.dtype,
                "torch": version("torch"),
            }
            if self.rows:
                entry["accuracy"] = self._zero_shot(model)
        print(json.dumps(entry), flush=True)
        append(self.path, **entry)

    def _zero_shot(self, model: Any) -> dict[str, float]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self.folder))
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=list(TASKS),
            limit=self.rows,
            bootstrap_iters=0,
        )
        return {task: results["results"][task]["acc,none"] for task in TASKS}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
