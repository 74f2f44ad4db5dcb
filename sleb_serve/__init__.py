"""Find the transformer blocks an LLM can lose (SLEB), serve it without them, measure the gain."""

__version__ = "0.1.0"
