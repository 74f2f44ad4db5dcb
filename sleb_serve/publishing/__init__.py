"""A manifest in a repository of the Hugging Face hub: its model card, and how it gets there."""
