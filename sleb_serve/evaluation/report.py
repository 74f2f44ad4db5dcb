"""Readable summaries of manifests and evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sleb_serve.errors import SlebError
from sleb_serve.evaluation.files import results_of
from sleb_serve.evaluation.picture import accuracy
from sleb_serve.evaluation.verdict import VERDICTS, Verdict, verdict
from sleb_serve.manifest.schema import Manifest, Repair
from sleb_serve.utils import strict_json

_BAR = 40


def describe(manifest: Manifest) -> str:
    """Describe the manifest in about twenty lines."""
    model, pruning = manifest.model, manifest.pruning()
    share = 100 * len(manifest.removed) / model.num_blocks
    digests = "quick digest" if model.full_sha256 is None else "quick digest; full one recorded"
    lines = [
        f"model        {model.id}{f' at {model.revision}' if model.revision else ''}",
        f"             {model.architecture}, {model.num_blocks} blocks, weights "
        f"{model.weights_sha256[:8]} ({digests})",
        f"pruned       {len(manifest.removed)} of {model.num_blocks} blocks ({share:.1f} %), "
        f"{pruning.num_kept} kept: {pruning.tag}",
        f"blocks       {_block_map(manifest)}",
    ]
    if manifest.rebound_from is not None:
        first = manifest.rebound_from
        at = f" at {first.revision}" if first.revision else ""
        lines.append(
            f"rebound      from {first.id}{at}, weights {first.weights_sha256[:8]} (quick digest): "
            f"blocks were selected there, and losses are that model's"
        )
    if manifest.source is not None:
        lines.append(f"read from    {manifest.source}")
    if manifest.calibration is not None:
        text = manifest.calibration
        source = text.source + (f" {text.split}" if text.split else "")
        rows = f", {text.rows} rows" if text.rows else ""
        lines.append(
            f"calibration  {source}: {text.sequences} sequences of {text.sequence_length} tokens"
            f"{rows}, seed {text.seed}"
        )
    if manifest.selection is not None:
        how = manifest.selection
        against = ", divergence from the dense model" if how.objective == "kl" else ""
        lines.append(
            f"selection    {how.method}, the first {how.early_barrier} and last {how.late_barrier} "
            f"kept, {how.dtype}{against}"
        )
        lines += _stability(manifest, how.samples)
    lines += [_repaired(repair) for repair in manifest.repairs]
    lines += _evaluated(manifest)
    if manifest.created_by:
        made = ", ".join(f"{name} {number}" for name, number in manifest.created_by.items())
        lines.append(f"created by   {made}")
    return "\n".join([*lines, "", *_curve(manifest)])


def evaluation_table(report: Mapping[str, Any]) -> str:
    """Format an evaluation's report as a table with a row for each number of blocks removed."""
    texts = list(report["results"][0]["perplexity"])
    tasks = list(report["results"][0]["tasks"])
    agreeing = [text for text in texts if any(text in e["agreement"] for e in report["results"])]
    answering = any(e.get("answers") for e in report["results"])
    head = ["blocks", "ideal", *(f"ppl {Path(text).name}" for text in texts)]
    head += [f"same {Path(text).name}" for text in agreeing]
    head += [*(["same answers"] if answering else []), *tasks]
    verdicts = [verdict(entry, report["results"]) or "" for entry in report["results"]]
    head += ["mean"] if len(tasks) > 1 else []
    rows = [[*head, *(["verdict"] if any(verdicts) else [])]]
    for entry, word in zip(report["results"], verdicts, strict=True):
        row = [str(entry["blocks"]), f"{entry['ideal_speedup']:.2f}x"]
        row += [f"{entry['perplexity'][text]:.2f}" for text in texts]
        shares = [entry["agreement"].get(text) for text in agreeing]
        shares += [entry.get("answers", {}).get("tokens")] if answering else []
        row += ["" if share is None else f"{share:.1%}" for share in shares]
        pairs = [accuracy(entry["tasks"][task]) for task in tasks]
        row += [f"{value:.3f} ±{error:.3f}" for value, error in pairs]
        row += [f"{fmean(value for value, _ in pairs):.3f}"] if len(tasks) > 1 else []
        rows.append([*row, *([word] if any(verdicts) else [])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _repaired(repair: Repair) -> str:
    """Describe a repair in one line."""
    about = f"{repair.kind} of {repair.blocks} removals"
    if repair.training is not None:
        trained = repair.training
        judged = ", ".join(f"{value:.2f} {which}" for which, value in trained.perplexity.items())
        about += (
            f", rank {trained.rank}, {trained.tokens:,} tokens of {', '.join(trained.texts)}; "
            f"held-out perplexity {judged}"
        )
    else:
        about += f", fitted on {repair.sequences} sequences"
        about += "" if repair.loss is None else f", loss {repair.loss:.4f} on them"
    return f"repair       {about}: {repair.file}"


def _evaluated(manifest: Manifest) -> list[str]:
    """Describe the pruned models' results and verdicts, a line each."""
    return [
        f"evaluated    {word}: {entry['blocks']} removed ({backend}): {', '.join(_measures(entry))}"
        for backend, entry, word in _judged(manifest)
        if backend.isprintable()
    ]


def recorded_verdict(manifest: Manifest, blocks: int) -> Verdict | None:
    """Return the worst verdict on so many removed blocks in the manifest; None without any."""
    found = {word for _, entry, word in _judged(manifest) if entry["blocks"] == blocks}
    return next((word for word in reversed(VERDICTS) if word in found), None)


def _judged(manifest: Manifest) -> Iterator[tuple[str, Mapping[str, Any], Verdict]]:
    """Yield the evaluation's backend, the entry and the verdict of each judged pruned model."""
    for backend, report in manifest.evaluation.items():
        try:
            found = results_of(strict_json.any_object(report, "evaluation"))
        except SlebError:
            continue  # ignore entries of other programs
        entries = [{"blocks": blocks, **entry} for (blocks, _), entry in found.items()]
        for entry in entries:
            word = verdict(entry, entries)
            if word is not None:
                yield backend, entry, word


def _measures(entry: Mapping[str, Any]) -> Iterator[str]:
    for text, value in entry["perplexity"].items():
        name = Path(text).name
        same = entry["agreement"].get(text)
        if name.isprintable():
            yield f"perplexity {value:.2f} on {name}" + (
                "" if same is None else f", {same:.1%} of next tokens as dense"
            )
    if "tokens" in entry["answers"]:
        yield f"{entry['answers']['tokens']:.1%} of the dense model's answers"
    if entry["tasks"]:
        mean = fmean(accuracy(values)[0] for values in entry["tasks"].values())
        yield f"mean accuracy {mean:.3f} on {len(entry['tasks'])} tasks"


def _stability(manifest: Manifest, samples: Sequence[Sequence[int]]) -> list[str]:
    """Describe how many blocks the samples share, and which are in all of them."""
    if not samples:
        return []
    own = set(manifest.blocks)
    shared = [len(own & set(sample[: len(own)])) for sample in samples]
    always = own.intersection(*(sample[: len(own)] for sample in samples))
    return [
        f"stability    {len(samples)} other samples of the text remove {_listed(shared)} of these "
        f"{len(own)} blocks; all remove {_listed(sorted(always))}"
    ]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _block_map(manifest: Manifest) -> str:
    removed = set(manifest.blocks)
    return "".join("·" if i in removed else "█" for i in range(manifest.model.num_blocks))


def _curve(manifest: Manifest) -> list[str]:
    rows = [("0", "dense", manifest.dense_loss)]
    rows += [(str(i), str(r.block), r.loss) for i, r in enumerate(manifest.removed, 1)]
    losses = [loss for _, _, loss in rows if loss is not None]
    low, high = (min(losses), max(losses)) if losses else (0.0, 0.0)
    lines = ["removed  block     loss  perplexity"]
    for count, block, loss in rows:
        if loss is None:
            lines.append(f"{count:>7}  {block:>5}        -           -")
            continue
        perplexity = manifest.perplexity(loss)
        shown = f"{perplexity:>10.2f}" if perplexity is not None else f"{'-':>10}"
        bar = "▪" * round(_BAR * (loss - low) / (high - low)) if high > low else ""
        lines.append(f"{count:>7}  {block:>5}  {loss:>7.4f}  {shown}  {bar}".rstrip())
    return lines
