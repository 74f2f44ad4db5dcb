"""Supported architectures and vLLM versions, as data."""
