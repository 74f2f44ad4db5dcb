"""The part of a manifest that a server needs, sent to every vLLM worker."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sleb_serve.cut.config import Cut
from sleb_serve.errors import SlebError
from sleb_serve.manifest.blocks import block_count, check_blocks, gaps
from sleb_serve.protocol import CONFIG_KEY
from sleb_serve.utils import strict_json

REPAIRS = ("fold", "heal")
"""Kinds of repair; see `sleb_serve.selection.repair` and `sleb_serve.healing`."""

_FORMER_REPAIRS = ("map", "scale")


@dataclass(frozen=True)
class RepairFile:
    """The sidecar with a repair's weights: its kind, digest and local path."""

    kind: str
    sha256: str
    path: str


@dataclass(frozen=True)
class Pruning:
    """The part of a manifest that a server needs: the blocks to remove and the model's binding.

    ``removed`` is ascending; ``removed_sha256``, where known, holds the digests of those blocks'
    weights (see `Checkpoint.block_sha256`). ``full_sha256``, where a server is to compare all bytes
    that it reads, holds the full digests of what lies outside the blocks and of each kept block.
    This is the content that travels to every vLLM worker.
    """

    architecture: str
    num_blocks: int
    config_sha256: str
    weights_sha256: str
    removed: tuple[int, ...]
    removed_sha256: tuple[str, ...] = ()
    repair: RepairFile | None = None
    full_sha256: tuple[str, ...] = ()

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Return runs of consecutive removed blocks as (first, last)."""
        return gaps(self.removed)

    @property
    def known_sha256(self) -> dict[int, str]:
        """Return digests of the removed blocks' weights, which need not be read for the check."""
        return dict(zip(self.removed, self.removed_sha256, strict=bool(self.removed_sha256)))

    @property
    def compared(self) -> str:
        """By which digest a server compares its weights: ``quick`` or ``full``."""
        return "full" if self.full_sha256 else "quick"

    @property
    def cut(self) -> Cut:
        """Return the cut for the config and the tensors."""
        return Cut(self.num_blocks, self.removed)

    @property
    def num_kept(self) -> int:
        """Return the number of kept blocks."""
        return self.num_blocks - len(self.removed)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON content; equal only for equal served models."""
        content = self.without_path()
        # Adds nothing to weights_sha256.
        content.pop("removed_sha256", None)
        # How much is compared, not what is served.
        content.pop("full_sha256", None)
        return hashlib.sha256(strict_json.canonical(content)).hexdigest()

    @property
    def tag(self) -> str:
        """Return the pruning's short name, such as ``sleb6-1a2b3c4d``: block count and digest."""
        return f"sleb{len(self.removed)}-{self.digest[:8]}"

    def without_path(self) -> dict[str, Any]:
        """Return `to_dict` with the content of the repair's file, not its path."""
        content = self.to_dict()
        if self.repair is not None:
            content["repair"] = {"kind": self.repair.kind, "sha256": self.repair.sha256}
        return content

    def to_dict(self) -> dict[str, Any]:
        """Return the content as plain JSON values."""
        content: dict[str, Any] = {
            "architecture": self.architecture,
            "num_blocks": self.num_blocks,
            "config_sha256": self.config_sha256,
            "weights_sha256": self.weights_sha256,
            "removed": list(self.removed),
        }
        if self.removed_sha256:
            content["removed_sha256"] = list(self.removed_sha256)
        if self.full_sha256:
            content["full_sha256"] = list(self.full_sha256)
        if self.repair is not None:
            content["repair"] = dict(vars(self.repair))
        return content

    @classmethod
    def of_config(cls, config: Any) -> Pruning | None:
        """Read the pruning from a Hugging Face config or its overrides; None if there is none.

        Raises:
            SlebError: it is malformed.
        """
        get = config.get if isinstance(config, Mapping) else partial(getattr, config)
        content = get(CONFIG_KEY, None)
        # A list in the overrides: vLLM would treat a dict as a nested config.
        if isinstance(content, list) and len(content) == 1:
            (content,) = content
        return None if content is None else cls.from_dict(content)

    @classmethod
    def from_dict(cls, value: object) -> Pruning:
        """Parse the output of `to_dict`.

        Raises:
            SlebError: the input has any other form; nothing is guessed or repaired.
        """
        keys = ("architecture", "num_blocks", "config_sha256", "weights_sha256", "removed")
        fields = strict_json.object_(
            value, "pruning", required=keys, optional=("removed_sha256", "full_sha256", "repair")
        )
        num_blocks = block_count(fields["num_blocks"], "pruning.num_blocks")
        removed = [
            strict_json.integer(block, f"pruning.removed[{i}]", 0, num_blocks - 1)
            for i, block in enumerate(strict_json.list_(fields["removed"], "pruning.removed"))
        ]
        check_blocks(removed, num_blocks, "pruning.removed")
        if removed != sorted(removed):
            raise SlebError(
                "pruning.removed is not in ascending order; re-run `sleb-serve serve --dry-run`"
            )
        return cls(
            architecture=strict_json.line(fields["architecture"], "pruning.architecture"),
            num_blocks=num_blocks,
            config_sha256=strict_json.sha256(fields["config_sha256"], "pruning.config_sha256"),
            weights_sha256=strict_json.sha256(fields["weights_sha256"], "pruning.weights_sha256"),
            removed=tuple(removed),
            removed_sha256=_parse_digests(fields, "removed_sha256", len(removed)),
            repair=_parse_repair(fields["repair"]) if "repair" in fields else None,
            full_sha256=_parse_digests(fields, "full_sha256", num_blocks - len(removed) + 1),
        )

    def check_binding(
        self,
        found: str,
        *,
        architecture: str | None = None,
        num_blocks: int | None = None,
        config_sha256: str | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        """Refuse a model that does not match the manifest; values of None are not compared.

        ``found`` names the actual model in the message.

        Raises:
            SlebError: naming what differs, what was expected and what was found.
        """
        looked_at = (
            ("architecture", self.architecture, architecture),
            ("number of decoder blocks", self.num_blocks, num_blocks),
            ("config_sha256", self.config_sha256, config_sha256),
            ("weights_sha256", self.weights_sha256, weights_sha256),
        )
        for what, expected, actual in looked_at:
            if actual is not None and actual != expected:
                raise SlebError(
                    f"the manifest is for another model than {found}: {what} expected {expected}, "
                    f"found {actual}; re-run `sleb-serve select` for this model, or give the "
                    f"manifest's own"
                )


def repair_kind(value: object, where: str) -> str:
    """Parse the kind of a repair strictly."""
    kind = strict_json.line(value, where)
    if kind in _FORMER_REPAIRS:
        raise SlebError(
            f"{where} is {kind}, which is no longer served: it needs code in every layer and gives "
            f"back less than a fold; select again with repair=fold, or without a repair"
        )
    if kind not in REPAIRS:
        raise SlebError(
            f"{where} is {strict_json.short(kind)}, this sleb-serve knows {', '.join(REPAIRS)}; "
            f"upgrade sleb-serve, or re-run `sleb-serve select`"
        )
    return kind


def _parse_digests(fields: Mapping[str, Any], key: str, count: int) -> tuple[str, ...]:
    found = strict_json.list_(fields.get(key, []), f"pruning.{key}")
    # An empty list asks for less than it seems to.
    if len(found) != count and key in fields:
        raise SlebError(
            f"pruning.{key} has {len(found)} digests, not {count}; re-run `sleb-serve serve "
            "--dry-run`"
        )
    return tuple(strict_json.sha256(d, f"pruning.{key}[{i}]") for i, d in enumerate(found))


def _parse_repair(value: object) -> RepairFile:
    fields = strict_json.object_(value, "pruning.repair", required=("kind", "sha256", "path"))
    return RepairFile(
        kind=repair_kind(fields["kind"], "pruning.repair.kind"),
        sha256=strict_json.sha256(fields["sha256"], "pruning.repair.sha256"),
        path=strict_json.line(fields["path"], "pruning.repair.path"),
    )
