"""A folder with a pruned model for vLLM's draft-model speculation.

vLLM takes a draft model's folder and applies no ``--hf-overrides`` to it. So the manifest's content
is in the folder's config.json, and the other files are links to the checkpoint's: no weights are
copied. The config also names an architecture that vLLM does not have, so that vLLM without the
plugin refuses the folder rather than serve the dense model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.hub import download_weights
from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.protocol import CONFIG_KEY, FORMAT, guard_name
from sleb_serve.serving.options import value_of
from sleb_serve.utils.atomic_io import shared_folder

_SPECULATIVE = re.compile(r"--spec(?!ialize)|-sc\b")
_NOT_LINKED = re.compile(r"config\.json|\..*")


def draft_options(
    model: str, checkpoint: Checkpoint, pruning: Pruning, options: Sequence[str], tokens: int
) -> list[str]:
    """Return the options to serve the dense `model` with the pruned one as its draft.

    Args:
        model: folder or hub id of the dense model.
        checkpoint: its files.
        pruning: the blocks that the draft skips.
        options: the other options of ``vllm serve``.
        tokens: number of tokens per draft.

    Raises:
        SlebError: the options already set up speculation, or the folder cannot be created.
    """
    for option in options:
        if _SPECULATIVE.match(option):
            raise SlebError(
                f"{option.partition('=')[0]}: --as-draft sets up speculative decoding itself; "
                f"leave the option out (--draft-tokens says how many tokens are drafted)"
            )
    if not Path(model).is_dir():
        download_weights(model, value_of(options, "--revision"))
    ranks = value_of(options, "--tensor-parallel-size", "-tp") or "1"
    speculation = {
        "method": "draft_model",
        "model": str(draft_folder(checkpoint, pruning, _cache())),
        "num_speculative_tokens": tokens,
        # vLLM requires the draft's parallelism to equal the model's.
        "draft_tensor_parallel_size": int(ranks) if ranks.isdecimal() else 1,
        "draft_load_config": {"load_format": FORMAT},
    }
    # The draft's config is parsed in the same format; the dense model's is unchanged.
    text = json.dumps(speculation, separators=(",", ":"))
    return ["--config-format", FORMAT, "--speculative-config", text]


def draft_folder(checkpoint: Checkpoint, pruning: Pruning, root: Path) -> Path:
    """Find or create the folder under `root` with the pruned form of `checkpoint`.

    Raises:
        SlebError: it cannot be written.
    """
    source = checkpoint.path.resolve()
    files = {
        file.name: file.resolve()
        for file in source.iterdir()
        if file.is_file() and not _NOT_LINKED.fullmatch(file.name)
    }
    own = {CONFIG_KEY: pruning.to_dict(), "architectures": [guard_name(pruning.architecture)]}
    config = json.dumps({**checkpoint.config, **own}, indent=2).encode()
    # Equal checkpoints in two places get two folders.
    content = json.dumps([str(source), sorted(map(str, files.items()))]).encode() + config
    folder = root / f"{pruning.tag}-{hashlib.sha256(content).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        with shared_folder(folder) as temporary:
            for name, file in files.items():
                (temporary / name).symlink_to(file)
            (temporary / "config.json").write_bytes(config)
    except OSError as error:
        raise SlebError(
            f"cannot write the draft's folder {folder}: {first_line(error)}; set XDG_CACHE_HOME "
            f"to a folder that can be written"
        ) from error
    return folder


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "sleb-serve" / "drafts"
