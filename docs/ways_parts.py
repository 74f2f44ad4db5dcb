"""The table of ways to ask a server for a model, as the tests try them."""

from __future__ import annotations

from ways import GROUPS, SERVED, Way

_TITLES = {
    "formats": "Formats and loading",
    "overrides": "The config",
    "models": "The model's place",
    "classes": "What vLLM builds",
    "files": "Files of options",
    "variables": "Variables",
}


def ways() -> str:
    """What comes of each way, given to `sleb-serve serve` and added to the printed command."""
    lines = ["| beside a right command | `sleb-serve serve` | the printed command |"]
    lines.append("|---|---|---|")
    for name, group in GROUPS.items():
        lines.append(f"| **{_TITLES[name]}** | | |")
        lines += [f"| {_shown(way)} | {_end(way.serve)} | {_end(way.printed)} |" for way in group]
    return "\n".join(lines)


def _shown(way: Way) -> str:
    variables = (f"`{name}={value}`" for name, value in way.environment.items())
    arguments = (f"`{way.arguments}`",) if way.arguments else ()
    lines = (f"`{line}`" for line in way.file.splitlines())
    held = f", with {', '.join(lines)}" if way.file else ""
    return f"{' '.join([*variables, *arguments])}{held}".replace("|", "\\|")


def _end(outcome: str) -> str:
    return "the pruned model" if outcome == SERVED else f"refused: {outcome}"
