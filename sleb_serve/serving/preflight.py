"""Checks, without a GPU, that a manifest can be served with a model, and the savings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sleb_serve.checkpoint.checkpoint import Checkpoint
from sleb_serve.checkpoint.full_digest import Reading, not_told
from sleb_serve.checkpoint.hub import open_checkpoint
from sleb_serve.compat.architectures import status, why_refused
from sleb_serve.compat.vllm_versions import vllm_version
from sleb_serve.cut.likeness import not_compared
from sleb_serve.cut.servable import compare_layers
from sleb_serve.errors import SlebError
from sleb_serve.manifest.binding import check_model, compare_full, compare_weights, revision_of
from sleb_serve.manifest.pruning import Pruning
from sleb_serve.manifest.schema import Manifest
from sleb_serve.roofline.cache import caches_of
from sleb_serve.roofline.gpu import MEMORY_USED, Gpu
from sleb_serve.roofline.model import kv_tokens
from sleb_serve.roofline.sizes import derived
from sleb_serve.serving.command import check_plugin, served_name
from sleb_serve.utils.sizes import format_size
from sleb_serve.utils.terminal import one_line

OK, WARNING, FAILED, UNKNOWN = "ok", "warning", "failed", "unknown"


@dataclass(frozen=True)
class Finding:
    """One check and its result: `OK`, `WARNING`, `FAILED`, or `UNKNOWN` on this machine."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class CheckReport:
    """All findings and sizes.

    ``sizes`` has the bytes of weights (``weights_bytes``: dense, pruned), the tokens of KV cache on
    the given GPUs (``kv_cache_tokens``: dense, pruned) and the ``shards_not_read``; None if
    unknown.
    """

    findings: tuple[Finding, ...]
    sizes: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Return whether no check failed."""
        return all(finding.status != FAILED for finding in self.findings)

    def to_text(self) -> str:
        """Return one line per finding."""
        width = max(len(finding.name) for finding in self.findings)
        return "\n".join(
            f"{finding.status:8} {finding.name:{width}}  {finding.detail}"
            for finding in self.findings
        )


def check(
    model: str,
    manifest: Manifest,
    gpu: Gpu | None,
    tp: int,
    revision: str | None = None,
    *,
    full: bool = False,
    reading: Reading = not_told,
) -> CheckReport:
    """Check `manifest` against `model` and this machine's vLLM.

    Args:
        model: checkpoint folder or hub id.
        manifest: the manifest, cut to the served prefix.
        gpu: GPU for computing the KV cache; None to skip this.
        tp: number of GPUs that share every matrix.
        revision: of a hub model; None for the manifest's.
        full: read all of the weights, and compare their full digest.
        reading: told how far that is, in bytes.

    Raises:
        SlebError: there is no such model; or `full`, and the manifest holds no full digest, or the
            weights are not on this machine.
    """
    pruning = manifest.pruning(full=full)
    revision = revision_of(model, manifest, revision)
    checkpoint = open_checkpoint(model, revision)
    sizes: dict[str, Any] = {
        "weights_bytes": None,
        "kv_cache_tokens": None,
        "shards_not_read": None,
    }
    findings = [
        _asked("model", lambda: _model(model, manifest, revision)),
        _architecture(pruning.architecture),
        _layers(checkpoint, pruning),
        _vllm(),
        _heads(checkpoint, tp),
    ]
    if findings[0].status == OK:
        if full:
            findings.insert(1, _full(model, checkpoint, manifest, reading))
        findings += _memory(checkpoint, pruning, sizes)
        if gpu is not None:
            findings.append(_kv_cache(checkpoint, pruning, gpu, tp, sizes))
    findings.append(
        Finding(
            "cache keys",
            OK,
            f"served as {served_name(model, pruning)}; the removed blocks and digests are part of "
            f"the model's config, which torch.compile's cache key covers",
        )
    )
    return CheckReport(tuple(findings), sizes)


def _asked(name: str, question: Callable[[], str]) -> Finding:
    try:
        return Finding(name, OK, question())
    except SlebError as error:
        return Finding(name, FAILED, one_line(str(error)))


def _model(model: str, manifest: Manifest, revision: str | None) -> str:
    pruning, own = manifest.pruning(), manifest.model
    checkpoint = check_model(model, pruning, revision, servable=False)
    compared = compare_weights(model, checkpoint, pruning)
    match = "config and weights match (quick digest, of samples)"
    if not compared:
        found = checkpoint.path.name
        if model == own.id and own.revision is not None and found != own.revision:
            raise SlebError(
                f"{model} has changed since the selection: commit expected {own.revision}, found "
                f"{found}, whose weights are not on this machine, so they cannot be compared; omit "
                "`revision`"
            )
        match = "config matches; weights are not on this machine, the server compares them"
    repaired = (
        "" if pruning.repair is None else f", repaired ({pruning.repair.kind}), sidecar there"
    )
    kept = f"{pruning.num_kept} of {pruning.num_blocks} blocks stay"
    return f"{kept}{repaired}; {match}"


def _full(model: str, checkpoint: Checkpoint, manifest: Manifest, reading: Reading) -> Finding:
    """Whether every byte of the weights is the manifest's model's."""
    pruning = manifest.pruning()
    expected: list[str | None] = [*manifest.full_digests()]
    which = "all blocks"
    if _lacks(checkpoint):
        # Shards of removed blocks alone are not downloaded to be served.
        if _lacks(checkpoint, frozenset(pruning.removed)):
            raise SlebError(
                f"the weights of {model} are not on this machine, so the full digest cannot be "
                "computed; download the model first (`hf download`)"
            )
        which = "the blocks that stay; weights of removed ones are not on this machine"
        for block in pruning.removed:
            expected[block + 1] = None

    def question() -> str:
        compare_full(model, checkpoint, expected, reading)
        return f"every byte of the weights is as in the manifest's model: {which}"

    return _asked("full digest", question)


def _lacks(checkpoint: Checkpoint, without: frozenset[int] = frozenset()) -> bool:
    try:
        checkpoint.weight_files(without)
    except SlebError:
        return True
    return False


def _architecture(name: str) -> Finding:
    kind, reason = status(name)
    if kind == "proven":
        return Finding("architecture", OK, f"{name} is proven against Transformers")
    if kind == "expected":
        return Finding("architecture", WARNING, f"{name} is not proven: {reason}")
    return Finding("architecture", FAILED, why_refused(name))


def _layers(checkpoint: Checkpoint, pruning: Pruning) -> Finding:
    """Check that the kept layers equal the dense model's."""
    try:
        compared = compare_layers(checkpoint, pruning.cut)
    except SlebError as error:
        return Finding("layers", FAILED, one_line(str(error)))
    if not compared:
        return Finding("layers", WARNING, not_compared())
    return Finding("layers", OK, "the kept layers equal the dense model's")


def _vllm() -> Finding:
    found = vllm_version()
    if found is None:
        return Finding(
            "vLLM", UNKNOWN, "not installed here; the server checks its version at start"
        )

    def question() -> str:
        check_plugin()
        return f"{found} is tested, and would load the plugin"

    return _asked("vLLM", question)


def _heads(checkpoint: Checkpoint, tp: int) -> Finding:
    config = checkpoint.decoder_config
    heads = config.get("num_attention_heads", config.get("n_head"))
    if not isinstance(heads, int):
        return Finding("tensor parallelism", UNKNOWN, "config.json does not say how many heads")
    if tp < 1 or heads % tp:
        return Finding(
            "tensor parallelism", FAILED, f"{heads} attention heads cannot be shared by {tp} GPUs"
        )
    return Finding("tensor parallelism", OK, f"{heads} attention heads on {tp} GPU(s)")


def _memory(checkpoint: Checkpoint, pruning: Pruning, sizes: dict[str, Any]) -> list[Finding]:
    removed = frozenset(pruning.removed)
    try:
        split = checkpoint.tensor_bytes(removed)
    except SlebError:
        return [Finding("weights", UNKNOWN, "not on this machine")]
    if split is None:
        return [Finding("weights", UNKNOWN, "a checkpoint in PyTorch's own format is read whole")]
    kept, gone = split
    sizes["weights_bytes"] = {"dense": kept + gone, "pruned": kept}
    shards = sorted(checkpoint.unneeded_files(removed))
    sizes["shards_not_read"] = shards
    detail = f"{format_size(kept)} of {format_size(kept + gone)} are read"
    if shards:
        detail += f"; not even opened: {', '.join(shards)}"
    return [Finding("weights", OK, detail)]


def _kv_cache(
    checkpoint: Checkpoint, pruning: Pruning, gpu: Gpu, tp: int, sizes: dict[str, Any]
) -> Finding:
    name = f"KV cache on {tp} x {gpu.name}"
    weights = sizes["weights_bytes"]
    try:
        caches = caches_of(derived(checkpoint))
    except SlebError as error:
        return Finding(name, UNKNOWN, one_line(str(error)))
    if weights is None:
        return Finding(name, UNKNOWN, "the weights' size is not known")
    memory = gpu.memory * MEMORY_USED * tp
    tokens = {
        "dense": kv_tokens(memory - weights["dense"], caches),
        "pruned": kv_tokens(
            memory - weights["pruned"], [caches[block] for block in pruning.cut.kept]
        ),
    }
    sizes["kv_cache_tokens"] = tokens
    if not tokens["pruned"]:
        return Finding(name, FAILED, "the weights do not fit, even pruned; use more or larger GPUs")
    if not tokens["dense"]:
        return Finding(name, OK, f"{tokens['pruned']} tokens; dense it does not fit at all")
    gain = tokens["pruned"] / tokens["dense"]
    detail = (
        f"{tokens['dense']} tokens dense, {tokens['pruned']} pruned ({gain:.2f} times); estimate"
    )
    return Finding(name, OK, detail)
