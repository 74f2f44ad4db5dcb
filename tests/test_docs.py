"""The documentation: generated parts, links, the tree."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from sleb_serve.cli.main import COMMANDS

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


# Generated parts


@pytest.fixture(scope="module")
def generated() -> dict[Path, str]:
    """Each page with generated parts, as docs/generate.py would write it."""
    found: dict[Path, str] = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
    return found


def test_the_committed_pages_are_those_that_the_script_writes(generated: dict[Path, str]) -> None:
    marked = {page for page in PAGES if "<!-- generated: " in page.read_text(encoding="utf-8")}
    assert set(generated) == marked
    stale = [
        page.relative_to(ROOT).as_posix()
        for page, text in generated.items()
        if page.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"run `python docs/generate.py`: {stale} would change"


def test_every_option_of_every_command_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    from sleb_serve.cli.main import main

    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", page, flags=re.M | re.S))
    names = [*(command.name for command in COMMANDS), "serve"]
    assert set(sections) == {*names, "lm-eval"}
    for name in names:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        # As argparse prints them: an option begins its line, or stands after a comma.
        options = re.findall(r"(?:^  |, )(--?[a-zA-Z][\w-]*)", capsys.readouterr().out, flags=re.M)
        assert len(options) > 1
        for option in set(options) - {"-h", "--help"}:
            assert re.search(rf"`[^`\n]*(?<![\w-]){option}(?![\w-])", sections[name]), option


# Links


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in re.findall(r"\]\(([^()\s]+)\)", prose(page)):
            if not re.match(r"[a-z]+:", target):
                yield page, target


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as mkdocs and code hosts make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    plain = (re.sub(r"[^\w\s-]", "", title.replace("\\", "")).strip().lower() for title in titles)
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_inside_the_repository_resolves(page: Path) -> None:
    broken = []
    for source, target in links():
        if source != page:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        there = file.exists() and file.is_relative_to(ROOT)
        if not there or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_links_are_found_and_every_page_is_in_the_navigation() -> None:
    assert len(list(links())) > 100
    listed = set(
        re.findall(
            r"- (?:[\w ]+: )?([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
        )
    )
    assert listed == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_the_readme_is_short_and_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for command in ("demo", "test"):
        assert f"\nmake {command} " in text
        assert re.search(rf"^{command}\b.*:", (ROOT / "Makefile").read_text(), flags=re.M)


# The tree


def test_the_tree_names_every_package_and_only_what_is_there() -> None:
    page = (DOCS / "contributing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"generated: tree -->\s*```text\n(.*?)```", page, flags=re.S)
    # A line that begins with blanks goes on with the description above it.
    named = set(re.findall(r"^(\S+?)/? ", block, flags=re.M))
    assert not [name for name in named if not (ROOT / name).exists()]
    packages = {
        file.parent.relative_to(ROOT).as_posix()
        for base in ("sleb_serve", "plugins", "benchmarks")
        for file in (ROOT / base).rglob("__init__.py")
    }
    folders = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "benchmarks").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert packages | folders <= named
