"""Upload of manifests and model cards to the Hugging Face hub."""
