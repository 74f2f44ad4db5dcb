"""Paired benchmark: dense and pruned vLLM, interleaved, prompt and generation throughput apart."""
