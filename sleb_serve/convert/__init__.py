"""Conversion: plain checkpoints, other tools' lists."""
