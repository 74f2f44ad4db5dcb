"""What pruning gives on GPUs that are not at hand, and how many of them a load needs."""
