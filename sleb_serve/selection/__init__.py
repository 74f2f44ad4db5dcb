"""The search for the blocks to remove."""
