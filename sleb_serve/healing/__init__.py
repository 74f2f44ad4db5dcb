"""Healing: a pruned model learns from the dense model that it was cut from."""
