"""The model with fewer layers: its config, its tensor names, and a check that they are correct."""
