"""Upload of a manifest and its repairs to a Hugging Face hub repository, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sleb_serve.checkpoint.hub import why_not
from sleb_serve.errors import SlebError
from sleb_serve.manifest.reader import read_manifest
from sleb_serve.manifest.repair_file import check_sidecar
from sleb_serve.manifest.repository import MANIFEST_NAME, HubFile, is_repository
from sleb_serve.publishing.card import is_ours, model_card

CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """Files to upload: the content or the local path of each."""

    repository: str
    files: Mapping[str, bytes | Path]

    @property
    def sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def prepared(manifest: str | Path, repository: str) -> Upload:
    """Prepare the upload of `push` without contacting the hub.

    Raises:
        SlebError: the manifest is invalid, one of its repairs is missing or does not match, or
            `repository` is not a repository name.
    """
    if not is_repository(repository):
        raise SlebError(f"{repository} is no repository's name; give organisation/name")
    read = read_manifest(Path(manifest))
    repairs: dict[str, Path] = {}
    for repair in read.repairs:
        file = read.repair_file(repair)
        check_sidecar(file)
        repairs[repair.file] = Path(file.path)
    taken = {MANIFEST_NAME, CARD} & repairs.keys()
    if taken:
        raise SlebError(f"{manifest}: a repair is named {taken.pop()}, as another file is there")
    card = model_card(read, repository).encode()
    files: dict[str, bytes | Path] = {MANIFEST_NAME: read.to_json(), CARD: card, **repairs}
    return Upload(repository, MappingProxyType(files))


def push(
    manifest: str | Path, repository: str, *, revision: str | None = None, private: bool = False
) -> str:
    """Upload a manifest, its repairs and a generated model card in one commit.

    An existing card that was not written by sleb-serve is kept.

    Args:
        manifest: the manifest file.
        repository: ``organisation/name``; created if it does not exist.
        revision: the branch to commit to, created if it does not exist; None for the main branch.
        private: make a new repository private.

    Returns:
        The name with the commit, for ``-m`` and `read_manifest`: ``hf://org/name@COMMIT/…``.

    Raises:
        SlebError: as for `prepared`; or the hub refuses; or `private` is set and the repository is
            already public.
    """
    upload = prepared(manifest, repository)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise SlebError(
                f"{repository} is there already and public, and nothing was uploaded; make it "
                f"private first, or leave `private` out"
            )
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        kept = {CARD} if _has_own_card(repository, revision) else set()
        done = api.create_commit(
            repository,
            operations=[
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in upload.files.items()
                if name not in kept
            ],
            commit_message="A removal manifest, by sleb-serve push",
            revision=revision,
        )
    except SlebError:
        raise
    except Exception as error:
        raise SlebError(f"cannot push to {repository}: {_why(error)}; push again") from error
    return str(HubFile(repository, done.oid))


def _has_own_card(repository: str, revision: str | None) -> bool:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card = Path(hf_hub_download(repository, CARD, revision=revision))
    except EntryNotFoundError:
        return False
    return not is_ours(card)


def _why(error: Exception) -> str:
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{why_not(error)} (log in with `hf auth login`, or set HF_TOKEN, to write there)"
    return why_not(error)
