"""Paired benchmark of dense and pruned vLLM engines in alternating turns."""
