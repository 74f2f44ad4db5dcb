"""Bind a manifest to another version of the model that its blocks were selected on.

A quantised or fine-tuned version has the same layers with different weights, so the same blocks can
be removed. The loss in quality was measured only on the original model: the manifest keeps its
losses, and results of `sleb-serve eval` do not carry over. Nor do repairs, which were fitted to the
original weights: a fold would replace the new model's weights, and a healed update would be added
to weights it was not trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from sleb_serve import __version__
from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.full_digest import Reading, not_told
from sleb_serve.checkpoint.hub import download_weights, open_checkpoint
from sleb_serve.checkpoint.safetensors import tensors_of
from sleb_serve.cut.likeness import check_alike, transformers_config
from sleb_serve.cut.servable import check_servable
from sleb_serve.cut.written import with_quantisation
from sleb_serve.errors import SlebError, first_line
from sleb_serve.manifest.binding import bind, check_model, revision_of
from sleb_serve.manifest.reader import MANIFEST
from sleb_serve.manifest.repository import is_repository
from sleb_serve.manifest.schema import Golden, Manifest, Origin
from sleb_serve.utils.extras import require
from sleb_serve.utils.outputs import claimed
from sleb_serve.utils.sizes import format_size

_PACKED = ("qweight", "weight_packed")
"""Tensor names that replace ``weight`` when several values are packed into a word."""
_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale")
"""Tensors that a quantised KV cache adds to attention."""


def rebind(
    manifest: Manifest,
    model: str | Path,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    origin: str | Path | None = None,
    drop_repair: bool = False,
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
    reading: Reading = not_told,
) -> Manifest:
    """Bind a manifest to a quantised or fine-tuned version of its model.

    Args:
        manifest: the blocks to remove.
        model: checkpoint folder or hub id of the other version.
        output: where to write the new manifest; None writes nothing.
        revision: of `model`, if it is a hub model.
        origin: the manifest's own model; None for the hub id that the manifest names.
        drop_repair: bind a repaired manifest without its repair, rather than refuse it.
        force: replace what is at `output`, be it of another kind.
        note: told what does not carry over.
        reading: told how many bytes of `model`'s weights are read for their full digest, of how
            many.

    Raises:
        SlebError: the models differ in more than the values and the format of their weights (the
            message names the field, the tensor or the shape), or the manifest is repaired.
    """
    require("rebind", "torch", "transformers", "accelerate", "psutil")
    output = None if output is None else Path(output)
    with claimed([] if output is None else [(output, MANIFEST)], force=force):
        result = _bound(manifest, str(model), revision, origin, drop_repair, note, reading)
        if output is not None:
            result = replace(result, folder=output.parent)
            result.write(output)
    return result


def _bound(
    manifest: Manifest,
    model: str,
    revision: str | None,
    origin: str | Path | None,
    drop_repair: bool,
    note: Callable[[str], None],
    reading: Reading,
) -> Manifest:
    manifest = _unrepaired(manifest, drop_repair, note)
    first, other = _models(manifest, model, revision, origin)
    _check_layers(first, other)
    _check_tensors(first, other)
    cut = manifest.pruning().cut
    check_servable(other, cut)
    # Layer names in the config must be expressible after renumbering.
    with_quantisation(other, other.config, cut)
    if manifest.evaluation:
        note("the evaluation is the first model's and is left out; run `sleb-serve eval`")
    before = manifest.model
    own = Origin(before.id, before.revision, before.config_sha256, before.weights_sha256)
    return replace(
        manifest,
        model=bind(model, other, full=True, reading=reading),
        golden=_golden(manifest, first, other, note),
        evaluation=MappingProxyType({}),
        # A manifest that was already rebound keeps the losses of the first model.
        rebound_from=manifest.rebound_from or own,
        created_by={name: version(name) for name in ("torch", "transformers")}
        | {"sleb_serve": __version__, **manifest.made_from},
        folder=None,
        source=None,
    )


def _unrepaired(manifest: Manifest, drop: bool, note: Callable[[str], None]) -> Manifest:
    if not manifest.repairs:
        return manifest
    kind = manifest.repairs[0].kind
    if not drop:
        raise SlebError(
            f"the manifest's repair ({kind}) was fitted to the weights of its own model, and does "
            f"not carry over to others; rebind the manifest that was repaired, or give "
            f"`drop_repair` to leave the repair out"
        )
    note(f"the repair ({kind}) is left out: it was fitted to the first model's weights")
    return replace(manifest, repairs=())


def _models(
    manifest: Manifest, model: str, revision: str | None, origin: str | Path | None
) -> tuple[Checkpoint, Checkpoint]:
    """Open both models, with their weights on this machine."""
    own = manifest.model
    known = open_checkpoint(model, revision)
    for what, expected, found in (
        ("architecture", own.architecture, known.architecture),
        ("number of decoder blocks", own.num_blocks, known.num_blocks),
    ):
        if expected != found:
            raise SlebError(
                f"{model} is not another form of {own.id}: {what} expected {expected}, found "
                f"{found}; select for {model} itself"
            )
    if origin is None and (own.revision is None or not is_repository(own.id)):
        raise SlebError(
            f"the manifest's own model, {own.id}, was a folder; give its folder as `origin`, so "
            f"that {model} can be compared with it"
        )
    origin = own.id if origin is None else str(origin)
    first = check_model(
        origin,
        manifest.pruning(),
        revision_of(origin, manifest, None),
        servable=False,
        fetch=True,
    )
    download_weights(model, revision)
    other = open_checkpoint(model, revision)
    quick = (other.config_sha256(), other.weights_sha256())
    if quick == (own.config_sha256, own.weights_sha256) and (
        own.full_sha256 is None or own.full_sha256 == other.full_sha256()
    ):
        raise SlebError(f"{model} is the manifest's own model; serve it with the manifest as it is")
    return first, other


def _check_layers(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse different layer types or shapes, as Transformers builds both models."""
    one, two = transformers_config(first.path), transformers_config(other.path)
    if one is None or two is None:
        raise SlebError(
            f"Transformers does not know {first.architecture}, so the two models' layers cannot be "
            f"compared; select for {other.path} itself"
        )
    try:
        check_alike(one, two, first.architecture)
    except SlebError as error:
        raise SlebError(f"{other.path} is not another form of {first.path}: {error}") from None


def _check_tensors(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse missing or extra block tensors and different shapes."""
    own, theirs = _block_tensors(first), _block_tensors(other)
    forms = other.is_quantised() and not first.is_quantised()
    modules = {name.rpartition(".")[0] for name in own}
    for name, shape in own.items():
        if name in theirs:
            # bitsandbytes packs a weight under its own name, with metadata tensors next to it.
            packed = forms and any(key.startswith(f"{name}.") for key in theirs)
            if theirs[name] != shape and not packed:
                _refuse(first, other, name, f"is {shape} there and {theirs[name]} here")
        elif not (forms and any(f"{name.rpartition('.')[0]}.{p}" in theirs for p in _PACKED)):
            _refuse(first, other, name, "is there and not here")
    for name in theirs.keys() - own.keys():
        holder, _, last = name.rpartition(".")
        held = holder in modules or holder.rpartition(".")[0] in modules or last in _SCALES
        if not (forms and held):
            _refuse(first, other, name, "is here and not there")


def _block_tensors(checkpoint: Checkpoint) -> Mapping[str, list[int]]:
    """Return the shapes of the blocks' tensors, by name from the layer number on."""
    return {
        name.removeprefix(checkpoint.layer_prefix): shape
        for file in checkpoint.weight_files()
        for name, (_, shape, _, _) in tensors_of(file).items()
        if checkpoint.block_of(name) is not None
    }


def _refuse(first: Checkpoint, other: Checkpoint, name: str, why: str) -> None:
    raise SlebError(
        f"{other.path} is not another form of {first.path}: the tensor {other.layer_prefix}{name} "
        f"{why}; select for {other.path} itself"
    )


def _golden(
    manifest: Manifest, first: Checkpoint, other: Checkpoint, note: Callable[[str], None]
) -> Golden | None:
    """Run the golden prompt on the other model; None if it cannot run here."""
    from sleb_serve.manifest.repair_file import WeightChanges
    from sleb_serve.models.golden import golden
    from sleb_serve.models.loading import load_model
    from sleb_serve.selection.memory import default_budget

    if manifest.golden is None:
        return None
    # Some quantised formats are run unquantised, so the first model's size counts.
    size = sum(file.stat().st_size for file in first.weight_files())
    found, why = None, f"it takes {format_size(size)}, more than the free memory"
    if size <= default_budget():
        try:
            model = load_model(other, "auto")
            found = golden(model, manifest.golden.tokens, manifest.blocks, WeightChanges({}))
            why = "it gives no finite log-probabilities"
        except Exception as error:
            # Missing kernels or packages can raise any library's own error.
            why = first_line(error)
    if found is None:
        note(
            f"no golden prompt: Transformers cannot run {other.path} here ({why}); `sleb-serve "
            f"probe` compares digests alone"
        )
    return found
