"""Write the generated parts of the documentation, each between two markers in its page.

Usage: generate.py [--check]

A part is made from one source: the command line's parsers, the manifest's JSON Schema, the table of
architectures and its records, the ledger of vLLM's names, the tests' table of ways to ask, the
packages' docstrings. With --check
nothing is written, and the exit code is 1 if a page is not as it would be written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RECORDS = ROOT / "benchmarks" / "records"

for folder in (DOCS, ROOT / "tests", ROOT / "benchmarks", ROOT / "plugins", ROOT):
    sys.path.insert(0, str(folder))

from gpu_parts import gpu, gpu_plan  # noqa: E402
from tree import tree  # noqa: E402
from ways_parts import ways  # noqa: E402

from sleb_serve.cli.main import parsers  # noqa: E402
from sleb_serve.compat.architectures import made, support, support_markdown  # noqa: E402
from sleb_serve.compat.vllm_versions import ledger  # noqa: E402
from sleb_serve.evaluation.report import describe  # noqa: E402
from sleb_serve.manifest.reader import read_manifest  # noqa: E402

_PART = re.compile(
    r"(?P<begin><!-- generated: (?P<name>[a-z-]+) -->\n).*?(?P<end><!-- end of \2 -->)", re.DOTALL
)


def pages() -> dict[Path, str]:
    """Return the up-to-date text of each page with a generated part."""
    found = {}
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if _PART.search(text):
            found[path] = _PART.sub(_filled, text)
    return found


def _filled(match: re.Match[str]) -> str:
    return f"{match['begin']}\n{PARTS[match['name']]().strip()}\n\n{match['end']}"


# The command line


def command_line() -> str:
    """Document every command with its options, from the parsers of `--help`."""
    parser, _ = parsers()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in commands._choices_actions}
    lines = ["| command | |", "|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {_plain(text)} |" for name, text in helps.items()]
    for name, command in commands.choices.items():
        lines += ["", f"## {name}", "", _sentence(helps[name]), ""]
        lines += ["```text", _usage(command), "```", ""]
        lines += _options(command)
        lines += _epilog(command.epilog or "")
    return "\n".join(lines)


def _usage(command: argparse.ArgumentParser) -> str:
    if command.usage:
        return command.usage % {"prog": command.prog}
    words = [command.prog]
    exclusive = [g for g in command._mutually_exclusive_groups if g.required]
    either = {id(action) for group in exclusive for action in group._group_actions}
    for action in command._actions:
        if not action.option_strings:
            words.append(f"[{_value(action)}]" if action.nargs == "?" else _value(action))
        elif action.required and id(action) not in either:
            words.append(f"{action.option_strings[0]} {_value(action)}")
    for group in exclusive:
        ways = (f"{action.option_strings[0]} {_value(action)}" for action in group._group_actions)
        words.append(f"({' | '.join(ways)})")
    return " ".join([*words, "[options]"]) if command.add_help else f"{command.prog} [options]"


def _options(command: argparse.ArgumentParser) -> Iterator[str]:
    for group in command._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        title = group.title or ""
        if actions and title not in ("options", "positional arguments"):
            yield from ("", f"**{title[0].upper()}{title[1:]}**", "")
        for action in actions:
            names = action.option_strings or [""]
            value = "" if action.nargs == 0 else _value(action)
            spelled = f"{', '.join(names)} {value}".strip()
            needed = " (required)" if action.required and action.option_strings else ""
            text = (action.help or "") % {**vars(action), "prog": command.prog}
            yield f"- `{spelled}`{needed}" + (f": {_plain(text)}" if text else "")
    yield ""


def _value(action: argparse.Action) -> str:
    if action.metavar is None and action.choices is not None:
        return "|".join(map(str, action.choices))
    shown = action.metavar or action.dest
    assert isinstance(shown, str)
    return f"[{shown}]" if action.nargs == "?" and action.option_strings else shown


def _epilog(text: str) -> Iterator[str]:
    head, _, rest = text.partition("\n\n")
    title, _, examples = head.partition("\n")
    if title == "examples:":
        yield from ("```sh", textwrap.dedent(examples).rstrip(), "```", "")
        text = rest
    for paragraph in filter(None, text.strip().split("\n\n")):
        yield from (_plain(paragraph.replace("\n", " ")), "")


def _plain(text: str) -> str:
    """Escape text for Markdown, and format options as code."""
    text = re.sub(r"([<>*\[\]])", r"\\\1", text)
    return re.sub(r"(?<![\w`-])(--?[a-z][\w-]*)", r"`\1`", text)


def _sentence(text: str) -> str:
    return f"{_plain(text[0].upper() + text[1:])}."


# The manifest


def manifest_keys() -> str:
    """Document the keys of a manifest, object by object, from its JSON Schema."""
    schema = json.loads((DOCS / "reference" / "manifest.schema.json").read_text(encoding="utf-8"))
    return "\n".join([*_table(schema, schema), *_objects(schema, schema)])


def _objects(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[str]:
    """Yield a section for each nested object."""
    for key, value in schema["properties"].items():
        inner = value.get("items", value)
        if "properties" in inner:
            kind = "each entry" if inner is not value else "an object"
            yield from ("", f"### {key}", "", f"{value['description']} Its keys ({kind}):", "")
            yield from _table(inner, root)
            yield from _objects(inner, root)


def _table(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | value | |"
    yield "|---|---|---|"
    for key, value in schema["properties"].items():
        needed = "" if key in schema.get("required", ()) else "optional; "
        if "properties" in value.get("items", value):
            text = f"see [below](#{key})"
        else:
            text = value.get("description", "")
        yield f"| `{key}` | {needed}{_type(value, root)} | {text} |"


def _type(value: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Describe a schema's type."""
    if "anyOf" in value:
        return " or ".join(_type(way, root) for way in value["anyOf"])
    for way in value.get("allOf", ()):
        if "$ref" in way and "type" not in value:
            return _type(way, root)
    if "$ref" in value:
        named = root["$defs"][value["$ref"].rpartition("/")[2]]
        return named.get("title") or _type(named, root)
    if "const" in value:
        return str(value["const"])
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    kinds = [value["type"]] if isinstance(value["type"], str) else value["type"]
    names = {"integer": "whole number", "array": "list"}
    text = " or ".join(names.get(kind, kind) for kind in kinds)
    if "minimum" in value and value["minimum"] > 0:
        text += f", at least {value['minimum']}"
    return text


# Architectures


def architectures() -> str:
    """Return the table of architectures, with the versions used."""
    date, versions = made()
    statuses = [row["status"] for row in support().values()]
    counted = ", ".join(f"{statuses.count(s)} {s}" for s in ("proven", "expected", "refused"))
    with_ = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{counted[0].upper()}{counted[1:]} ({date}; {with_}).\n\n{support_markdown()}"


def architecture_counts() -> str:
    """Return a line with the number of supported architectures."""
    statuses = [row["status"] for row in support().values()]
    return (
        f"{statuses.count('proven')} architectures are proven, {statuses.count('expected')} are "
        f"expected to work, {statuses.count('refused')} are refused."
    )


def proofs() -> str:
    """Return each architecture's difference from Transformers, from the records."""
    lines = (RECORDS / "architectures.jsonl").read_text(encoding="utf-8").splitlines()
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in map(json.loads, lines):
        by_name.setdefault(record["architecture"], []).append(record)
    known = support()
    rows = ["| architecture | kind | dense | pruned | greedy |", "|---|---|---|---|---|"]
    for name, records in sorted(by_name.items()):
        if known.get(name, {}).get("status") != "proven":
            continue
        # Refused removals have no difference.
        runs = [r for record in records for r in record["sets"].values() if "difference" in r]
        mean = " (mean)" if any(record["dtype"] != "float32" for record in records) else ""
        equal = all(run["greedy"] for run in runs)
        pooled = records[0]["kind"] == "pooling"
        worst = max(run["difference"] for run in runs)
        dense = max(record["dense"]["difference"] for record in records)
        rows.append(
            f"| {name} | {records[0]['kind']} | {dense:.0e}{mean} | {worst:.0e}{mean} | "
            f"{'' if pooled else 'equal' if equal else 'differs'} |"
        )
    return "\n".join(rows)


# vLLM


def vllm_versions() -> str:
    """Return the tested versions of vLLM, and the symbols that the plugin relies on."""
    known = ledger()
    tested: dict[str, dict[str, str]] = known["fingerprints"]
    versions = list(tested)
    lines = [f"Tested versions: {', '.join(versions)}.", ""]
    lines += ["| symbol of vLLM | used for | source in the tested versions |", "|---|---|---|"]
    for symbol, why in known["symbols"].items():
        forms = len({tested[version][symbol] for version in versions})
        state = "the same in all" if forms == 1 else f"{forms} forms"
        lines.append(f"| `{symbol}` | {_plain(why)} | {state} |")
    return "\n".join(lines)


def touched() -> str:
    """Return the names that the plugin replaces, wraps or adds in vLLM."""
    lines = ["| name in vLLM | what the plugin does | why | no longer needed with |"]
    lines.append("|---|---|---|---|")
    for name, entry in ledger()["touched"].items():
        names = ", ".join(f"`{part.strip()}`" for part in name.split(","))
        cells = (_plain(entry[key]) for key in ("what", "why", "ends"))
        lines.append(f"| {names} | {' | '.join(cells)} |")
    return "\n".join(lines)


# What commands print


def show() -> str:
    """Return the output of `sleb-serve show` for the demo's manifest."""
    manifest = read_manifest(RECORDS / "demo" / "manifest.json")
    return f"```text\n{describe(manifest)}\n```"


def python_script() -> str:
    """Return the Python script from a model to a server."""
    return f"```python\n{(DOCS / 'python_api.py').read_text(encoding='utf-8').strip()}\n```"


PARTS: Mapping[str, Callable[[], str]] = {
    "architecture-counts": architecture_counts,
    "architectures": architectures,
    "command-line": command_line,
    "gpu": gpu,
    "gpu-plan": gpu_plan,
    "manifest-keys": manifest_keys,
    "proofs": proofs,
    "python-script": python_script,
    "show": show,
    "touched": touched,
    "tree": tree,
    "vllm-versions": vllm_versions,
    "ways": ways,
}


def main() -> int:
    """Update stale pages, or report them."""
    check = "--check" in sys.argv[1:]
    stale = {
        path: text for path, text in pages().items() if path.read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        print(f"{'stale' if check else 'wrote'}: {path.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
