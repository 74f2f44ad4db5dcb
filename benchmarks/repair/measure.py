"""Measure the serving cost of a repair: decode throughput, repaired over unrepaired.

Usage: measure.py FOLDER [--starts N] [--rounds N]. SmolLM2 with 6 of 30 blocks removed, without and
with a fold, engines in one process measured in turns. The fitted values do not affect the speed, so
the repairs are fitted on little text. Records go to FOLDER/records.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from sleb_bench.demo_model import demo_model
from sleb_bench.engine import Engine, EngineSpec, Host
from sleb_bench.machine import machine
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.data.calibration import make_sequences
from sleb_serve.data.texts import EMBEDDED
from sleb_serve.data.tokenizer import load_tokenizer
from sleb_serve.manifest.binding import bind
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repair_file import sidecar_path, write_sidecar
from sleb_serve.manifest.schema import Manifest, Removal, Repair
from sleb_serve.models.layerwise import CausalLM
from sleb_serve.models.loading import load_model
from sleb_serve.roofline.workload import Workload
from sleb_serve.selection.repair import fit
from sleb_serve.serving.command import engine_arguments

REMOVED = (5, 4, 26, 25, 6, 7)
KINDS = ("none", "fold")
BATCHES, PROMPT, OUTPUT = (1, 8), 16, 64


def main() -> None:
    """Fit, start, measure in turns, print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = str(demo_model(Path(".cache/demo").resolve()))
    checkpoint = open_checkpoint(model)
    arguments = {
        kind: {
            "model": model,
            "max_model_len": PROMPT + OUTPUT,
            "max_num_seqs": max(BATCHES),
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            **asked(checkpoint, model, kind, options.folder),
        }
        for kind in KINDS
    }
    records = options.folder / "records.jsonl"
    with records.open("w") as file:

        def record(**entry: Any) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        record(record="setting", model=Path(model).name, removed=REMOVED, machine=machine())
        for start in range(options.starts):
            measure(arguments, start, options.rounds, options.folder, record)
    for line in ratios([json.loads(line) for line in records.read_text().splitlines()]):
        print(line)


def asked(checkpoint: Checkpoint, model: str, kind: str, folder: Path) -> dict[str, Any]:
    """Return the engine arguments for the pruned model with this repair."""
    output = folder / f"{kind}.json"
    repairs: tuple[Repair, ...] = ()
    if kind != "none":
        sequences = make_sequences(
            EMBEDDED, load_tokenizer(checkpoint), sequences=8, sequence_length=256
        ).tokens
        found, loss = fit(
            CausalLM(load_model(checkpoint, "auto"), sequences[0]), sequences, REMOVED
        )
        sidecar = sidecar_path(output)
        digest = write_sidecar(sidecar, {gap.name: gap.weight for gap in found}, {})
        repairs = (Repair(kind, sidecar.name, digest, len(REMOVED), len(sequences), loss),)
    Manifest(bind(model, checkpoint), tuple(map(Removal, REMOVED)), repairs=repairs).write(output)
    return engine_arguments(read_manifest(output).pruning(), checkpoint)


def measure(
    arguments: Mapping[str, Mapping[str, Any]], start: int, rounds: int, folder: Path, record: Any
) -> None:
    """Start all engines, and measure rounds with a turn of each in varying order."""
    generator = random.Random(start)
    with ExitStack() as stack:
        host = Host({}, folder / "engines.log")
        stack.callback(host.close)
        engines = {}
        for kind, values in arguments.items():
            host.start(kind, EngineSpec("vllm", values))
            engines[kind] = Engine(host, kind)
        for number in range(rounds + 1):
            order = [*KINDS[number % len(KINDS) :], *KINDS[: number % len(KINDS)]]
            for batch in BATCHES:
                prompts = [[generator.randrange(100, 40000) for _ in range(PROMPT)]] * batch
                work = Workload("decode", "decode", batch, PROMPT, OUTPUT)
                for kind in order:
                    sample = engines[kind].measure(work, [prompts])
                    # The first token of each sequence comes from the prompt's step.
                    speed = batch * (OUTPUT - 1) / sample.elapsed_time
                    if number:
                        record(start=start, round=number, batch=batch, repair=kind, tokens_s=speed)


def ratios(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return repaired over unrepaired within each round: median and range."""
    lines = ["| batch | fold |", "|---|---|"]
    samples = {
        (r["start"], r["round"], r["batch"], r["repair"]): r["tokens_s"]
        for r in records
        if "tokens_s" in r
    }
    for batch in BATCHES:
        cells = []
        for kind in KINDS[1:]:
            found = sorted(
                speed / samples[start, number, batch, "none"]
                for (start, number, b, k), speed in samples.items()
                if (b, k) == (batch, kind)
            )
            cells.append(f"{median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})")
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
