"""What vLLM builds for a pruned architecture: the stock class, less the removed layers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.mamba.abstract import MambaBase

from sleb_serve.errors import SlebError
from sleb_serve.pruning import Pruning
from sleb_serve.sidecar import read_sidecar
from sleb_vllm.architectures import EXPECTED, pruned_name
from sleb_vllm.binding import check_engine, check_weights, checkpoint_of
from sleb_vllm.layers import BuiltLayers, layers_removed
from sleb_vllm.proof import Watched, check_same_digest, install_report
from sleb_vllm.transformers_backend import PrunedBackend, is_backend
from sleb_vllm.weights import fill_gaps, folded, removed_weights_skipped

# A child of vLLM's own logger, so that the lines appear where vLLM's do.
logger = init_logger("vllm.plugins.sleb")


@dataclass(frozen=True)
class Built:
    """What one rank holds: decoder layers by original index, numbers in its parameters.

    ``weights_read_bytes`` are those of the checkpoint's tensors outside the removed layers,
    ``weights_skipped_bytes`` those inside; None before they are loaded, and for a checkpoint in
    PyTorch's own format, which is read whole.
    """

    pruning: Pruning
    layers: tuple[int, ...]
    parameters: int
    weights_read_bytes: int | None = None
    weights_skipped_bytes: int | None = None


@functools.cache
def pruned_class(stock: Any) -> Any:
    """The pruned form of a vLLM model class.

    It acts only while an instance is built and loaded; what runs afterwards is the stock class's
    own code on a shorter list of layers.
    """
    install_report()
    # A tuple of bases, so that the backend's stand-in methods come before its own.
    bases = (PrunedBackend, stock) if is_backend(stock) else (stock,)

    class Pruned(*bases):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            pruning = check_engine(vllm_config)
            hidden_size = vllm_config.model_config.get_hidden_size()
            with layers_removed(pruning, hidden_size) as removal:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            built = removal.result
            _check_built(pruning, built, vllm_config)
            self.sleb = Built(pruning, tuple(built.kept()), _count_parameters(self))
            self._sleb_config = vllm_config
            self._sleb_layers = built.layers
            logger.info(
                "Pruned by manifest %s: %d of %d decoder layers built, removed %s",
                pruning.tag,
                len(self.sleb.layers),
                pruning.num_blocks,
                list(pruning.removed),
            )
            if pruning.architecture in EXPECTED:
                logger.warning(
                    "%s is expected to be right when pruned, not proven: %s",
                    pruning.architecture,
                    EXPECTED[pruning.architecture],
                )
            if vllm_config.lora_config is not None:
                logger.info(
                    "LoRA adapters: what they hold for the removed layers %s is ignored",
                    list(pruning.removed),
                )

        def load_weights(self, weights: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
            checkpoint, pruning = checkpoint_of(self._sleb_config), self.sleb.pruning
            check_same_digest(pruning)
            watched = Watched(checkpoint, pruning)
            weights = watched.watch(weights)
            repair = read_sidecar(pruning)
            if pruning.repair is not None and pruning.repair.kind == "fold":
                weights = folded(weights, repair, pruning.repair.path)
            with removed_weights_skipped(checkpoint, pruning):
                loaded = super().load_weights(weights, *args, **kwargs)
            watched.check()
            fill_gaps(self._sleb_layers, pruning, repair)
            # Again, since a model from the hub may have been downloaded only now.
            check_weights(self._sleb_config, pruning)
            read, skipped = checkpoint.tensor_bytes(frozenset(pruning.removed)) or (None, None)
            # Counted again, since loading may add a parameter (a head's bias), and now rather than
            # later, since backends repack weights once they are loaded.
            self.sleb = replace(
                self.sleb,
                parameters=_count_parameters(self),
                weights_read_bytes=read,
                weights_skipped_bytes=skipped,
            )
            logger.info(
                "Pruned model loaded: %d parameters on this rank, %s bytes of weights read, "
                "%s bytes of removed layers skipped",
                self.sleb.parameters,
                read,
                skipped,
            )
            return loaded

    Pruned.__name__ = Pruned.__qualname__ = pruned_name(stock.__name__)
    Pruned.__doc__ = f"{stock.__name__} without the decoder layers that a manifest removes."
    return Pruned


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_built(pruning: Pruning, built: BuiltLayers, vllm_config: Any) -> None:
    """Count what was built against the manifest; whatever differs must end the server's start."""
    expected = [i for i in range(built.start, built.end) if i not in pruning.removed]
    if built.kept() != expected:
        raise SlebError(
            f"built decoder layers {built.kept()} where the manifest leaves {expected}; this "
            f"vLLM cannot serve the model pruned"
        )
    caches = vllm_config.compilation_config.static_forward_context
    left_over = sorted(
        name
        for name in caches
        for index in pruning.removed
        if name.startswith(f"{built.prefix}.{index}.")
    )
    if left_over:
        raise SlebError(
            f"removed layers still claim KV cache: {', '.join(left_over)}; this vLLM cannot serve "
            f"the model pruned"
        )
    if any(isinstance(layer, MambaBase) for layer in caches.values()):
        raise SlebError(
            f"{pruning.architecture} with recurrent layers cannot be served pruned: no test could "
            f"show that their state survives a gap; serve the dense model"
        )
    own = {id(module) for module in built.layers.modules()}
    if not any(isinstance(m, nn.Module) and id(m) in own for m in caches.values()):
        raise SlebError(
            "no kept decoder layer registered an attention layer; this vLLM cannot serve the "
            "model pruned"
        )
