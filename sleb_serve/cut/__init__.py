"""The model with fewer layers: its config, its tensors' names, and whether it is right."""
