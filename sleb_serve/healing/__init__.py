"""Healing: train a pruned model to predict like its dense model."""
