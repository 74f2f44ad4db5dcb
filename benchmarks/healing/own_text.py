"""Let the dense model write text to heal on: what it knows, it writes about.

Usage: own_text.py MODEL TEXTS.jsonl [--texts N]. Half of the texts begin from nothing, after the
token that separates documents; half are conversations from the system prompt on, so that the model
asks, too. The idea is from LLM-QAT (https://arxiv.org/abs/2305.17888) and, for instructions, from
Magpie (https://arxiv.org/abs/2406.08464).
"""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path

from sleb_bench.files import write_texts

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
    shared = {
        "temperature": 1.0,
        "top_p": 0.95,
        "max_tokens": LONGEST,
        "skip_special_tokens": False,
    }
    # How a text begins, how much of that belongs to it, and how it goes on. The end of a turn is
    # not the end of a conversation.
    ways = (
        ("<|endoftext|>", "", SamplingParams(**shared)),
        (question, question, SamplingParams(**shared, ignore_eos=True)),
    )
    begun = list(islice(cycle(ways), options.texts))
    prompts = [
        {"prompt_token_ids": tokenizer.encode(start, add_special_tokens=False)}
        for start, _, _ in begun
    ]
    outputs = llm.generate(prompts, [sampling for _, _, sampling in begun])
    write_texts(
        options.output,
        (
            kept + output.outputs[0].text
            for (_, kept, _), output in zip(begun, outputs, strict=True)
        ),
    )


if __name__ == "__main__":
    main()
