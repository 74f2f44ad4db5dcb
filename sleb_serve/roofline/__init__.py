"""What pruning gives at most: from sizes alone, and on a GPU that is not at hand."""
