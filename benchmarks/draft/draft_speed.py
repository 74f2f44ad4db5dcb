"""Compare a model with its pruned version as draft against the model alone, in interleaved starts.

Usage: draft_speed.py MODEL FOLDER --removed 5,25,17 [--tokens 3] [--rounds 3]. FOLDER gets
`records.jsonl`. Each start is a separate process; it times greedy generation of 64 tokens for one
English prompt after another.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

from drafting import parser_of, speculation

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 64


def main() -> None:
    """Start in turns, write the records, print the ratio and the acceptance rate."""
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--child", metavar="ARGUMENTS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(_generate(options.model, json.loads(options.child))))
        return
    _, config_format, _, text = speculation(options, options.model)
    drafting = {"config_format": config_format, "speculative_config": json.loads(text)}
    records = []
    for index in range(options.rounds):
        order = [("dense", {}), ("drafted", drafting)]
        for variant, value in order if index % 2 else reversed(order):
            record = {
                "round": index,
                "variant": variant,
                "removed": options.removed,
                "draft_tokens": options.tokens if value else 0,
                **_start(options, value),
            }
            print(json.dumps({**record, "tokens": None}), flush=True)
            records.append(record)
    with (options.folder / "records.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    # In bfloat16, near ties may resolve differently when several tokens are verified at once.
    pairs = [
        (a, b) for r in records for a, b in zip(r["tokens"], records[0]["tokens"], strict=True)
    ]
    print(f"{sum(a == b for a, b in pairs)} of {len(pairs)} answers equal the first start's")
    speed = {
        variant: [r["tokens_per_second"] for r in records if r["variant"] == variant]
        for variant in ("dense", "drafted")
    }
    ratios = [b / a for a, b in zip(speed["dense"], speed["drafted"], strict=True)]
    drafted = [r for r in records if r["variant"] == "drafted"]
    accepted = sum(r["accepted"] for r in drafted) / sum(r["drafted"] for r in drafted)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(
        f"{len(options.removed)} removed, {options.tokens} drafted: {mean:.3f} x the speed "
        f"(rounds {', '.join(f'{ratio:.3f}' for ratio in ratios)}), {100 * accepted:.0f} % accepted"
    )


def _start(options: argparse.Namespace, drafting: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, options.model, str(options.folder)]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [*command, "--child", json.dumps(drafting)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _generate(model: str, drafting: dict[str, Any]) -> dict[str, Any]:
    from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **drafting,
    )
    text = llm.get_tokenizer().encode("\n\n".join(topics[key] for key in sorted(topics)))
    starts = range(0, len(text) - PROMPT_TOKENS, len(text) // (PROMPTS + 1))
    prompts = [text[start : start + PROMPT_TOKENS] for start in starts][: PROMPTS + 1]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

    def ask(prompt: list[int]) -> list[int]:
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    ask(prompts[0])  # warms up
    start = time.perf_counter()
    tokens = [ask(prompt) for prompt in prompts[1:]]
    seconds = time.perf_counter() - start
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return {
        "tokens_per_second": sum(map(len, tokens)) / seconds,
        "drafted": counters.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
        "tokens": tokens,
    }


if __name__ == "__main__":
    main()
