"""Let the dense model write text to heal on: what it knows, it writes about.

Usage: own_text.py MODEL TEXTS.jsonl [--texts N]. Half of the texts begin from nothing, after the
token that separates documents; half are conversations from the system prompt on, so that the model
asks, too. The idea is from LLM-QAT (https://arxiv.org/abs/2305.17888) and, for instructions, from
Magpie (https://arxiv.org/abs/2406.08464).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sleb_serve.utils.atomic_io import write_atomically

LONGEST = 500
"""Tokens per text."""


def main() -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=int, default=192)
    options = parser.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(options.model, max_model_len=LONGEST + 140, enforce_eager=True, seed=0)
    tokenizer = llm.get_tokenizer()
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False)
    question = asked.partition("\0")[0]
    starts = ("<|endoftext|>", question)
    shared = {"temperature": 1.0, "top_p": 0.95, "max_tokens": LONGEST}
    ways = (
        SamplingParams(**shared, skip_special_tokens=False),
        # The end of a turn is not the end of a conversation.
        SamplingParams(**shared, skip_special_tokens=False, ignore_eos=True),
    )
    number = range(options.texts)
    prompts = [
        {"prompt_token_ids": tokenizer.encode(starts[index % 2], add_special_tokens=False)}
        for index in number
    ]
    outputs = llm.generate(prompts, [ways[index % 2] for index in number])
    rows = (
        {"text": (question if index % 2 else "") + output.outputs[0].text}
        for index, output in enumerate(outputs)
    )
    write_atomically(options.output, "".join(json.dumps(row) + "\n" for row in rows).encode())


if __name__ == "__main__":
    main()
