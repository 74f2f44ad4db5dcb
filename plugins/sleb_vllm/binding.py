"""Hold the manifest in a vLLM configuration against the model that vLLM is about to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sleb_serve.checkpoint import Checkpoint, fetch_index, open_checkpoint
from sleb_serve.errors import SlebError
from sleb_serve.pruning import Pruning
from sleb_serve.sidecar import check_sidecar
from sleb_vllm.architectures import CONFIG_KEY, pruned_name
from sleb_vllm.compat import check_version, vllm_version
from sleb_vllm.features import check_features


def check_engine(vllm_config: Any) -> Pruning:
    """The pruning that a vLLM configuration asks for, if its model is the pruning's.

    The weights of a folder are looked at, too; those of a hub model once vLLM has fetched them.

    Raises:
        SlebError: there is no pruning, it is malformed, the model is another one, or the engine is
            asked for something that is not supported for pruned models.
    """
    model_config = vllm_config.model_config
    pruning = pruning_of(model_config)
    checkpoint = checkpoint_of(vllm_config)
    pruning.check_binding(
        model_config.model,
        architecture=checkpoint.architecture,
        num_blocks=checkpoint.num_blocks,
        config_sha256=checkpoint.config_sha256(),
    )
    built = model_config.hf_text_config.num_hidden_layers
    if built != pruning.num_blocks:
        raise SlebError(
            f"vLLM's configuration counts {built} layers and the manifest {pruning.num_blocks}; "
            f"do not override num_hidden_layers for a pruned model"
        )
    check_version(vllm_version())
    check_features(vllm_config)
    # A model from the hub may be downloading at this moment, in another rank: see check_weights.
    if vllm_config.load_config.load_format != "dummy" and Path(model_config.model).is_dir():
        check_weights(vllm_config, pruning)
    return pruning


def prepare_loading(vllm_config: Any, pruning: Pruning) -> None:
    """Make vLLM fetch and load the files that the manifest's digest covers, and no others.

    Called in the first process, before the configuration goes to the workers.

    Raises:
        SlebError: the manifest's repair is not there, or not its own.
    """
    if pruning.repair is not None:
        # The ranks look at it when they load it.
        check_sidecar(pruning.repair)
    model_config, load_config = vllm_config.model_config, vllm_config.load_config
    if load_config.load_format == "auto":
        # "auto" prefers Mistral's own files, where a folder holds both kinds.
        load_config.load_format = "hf"
    if Path(model_config.model).is_dir() or not pruning.known_sha256:
        return
    fetch_index(model_config.model, model_config.revision, load_config.download_dir)
    unneeded = checkpoint_of(vllm_config).unneeded_files(frozenset(pruning.removed))
    ignored = load_config.ignore_patterns
    ignored = [ignored] if isinstance(ignored, str) else list(ignored)
    load_config.ignore_patterns = [*ignored, *sorted(unneeded.difference(ignored))]


def check_weights(vllm_config: Any, pruning: Pruning) -> None:
    """Refuse a checkpoint whose weights are not those the manifest was made on.

    Raises:
        SlebError: naming the digest expected and the one found.
    """
    found = checkpoint_of(vllm_config).weights_sha256(pruning.known_sha256)
    pruning.check_binding(vllm_config.model_config.model, weights_sha256=found)


def pruning_of(model_config: Any) -> Pruning:
    """The pruning in the overridden Hugging Face config.

    Raises:
        SlebError: there is none, or it is for another architecture than the one asked for.
    """
    content = getattr(model_config.hf_config, CONFIG_KEY, None)
    if content is None:
        raise SlebError(
            f"architecture {model_config.architectures[0]} was asked for without a manifest; use "
            f"the arguments that `sleb-serve serve --dry-run` prints"
        )
    pruning = Pruning.from_dict(content)
    if model_config.architectures != [pruned_name(pruning.architecture)]:
        raise SlebError(
            f"architecture {model_config.architectures} was asked for with a manifest for "
            f"{pruning.architecture}; use the arguments that `sleb-serve serve --dry-run` prints"
        )
    return pruning


def checkpoint_of(vllm_config: Any) -> Checkpoint:
    """The files of the model that vLLM is about to load."""
    model_config, load_config = vllm_config.model_config, vllm_config.load_config
    return open_checkpoint(model_config.model, model_config.revision, load_config.download_dir)
