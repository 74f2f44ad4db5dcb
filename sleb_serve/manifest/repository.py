"""Manifests in Hugging Face hub repositories.

``hf://org/name@revision/file.json`` always means the hub. ``org/name`` means it if there is no such
local file or folder. The hub library's cache, tokens and environment variables apply: with
``HF_HUB_OFFLINE=1`` a cached manifest is read without a network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote

from sleb_serve.checkpoint.hub import why_not
from sleb_serve.errors import SlebError
from sleb_serve.utils.strict_json import short

MANIFEST_NAME = "sleb_manifest.json"
"""Name of the manifest in a repository and in an exported checkpoint."""

_SCHEME = "hf://"
_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PLACE = re.compile(r"(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>[^@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """A file of a model repository: ``organisation/name``, a branch, tag or commit, a path."""

    repository: str
    revision: str | None = None
    file: str = MANIFEST_NAME

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return f"{_SCHEME}{self.repository}{at}/{self.file}"


@dataclass(frozen=True)
class Fetched:
    """A local copy of a repository's file; ``source`` includes the commit.

    ``before`` is the previous target of the same name, if it has moved.
    """

    path: Path
    source: HubFile
    before: Fetched | None = None


def hub_file(source: str) -> HubFile | None:
    """Parse `source` as a repository's file; None if it is a local path.

    In this order: ``hf://`` is the hub; an existing path is local; ``org/name`` is the hub unless
    it ends in ``.json``; anything else is a path.

    Raises:
        SlebError: it begins with ``hf://`` but does not name a file of a model repository.
    """
    if not source.startswith(_SCHEME):
        named = is_repository(source) and not source.endswith(".json")
        return HubFile(source) if named and not Path(source).exists() else None
    place = _PLACE.fullmatch(source.removeprefix(_SCHEME))
    if place is not None and is_repository(place["id"]):
        revision = None if place["revision"] is None else unquote(place["revision"])
        file = place["file"] or MANIFEST_NAME
        # Both become part of cache paths.
        parts = {*file.split("/"), *(revision or "main").split("/")}
        if not parts & {"", ".", ".."}:
            return HubFile(place["id"], revision, file)
    raise SlebError(
        f"{short(source)} names no file of a model repository; give hf://organisation/name, maybe "
        f"with @revision and /file.json (a slash in the revision as %2F)"
    )


def is_repository(name: str) -> bool:
    """Return whether a name has the form ``organisation/name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return _ID.fullmatch(name) is not None


def fetch(asked: HubFile) -> Fetched:
    """Download a manifest into the local cache.

    Raises:
        SlebError: it does not exist, or the hub returned a different commit.
    """
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(asked.repository, asked.file, revision=asked.revision)
    before = _found(asked, Path(known)) if isinstance(known, str) else None
    found = _downloaded(asked, "manifest")
    commit = found.source.revision
    if asked.revision and _COMMIT.fullmatch(asked.revision) and commit != asked.revision:
        raise SlebError(
            f"{asked}: the hub gave commit {commit} where {asked.revision} was asked for; ask the "
            f"repository's owner which commit holds the manifest"
        )
    moved = before is not None and before.source.revision != commit
    return replace(found, before=before) if moved else found


def fetch_beside(manifest: HubFile, name: str) -> Path:
    """Download a file from the manifest's folder and commit into the local cache.

    Raises:
        SlebError: it does not exist.
    """
    folder = manifest.file.rpartition("/")
    asked = HubFile(manifest.repository, manifest.revision, "".join((*folder[:2], name)))
    return _downloaded(asked, "repair").path


def _downloaded(asked: HubFile, what: str) -> Fetched:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(asked.repository, asked.file, revision=asked.revision))
    except Exception as error:
        raise SlebError(
            f"cannot read {what} {asked} ({why_not(error)}); `sleb-serve push` puts a manifest "
            f"and its repairs into a repository"
        ) from error
    return _found(asked, path)


def _found(asked: HubFile, path: Path) -> Fetched:
    # The cache stores a repository's files in a folder named after their commit.
    commit = path.parents[asked.file.count("/")].name
    return Fetched(path, HubFile(asked.repository, commit, asked.file))
