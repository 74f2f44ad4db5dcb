"""Teacher and student in one model in memory.

The teacher is the dense model: all blocks, no adapter. The student lacks the removed blocks, and
low-rank adapters (LoRA, arXiv 2106.09685, by PEFT) change the linear weights of the kept ones. So
no second copy of the weights is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.safetensors import tensors_of
from sleb_serve.cut.layers import decoder_layers
from sleb_serve.errors import SlebError
from sleb_serve.manifest.repair_file import LORA_A, LORA_B
from sleb_serve.models.pruned import blocks_deleted

_FLOATS = ("F32", "BF16", "F16")
_ADAPTER = "default"


def adaptable(
    model: nn.Module, checkpoint: Checkpoint, kept: Sequence[int], only: Sequence[str] | None
) -> dict[str, str]:
    """Return the linear weights that an adapter can change: module names and checkpoint names.

    Args:
        model: the dense model.
        checkpoint: its files; only weights with their own name there can be changed.
        kept: the kept blocks.
        only: last components of the modules' names; None for all.

    Raises:
        SlebError: there are none, or one of these names has no match.
    """
    stored = {
        name: entry for file in checkpoint.weight_files() for name, entry in _tensors(file).items()
    }
    layers = decoder_layers(model)
    path = next(name for name, module in model.named_modules() if module is layers)
    found: dict[str, str] = {}
    for index in kept:
        for name, module in layers[index].named_modules():
            weight = f"{checkpoint.layer_prefix}{index}.{name}.weight"
            kind, shape = stored.get(weight, ("", []))
            if (
                isinstance(module, nn.Linear)
                and kind in _FLOATS
                and shape == list(module.weight.shape)
            ):
                found[f"{path}.{index}.{name}"] = weight
    if only is not None:
        known = {module.rpartition(".")[2] for module in found}
        if unknown := sorted(set(only) - known):
            raise SlebError(
                f"projections={','.join(unknown)}: the blocks have {', '.join(sorted(known))}"
            )
        found = {m: weight for m, weight in found.items() if m.rpartition(".")[2] in only}
    if not found:
        raise SlebError(
            f"{checkpoint.path} has no linear weights in its blocks that an adapter can change; "
            f"its pruned model cannot be healed"
        )
    return found


def _tensors(file: Any) -> Mapping[str, tuple[str, list[int]]]:
    return {name: (kind, shape) for name, (kind, shape, _, _) in tensors_of(file).items()}


class Twin:
    """Teacher and student; see the module's docstring.

    Args:
        model: the dense model; it has adapters until `close`.
        removed: the blocks that the student skips.
        names: the modules to adapt, with their weights' names in the checkpoint.
        rank: rank of the adapters.
        seed: seed for their first factors; the second ones begin as zeros.
        checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        model: Any,
        removed: Sequence[int],
        names: Mapping[str, str],
        *,
        rank: int,
        seed: int,
        checkpointing: bool,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self.model, self._removed, self._names = model, removed, names
        self._checkpointing = checkpointing
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(names), bias="none"
        )
        self._peft = get_peft_model(model, config, adapter_name=_ADAPTER)
        self._peft.eval()
        self._layers = decoder_layers(model)
        modules = dict(model.named_modules())
        self._factors = {
            weight + end: getattr(modules[module], kind)[_ADAPTER].weight
            for module, weight in names.items()
            for end, kind in ((LORA_A, "lora_A"), (LORA_B, "lora_B"))
        }
        self._head: Any = model.get_output_embeddings()
        self._plain = self._is_plain()

    @property
    def device(self) -> Any:
        """Return the device for token ids."""
        return self.model.get_input_embeddings().weight.device

    def autocast(self) -> Any:
        """Run a 16-bit model in its dtype, although its factors are float32."""
        dtype = self._head.weight.dtype
        # A cache would hold 16-bit copies of all factors, among which glibc's heap fragments.
        return torch.autocast(
            self.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
        )

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """Return the factors by their sidecar names: [r, inputs] and [outputs, r] per weight."""
        return self._factors

    def load(self, factors: Mapping[str, Tensor]) -> None:
        """Set the factors.

        Raises:
            SlebError: these are the factors of different weights.
        """
        if factors.keys() != self._factors.keys():
            raise SlebError(
                "the earlier healing changed other weights; give its `projections`, or heal "
                "without `further`"
            )
        with torch.no_grad():
            for name, factor in self._factors.items():
                factor.copy_(factors[name])

    def close(self) -> None:
        """Remove the adapters from the model."""
        self._peft.unload()

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Use the dense model, without training, inside the context."""
        with torch.no_grad(), self._peft.disable_adapter():
            yield

    @contextmanager
    def student(self) -> Iterator[None]:
        """Use the pruned model with its adapters inside the context."""
        with blocks_deleted(self.model, self._removed):
            try:
                self._checkpoint(self._checkpointing)
                yield
            finally:
                self._checkpoint(False)

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the head's input for tokens [B, T]: [B, T, h]."""
        found: list[Tensor] = []

        def capture(inputs: Tensor) -> Tensor:
            found.append(inputs)
            return inputs[..., :1]

        with self._head_answers(capture):
            self.model(input_ids=ids, use_cache=False)
        return found[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [N, V] of the head's input [N, h]."""
        raw: Tensor = self._head(hidden)
        return (raw if self._plain else self._finished(raw)).float()

    def _finished(self, raw: Tensor) -> Tensor:
        """Apply the model's cap or scale to the head's output."""
        ids = torch.zeros((1, 1), dtype=torch.long, device=raw.device)
        with self._head_answers(lambda _: raw[None]):
            result: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return result[0]

    @torch.no_grad()
    def _is_plain(self) -> bool:
        """Return whether the head's output is used unchanged."""
        raw = torch.linspace(-60, 60, 64, device=self._head.weight.device)[None]
        return bool(torch.equal(self._finished(raw), raw))

    @contextmanager
    def _head_answers(self, answer: Any) -> Iterator[None]:
        own = self._head.__dict__.get("forward")
        try:
            self._head.forward = answer
            yield
        finally:
            if own is None:
                del self._head.forward
            else:
                self._head.forward = own

    def _checkpoint(self, on: bool) -> None:
        """Set checkpointed layers, but not their submodules, to training mode: no dropout."""
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self._layers:
            layer.training = on
