"""Other forms of a pruned model: plain checkpoints, other tools' lists."""
