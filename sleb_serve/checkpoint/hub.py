"""Opens a model by folder or Hugging Face hub id."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.files import WEIGHT_FILES, read_json
from sleb_serve.errors import SlebError, first_line
from sleb_serve.protocol import without_guard


def open_checkpoint(
    model: str, revision: str | None = None, cache_dir: str | None = None
) -> Checkpoint:
    """Open `model`, a local folder or a hub id; download config.json if needed.

    Args:
        model: a folder, or an id on the Hugging Face hub.
        revision: branch, tag or commit on the hub; None for the default.
        cache_dir: local cache of hub models; None for the hub library's default.

    Raises:
        SlebError: the model does not exist, or its config.json is not an object.
    """
    path = Path(model)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise SlebError(
                f"{model} is a folder without config.json; give a Transformers checkpoint folder"
            )
    elif path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SlebError(f"no such model: {model} is no folder; give a checkpoint folder or hub id")
    else:
        file = Path(_hub_file(model, "config.json", revision, cache_dir))
    return Checkpoint(path=file.parent, config=without_guard(read_json(file)))


def download_weights(model: str, revision: str | None = None) -> None:
    """Download a hub model's files into the local cache, like `from_pretrained`.

    `Checkpoint.path` of a hub id is its snapshot folder, so its digests can then be computed.

    Raises:
        SlebError: the hub cannot be reached or has no such model.
    """
    if Path(model).is_dir():
        return
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt", "*.model"]
    try:
        found = snapshot_download(model, revision=revision, allow_patterns=patterns)
        if not any(Path(found).glob("*.safetensors")):
            snapshot_download(model, revision=revision, allow_patterns=[*patterns, "*.bin"])
    except Exception as error:
        raise _no_such_model(model, error) from error


def fetch_index(model: str, revision: str | None = None, cache_dir: str | None = None) -> bool:
    """Download a hub model's shard index into the local cache.

    Returns:
        Whether it exists; False for a folder or a model with a single weight file.
    """
    if Path(model).is_dir():
        return False
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for _, index in WEIGHT_FILES:
        with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):
            hf_hub_download(model, index, revision=revision, cache_dir=cache_dir)
            return True
    return False


def _hub_file(model: str, name: str, revision: str | None, cache_dir: str | None) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(model, name, revision=revision, cache_dir=cache_dir))
    except Exception as error:
        raise _no_such_model(model, error) from error


def why_not(error: Exception) -> str:
    """Describe a hub failure in a few words."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "not here, and HF_HUB_OFFLINE forbids asking the hub"
    if type(error).__name__ in {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return "the Hugging Face hub is unreachable and it is not cached"
    return first_line(error)


def _no_such_model(model: str, error: Exception) -> SlebError:
    return SlebError(
        f"no such model: {model} ({why_not(error)}); give a checkpoint folder or a hub id"
    )
