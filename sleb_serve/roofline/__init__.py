"""Predicted gain on GPUs that you do not have, and the number of GPUs that a load needs."""
