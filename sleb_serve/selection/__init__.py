"""Which blocks to remove."""
