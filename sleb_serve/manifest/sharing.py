"""A draft without weights of its own: its layers are those of the dense model that it drafts for.

Layer ``i`` of the draft is layer ``kept[i]`` of the dense model. Whole modules are shared rather
than tensors, because backends repack weights into places that only the module's own code knows.
Modules with a state for requests (attention, Mamba) stay the draft's. Only modules of vLLM are
handled here, by the names of their fields; nothing of it is imported.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb_serve.checkpoint.decoder import number_after
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.cut.config import Cut
from sleb_serve.errors import SlebError
from sleb_serve.manifest.asked import is_pruned
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.protocol import READERS
from sleb_serve.utils.heap import trim_heap

_FROM_FILES = frozenset(("auto", *READERS)) - {"dummy"}


@dataclass(frozen=True)
class Loaded:
    """How a model was loaded: by ``load_format`` from the files of vLLM's ``model_config``."""

    model_config: Any
    load_format: str
    download_dir: str | None

    def files(self, without: frozenset[int] = frozenset()) -> frozenset[Path]:
        """Return the weight files, links followed.

        Args:
            without: blocks whose shards are not needed.

        Raises:
            SlebError: some are missing, or other files may have been read.
        """
        config = self.model_config
        checkpoint = open_checkpoint(config.model, config.revision, self.download_dir)
        if self.load_format not in _FROM_FILES or getattr(config, "model_weights", None):
            raise SlebError(f"{config.model} was loaded by {self.load_format}")
        # vLLM prefers these files where it may choose.
        if self.load_format == "auto" and any(checkpoint.path.glob("consolidated*.safetensors")):
            raise SlebError(f"{config.model} has weights in Mistral's format as well")
        return frozenset(file.resolve() for file in checkpoint.weight_files(without))


class Lender:
    """Remembers a process's dense model, and gives its modules to the draft that follows."""

    def __init__(self) -> None:
        self._model: Callable[[], Any] = lambda: None
        self._loaded: Loaded | None = None

    def remember(self, model: Any, vllm_config: Any, loaded: Loaded) -> None:
        """Keep a weak reference to a dense model for which a pruned one is to draft."""
        draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
        if is_pruned(draft) and loaded.model_config.runner_type != "draft":
            self._model, self._loaded = weakref.ref(model), loaded

    def share(self, draft: Any, sizes: Mapping[str, int], vllm_config: Any, loaded: Loaded) -> str:
        """Replace the draft's modules by the dense model's where these are equal.

        Args:
            draft: the pruned model, loaded, with a ``hf_to_vllm_mapper`` of the plugin.
            sizes: its parameters' bytes; see `parameter_bytes`.
            vllm_config: vLLM's configuration of the draft.
            loaded: how the draft was loaded.

        Returns:
            A log line: the bytes that are shared, or why none are.
        """
        target = self._model()
        states = vllm_config.compilation_config.static_forward_context
        pruning = Pruning.of_config(loaded.model_config.hf_config)
        assert pruning is not None
        try:
            if target is None or self._loaded is None or not _holds(target, states):
                raise SlebError("no dense model was loaded before it")
            _check_equal(self._loaded, loaded, pruning)
            if _offloads(vllm_config):
                raise SlebError("weights are offloaded")
            if getattr(vllm_config.parallel_config, "enable_eplb", False):
                raise SlebError("--enable-eplb moves experts between ranks")
        except SlebError as error:
            return f"The draft keeps weights of its own: {error}"
        shared = share(draft, target, draft.hf_to_vllm_mapper.path, pruning.cut, states)
        _release()
        common = sum(size for name, size in sizes.items() if name.rpartition(".")[0] in shared)
        own = sum(sizes.values()) - common
        return (
            f"The draft shares {common} bytes of weights with the dense model, {own} bytes are its "
            f"own"
        )


def share(
    draft: Any, target: Any, path: str, cut: Cut, states: Mapping[str, Any]
) -> frozenset[str]:
    """Replace modules of the draft by equal ones of the dense model.

    A module is replaced if it has parameters, none in modules inside it, and no state, and if the
    dense model's has the same class, settings and tensors, bit for bit. Tensors that a backend has
    repacked are out of sight, so the caller must know that both were loaded from the same files.

    Args:
        draft: the model with fewer layers, a torch module.
        target: the dense model.
        path: name of the list of decoder layers in both.
        cut: the removed layers.
        states: modules with a state for requests, by any name.

    Returns:
        The names of the replaced modules in the draft.
    """
    lent = dict(target.named_modules(remove_duplicate=False))
    stateful = set(map(id, states.values()))
    replaced = set()
    for name, module in list(draft.named_modules(remove_duplicate=False)):
        found = lent.get(_dense_name(name, f"{path}.", cut))
        # Adapters wrap the dense model's modules.
        found = getattr(found, "base_layer", found)
        if not name or not stateful.isdisjoint(map(id, module.modules())):
            continue
        if found is module or _lendable(module, found):
            outer, _, key = name.rpartition(".")
            setattr(draft.get_submodule(outer), key, found)
            replaced.add(name)
    return frozenset(replaced)


def parameter_bytes(model: Any) -> dict[str, int]:
    """Return the bytes of each parameter of a torch module; tied ones count once."""
    return {
        name: parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
    }


def _holds(target: Any, states: Mapping[str, Any]) -> bool:
    """Whether the model belongs to this engine: another one's may live in the process still."""
    return not {id(state) for state in states.values()}.isdisjoint(map(id, target.modules()))


def _check_equal(target: Loaded, draft: Loaded, pruning: Pruning) -> None:
    if pruning.repair is not None:
        raise SlebError(f"the manifest's {pruning.repair.kind} changes some")
    for what in ("dtype", "quantization"):
        found, wanted = (getattr(one.model_config, what, None) for one in (draft, target))
        if found != wanted:
            raise SlebError(f"its {what} is {found}, the dense model's {wanted}")
    if not draft.files(frozenset(pruning.removed)) <= target.files():
        raise SlebError(f"its files are not those of the dense model {target.model_config.model}")


def _offloads(vllm_config: Any) -> bool:
    """Whether modules find their weights elsewhere while they run."""
    asked = getattr(vllm_config, "offload_config", None)
    uva, prefetch = getattr(asked, "uva", None), getattr(asked, "prefetch", None)
    former = getattr(vllm_config.cache_config, "cpu_offload_gb", 0)
    now = getattr(uva, "cpu_offload_gb", 0) or getattr(prefetch, "offload_group_size", 0)
    return bool(former or now)


def _dense_name(name: str, prefix: str, cut: Cut) -> str | None:
    """Return a module's name in the dense model; None for layers after the last."""
    place = number_after(name, prefix)
    if place is None:
        return name
    if place >= len(cut.kept):
        return None
    return f"{prefix}{cut.kept[place]}{name[len(prefix) + len(str(place)) :]}"


def _lendable(module: Any, found: Any) -> bool:
    if found is None or type(module) is not type(found):
        return False
    inside, others = list(module.modules()), list(found.modules())
    # Experts have a module for their method, which has no parameters.
    if list(map(type, inside)) != list(map(type, others)) or any(map(_parameters, inside[1:])):
        return False
    if not _parameters(module) or dict(_settings(module)) != dict(_settings(found)):
        return False
    own, lent = _tensors(module), _tensors(found)
    return own.keys() == lent.keys() and all(_same(own[name], lent[name]) for name in own)


def _parameters(module: Any) -> dict[str, Any]:
    """Its own, without those of modules inside it."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _tensors(module: Any) -> dict[str, Any]:
    return {
        **_parameters(module),
        **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
    }


def _settings(module: Any) -> Iterator[tuple[str, Any]]:
    """A module's sizes and switches, which differ where repacked tensors do."""
    for name, value in vars(module).items():
        if isinstance(value, bool | int | float) or (
            isinstance(value, tuple | list)
            and all(isinstance(part, bool | int | float) for part in value)
        ):
            yield name, value


def _same(one: Any, two: Any) -> bool:
    """Whether two tensors are equal bit for bit and on the same device."""
    import torch

    one, two = one.data, two.data
    if (one.shape, one.dtype, one.device) != (two.shape, two.dtype, two.device):
        return False
    # Some types know no comparison, and NaN equals nothing.
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = kinds.get(one.element_size())
    # Tensors without memory, or with a layout of their own, cannot be compared.
    if bits is None or one.is_meta or {type(one), type(two)} != {torch.Tensor}:
        return False
    return bool(torch.equal(one.view(bits), two.view(bits)))


def _release() -> None:
    """Give the draft's freed weights back to the device."""
    import torch

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
        return
    trim_heap(torch.device("cpu"))
