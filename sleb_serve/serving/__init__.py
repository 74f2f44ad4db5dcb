"""The vLLM command, and what asks a server."""
