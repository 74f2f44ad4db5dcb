"""``--load-format sleb``: vLLM's own readers, without the tensors of removed layers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import (
    BaseModelLoader,
    get_model_loader,
    register_model_loader,
    weight_utils,
)
from vllm.model_executor.models.utils import PPMissingLayer

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.hub import fetch_index, open_checkpoint
from sleb_serve.compat.architectures import status
from sleb_serve.errors import SlebError
from sleb_serve.manifest.asked import check_dense, check_only, is_pruned
from sleb_serve.manifest.binding import (
    check_again,
    check_config_binding,
    check_readable,
    compare_loaded,
)
from sleb_serve.manifest.built import Built
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.sharing import Lender, Loaded, parameter_bytes
from sleb_serve.manifest.tensors import NeededOnly, ShorterTensors
from sleb_serve.protocol import FORMAT, READER_KEY, READERS, check_reader
from sleb_vllm.lora import Renumbered
from sleb_vllm.positions import dense_remainders
from sleb_vllm.verify import check_config, check_same_digest, decoder_of, install_report

logger = init_logger("vllm.plugins.sleb")

_LENDER = Lender()


class SlebModelLoader(BaseModelLoader):
    """Builds vLLM's own model from the cut config, and loads the tensors under their new names.

    ``--model-loader-extra-config '{"reader": …}'`` names the load format that reads the files
    (default ``hf``), which gets the other entries.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        extra = dict(load_config.model_loader_extra_config or {})
        self._format = str(extra.pop(READER_KEY, READERS[0]))
        check_reader(self._format)
        self._extra = extra
        self._vllm_config: Any = None
        self._sizes: dict[str, int] = {}

    def download_model(self, model_config: Any) -> None:
        """Download the files of all kept layers."""
        pruning = Pruning.of_config(model_config.hf_config)
        self._reader(model_config, pruning).download_model(model_config)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Load the model without its removed layers.

        Raises:
            SlebError: there is no manifest, it does not match the model, or vLLM built or read
                other layers than it keeps.
        """
        pruning = Pruning.of_config(model_config.hf_config)
        if pruning is None:
            check_dense(vllm_config, model_config, FORMAT)
            reader = self._reader(model_config, None)
            model: nn.Module = reader.load_model(
                vllm_config=vllm_config, model_config=model_config, prefix=prefix
            )
            return model
        check_only(model_config)
        check_config_binding(self._checkpoint(model_config), model_config.model, pruning)
        check_config(model_config, pruning)
        install_report()
        self._vllm_config = vllm_config
        with dense_remainders(pruning.cut):
            model = super().load_model(
                vllm_config=vllm_config, model_config=model_config, prefix=prefix
            )
        if model_config.runner_type == "draft":
            loaded = Loaded(model_config, self._format, self.load_config.download_dir)
            logger.info(_LENDER.share(model, self._sizes, vllm_config, loaded))
        return model

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Read the checkpoint into a model that was built from a cut config."""
        pruning = Pruning.of_config(model_config.hf_config)
        assert pruning is not None
        checkpoint = self._checkpoint(model_config)
        path, layers = decoder_of(model, self._vllm_config, pruning)
        held = [i for i, layer in enumerate(layers) if not isinstance(layer, PPMissingLayer)]
        built = Built(pruning, tuple(pruning.cut.kept[i] for i in held), _count(model))
        check_same_digest(pruning)
        strategy = self.load_config.safetensors_load_strategy
        check_readable(pruning, self._format, strategy, self._extra)
        reader = self._reader(model_config, pruning)
        if self._format == "dummy":
            reader.load_weights(model, model_config)
        else:
            tensors = ShorterTensors(checkpoint, pruning)
            if Path(model_config.model).is_dir():
                checkpoint.weight_files(frozenset(pruning.removed))
            with only_needed(checkpoint, pruning) as opener:
                reader.load_weights(_Renaming(model, tensors, opener), model_config)
            tensors.check()
            if get_world_group().local_rank == 0:
                # A model from the hub is on this machine only now; one rank looks at it for all.
                compare_loaded(model_config.model, checkpoint, pruning, logger.info)
            read, skipped = checkpoint.tensor_bytes(frozenset(pruning.removed)) or (None, None)
            # Count again, because loading may add a parameter (a head's bias), and do it now,
            # because backends repack weights after loading.
            built = replace(
                built,
                parameters=_count(model),
                weights_compared=pruning.compared,
                weights_read_bytes=read,
                weights_skipped_bytes=skipped,
            )
        model.sleb = built
        self._sizes = parameter_bytes(model)
        stock = getattr(model, "hf_to_vllm_mapper", None)
        model.hf_to_vllm_mapper = Renumbered.over(stock, path, pruning.cut)
        logger.info(built.to_text())
        found, why = status(pruning.architecture)
        if found != "proven":
            logger.warning("%s is not proven to be right: %s", pruning.architecture, why)

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[Any]:
        """The tensors under their new names, for vLLM to load a second time in place.

        Raises:
            SlebError: vLLM was told to load another model than the manifest's, or by another one.
        """
        built: Pruning = model.sleb.pruning
        pruning = Pruning.of_config(model_config.hf_config)
        if pruning is None or pruning.digest != built.digest:
            raise SlebError(
                f"the model that runs is of manifest {built.tag}, and its layers cannot change: "
                f"start another server with {'none' if pruning is None else pruning.tag}"
            )
        # Before anything is read: what is in place stays there.
        checkpoint = self._checkpoint(model_config)
        check_again(checkpoint, model_config.model, pruning)
        return self._all_weights(model_config, model, pruning, checkpoint)

    def _all_weights(
        self, model_config: Any, model: nn.Module, pruning: Pruning, checkpoint: Checkpoint
    ) -> Iterator[Any]:
        reader = self._reader(model_config, pruning)
        with only_needed(checkpoint, pruning) as opener:
            tensors = ShorterTensors(checkpoint, pruning)
            stand_in = _Renaming(model, tensors, opener)
            yield from tensors(reader.get_all_weights(model_config, stand_in))

    def _checkpoint(self, model_config: Any) -> Checkpoint:
        directory = self.load_config.download_dir
        return open_checkpoint(model_config.model, model_config.revision, directory)

    def _reader(self, model_config: Any, pruning: Pruning | None) -> Any:
        config = replace(
            self.load_config, load_format=self._format, model_loader_extra_config=self._extra
        )
        model, revision = model_config.model, model_config.revision
        if pruning is not None and fetch_index(model, revision, config.download_dir):
            unneeded = self._checkpoint(model_config).unneeded_files(frozenset(pruning.removed))
            given = config.ignore_patterns
            given = [given] if isinstance(given, str) else list(given)
            config = replace(config, ignore_patterns=[*given, *sorted(unneeded)])
        return get_model_loader(config)


class _Renaming:
    """Wraps a model while a reader loads it, and maps the tensors."""

    def __init__(self, model: nn.Module, tensors: ShorterTensors, opener: NeededOnly) -> None:
        self._model, self._tensors, self._opener = model, tensors, opener

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def load_weights(self, weights: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        return self._model.load_weights(self._tensors(weights), *args, **kwargs)

    @property
    def allow_patterns_overrides(self) -> list[str] | None:
        # Without this, vLLM requires every file in the index.
        own: list[str] | None = getattr(self._model, "allow_patterns_overrides", None)
        return ["*.safetensors"] if own is None and self._opener.leaves_files_out else own

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        # vLLM calls this to skip whole files, from 0.32 on.
        unused = getattr(self._model, "is_unused_checkpoint_weight", lambda name: False)
        return not self._opener.is_needed(name) or bool(unused(name))


@contextmanager
def only_needed(checkpoint: Checkpoint, pruning: Pruning) -> Iterator[NeededOnly]:
    """Hide the tensors of removed layers from vLLM's safetensors readers inside the context."""
    stock = weight_utils.safe_open
    opener = NeededOnly(checkpoint, pruning, stock)
    weight_utils.safe_open = opener
    try:
        yield opener
    finally:
        weight_utils.safe_open = stock


def register_loader() -> None:
    """Register the format in vLLM, and block other loaders for pruned models. Idempotent."""
    try:
        from vllm.config.load import LoadConfig

        get_model_loader(LoadConfig(load_format=FORMAT))
    except ValueError:
        register_model_loader(FORMAT)(SlebModelLoader)
        _guard_others()


def _guard_others() -> None:
    """Make every other loader refuse a pruned model, which it would load incorrectly."""
    pending = [BaseModelLoader]
    while pending:
        loader = pending.pop()
        pending += loader.__subclasses__()
        if "load_model" in vars(loader) and loader is not SlebModelLoader:
            loader.load_model = _guarded(loader.load_model)


def _guarded(load_model: Any) -> Any:
    @functools.wraps(load_model)
    def guarded(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_pruned(model_config):
            check_dense(vllm_config, model_config, self.load_config.load_format)
        elif not isinstance(self, SlebModelLoader):
            own = _draft_loader(vllm_config, model_config)
            if own is not None:
                return own.load_model(vllm_config, model_config, *args, **kwargs)
            raise SlebError(
                f"the config asks for a pruned model and --load-format is "
                f"{self.load_config.load_format}, which loads dense ones; use --load-format "
                f"{FORMAT}, as `sleb-serve serve --dry-run` prints"
            )
        model = load_model(self, vllm_config, model_config, *args, **kwargs)
        if not is_pruned(model_config):
            loaded = self.load_config
            where = Loaded(model_config, str(loaded.load_format), loaded.download_dir)
            _LENDER.remember(model, vllm_config, where)
        return model

    return guarded


def _draft_loader(vllm_config: Any, model_config: Any) -> SlebModelLoader | None:
    """Return the plugin's loader for a draft that uses it: vLLM loads some drafts as the target."""
    asked = getattr(vllm_config.speculative_config, "draft_load_config", None)
    if model_config.runner_type != "draft" or asked is None or asked.load_format != FORMAT:
        return None
    return SlebModelLoader(asked)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
