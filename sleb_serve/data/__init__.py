"""Turns text into sequences of token ids."""
