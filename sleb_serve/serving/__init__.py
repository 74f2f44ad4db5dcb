"""The vLLM command, and checks of running servers."""
