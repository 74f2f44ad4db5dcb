"""What runs: architectures, and versions of vLLM, as data."""
