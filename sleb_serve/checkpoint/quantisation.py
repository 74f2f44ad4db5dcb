"""Where a checkpoint says how it is quantised."""

from __future__ import annotations

QUANTISATION_KEYS = ("quantization_config", "compression_config")
"""Where config.json keeps how the checkpoint is quantised."""


QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside config.json that say the same."""
