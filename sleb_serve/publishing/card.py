"""A manifest's model card: removed blocks, quality, serving instructions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.evaluation.report import describe, evaluation_table
from sleb_serve.manifest.schema import Manifest

LIBRARY = "sleb-serve"
"""Library name in a card's front matter, which identifies our cards."""
_TAGS = ("sleb", "depth-pruning", "vllm")
_REPAIRS: Mapping[str, str] = {
    "fold": "The weights before each gap are fitted in closed form to the removed blocks.",
    "heal": "Low-rank updates of the kept weights are trained so that the pruned model predicts "
    "like the dense one. The server adds them to the weights at load time.",
}


def model_card(manifest: Manifest, repository: str) -> str:
    """Return a repository's README.md in Markdown with YAML front matter.

    Args:
        manifest: the manifest with all removals.
        repository: ``organisation/name``.
    """
    from huggingface_hub import ModelCardData

    repair = manifest.repair
    data = ModelCardData(
        base_model=_base_model(manifest),
        library_name=LIBRARY,
        tags=[*_TAGS, *([] if repair is None else [repair.kind])],
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_body(manifest, repository))


def is_ours(card: Path) -> bool:
    """Return whether a README.md was written by `model_card`."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(card)
    except (yaml.YAMLError, ValueError):
        return False
    return found is not None and bool(found.get("library_name") == LIBRARY)


def _base_model(manifest: Manifest) -> str | None:
    """Return the model's hub id; None for a folder."""
    return manifest.model.id if manifest.model.revision is not None else None


def _body(manifest: Manifest, repository: str) -> Iterator[str]:
    model, pruning = manifest.model, manifest.pruning()
    served = _base_model(manifest) or f"./{model.id}"
    yield f"# {model.id} without {len(pruning.removed)} of its {model.num_blocks} blocks"
    yield ""
    yield (
        f"A removal manifest: it names {len(pruning.removed)} decoder blocks of `{model.id}` that "
        f"the model does without. The model's own weights are not in this repository; a server "
        f"takes them from the model, and does not load those of the removed blocks."
    )
    yield from ("", "## Serve", "", "```sh", "pip install 'sleb-serve[cuda]'")
    yield f"sleb-serve serve {served} -m {repository}"
    if len(pruning.removed) > 1 and not manifest.repairs:
        yield f"sleb-serve serve {served} -m {repository} --blocks 1    # fewer blocks removed"
    yield "```"
    yield ""
    yield (
        f"Name a commit (`-m hf://{repository}@COMMIT`) to pin the current content. A model is "
        "refused if its config or weights do not match the manifest's digests."
    )
    yield from ("", "## What is removed", "", "```text", describe(manifest), "```")
    yield from ("", "## Repair", "")
    if manifest.repair is None:
        yield "None: the kept blocks have the model's own weights."
    else:
        yield f"`{manifest.repair.kind}`. {_REPAIRS[manifest.repair.kind]}"
    yield from ("", "## Quality", "")
    yield from _quality(manifest, served, repository)


def _quality(manifest: Manifest, served: str, repository: str) -> Iterator[str]:
    tables = list(_tables(manifest.evaluation))
    for backend, table in tables:
        yield from (f"By `sleb-serve eval`, backend `{backend}`:", "", "```text", table, "```", "")
    if not tables:
        yield "Not evaluated. To measure it:"
        command = f"sleb-serve eval {served} -m {repository} --perplexity wikitext2 --tasks"
        yield from ("", "```sh", command, "```", "")


def _tables(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return the results of `sleb-serve eval --write-back`; a manifest may have others."""
    for backend in ("hf", "vllm"):
        if backend in evaluation:
            try:
                yield backend, evaluation_table(evaluation[backend])
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise SlebError(
                    f"evaluation.{backend} is no result of `sleb-serve eval`; evaluate again with "
                    f"--write-back, or remove it from the manifest"
                ) from error
