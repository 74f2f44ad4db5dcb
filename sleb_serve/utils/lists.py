"""Parsing of lists on the command line."""

from __future__ import annotations

import argparse


def numbers(text: str) -> tuple[int, ...]:
    """Parse distinct whole numbers separated by commas."""
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 9 for part in parts) or len(set(parts)) < len(
        parts
    ):
        raise argparse.ArgumentTypeError(f"{text}: give whole numbers, each once, as 0,2,4")
    return tuple(int(part) for part in parts)


def words(text: str) -> tuple[str, ...]:
    """Parse distinct names separated by commas."""
    return tuple(dict.fromkeys(name for name in text.split(",") if name))
