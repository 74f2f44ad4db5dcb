"""Text into sequences of token ids."""
