"""Loading of Transformers models for selection and evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.cut.layers import decoder_layers
from sleb_serve.errors import SlebError, first_line
from sleb_serve.utils.scratch import ScratchFolder

EMULATED = {
    "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
    "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
}
"""Dtypes in which a CPU without native support reaches a tenth of float32's speed."""


def generates(checkpoint: Checkpoint) -> bool:
    """Return whether a model predicts text; a pooling model does not.

    Raises:
        SlebError: Transformers knows it as neither, or it has no separate decoder.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    known: set[str] = set()
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        for names in mapping.values():
            known.update([names] if isinstance(names, str) else names)
    kind = getattr(transformers, checkpoint.architecture, None)
    if kind is None or checkpoint.config.get("is_encoder_decoder"):
        raise SlebError(
            f"{checkpoint.path} is not a model that Transformers can prune: its architecture is "
            f"{checkpoint.architecture}; give a decoder, alone or with towers, or a pooling model"
        )
    return checkpoint.architecture in known


def model_class(checkpoint: Checkpoint) -> Any:
    """Return the Transformers class in config.json, or the auto class."""
    import transformers

    return getattr(transformers, checkpoint.architecture, transformers.AutoModelForCausalLM)


def load_model(
    checkpoint: Checkpoint, dtype: str, *, streamed: bool = False, device: Any = None
) -> nn.Module:
    """Load a checkpoint's causal LM for scoring, spread over available accelerators.

    Args:
        checkpoint: a folder with config and weights.
        dtype: a torch dtype by name, or ``auto`` for the checkpoint's own.
        streamed: keep the decoder layers' weights on disk, or in the host's memory if they fit and
            an accelerator is used; load each layer when it runs.
        device: one device to use instead of all accelerators.

    Raises:
        SlebError: weights are missing or cannot be loaded.
    """
    checkpoint.weight_files()
    # Transformers would initialise missing layers randomly.
    checkpoint.check_layers()
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    place: Any = device
    if device is None:
        place = "auto" if torch.accelerator.is_available() else None
    # accelerate reads safetensors directly; the folder is for weights that need conversion.
    folder = ScratchFolder()
    try:
        if streamed:
            place = _layers_outside(checkpoint, device)
        model = model_class(checkpoint).from_pretrained(
            str(checkpoint.path), dtype=wanted, device_map=place, offload_folder=folder.name
        )
    except Exception as error:
        raise SlebError(
            f"cannot load {checkpoint.path}: {first_line(error)}; check that the checkpoint is "
            f"whole and that this Transformers knows it"
        ) from error
    model.sleb_offload_folder = folder  # removed with the model
    result: nn.Module = model.eval()
    return result


def _layers_outside(checkpoint: Checkpoint, device: Any) -> dict[str, Any]:
    """Map the decoder layers to disk or the host, and the rest to the compute device."""
    import psutil
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(checkpoint.path))
    with torch.device("meta"):
        shell = model_class(checkpoint)(config)
    layers = decoder_layers(shell)
    size = sum(file.stat().st_size for file in checkpoint.weight_files())
    where = "disk"
    if not torch.accelerator.is_available():
        device = "cpu"
    elif device is None:
        device = torch.accelerator.current_device_index()
    if device != "cpu" and size < 0.8 * psutil.virtual_memory().available:
        where = "cpu"
    path = next(name for name, module in shell.named_modules() if module is layers)
    place: dict[str, Any] = {}
    for name, _ in shell.named_modules():
        if name == path:
            place[name] = where
        elif name and not path.startswith(f"{name}.") and not _covered(name, place):
            place[name] = device
    return place


def _covered(name: str, place: dict[str, Any]) -> bool:
    return any(name.startswith(f"{above}.") for above in place)


def has_fast(dtype: str) -> bool:
    """Return whether matrix products are faster in bfloat16 or float16 than in float32."""
    if dtype == "bfloat16" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.accelerator.is_available() or bool(EMULATED[dtype]())
