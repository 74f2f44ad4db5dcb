"""Perplexity, zero-shot tasks and reports."""
