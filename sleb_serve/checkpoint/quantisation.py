"""Locations of a checkpoint's quantisation config."""

from __future__ import annotations

QUANTISATION_KEYS = ("quantization_config", "compression_config")
"""Keys of the quantisation config in config.json."""


QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Separate files with a quantisation config."""
