"""mkdocs hooks for links from pages to files of the repository.

Pages link to records, sources and images by relative path, as in the repository. The site has a
copy of each linked file under ``repository/``, and its pages link there. A linked folder becomes a
page that lists its files.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(?<=\]\()([^()\s#:]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every linked file of the repository."""
    for page in list(files.documentation_pages()):
        for target in _LINK.findall(page.content_string):
            path = _outside(page.src_uri, target)
            if path is not None:
                _add(path, files, config)
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Link to the copies."""

    def copied(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match[1])
        if path is None:
            return match[1]
        return posixpath.relpath(_uri(path), posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(copied, markdown)


def _outside(page: str, target: str) -> Path | None:
    """Return the repository file of a link, if it is outside the documentation."""
    named = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    path = ROOT / named
    is_page = named.startswith("docs/") and not named.endswith(".py")
    return None if is_page or named.startswith("..") or not path.exists() else path


def _uri(path: Path) -> str:
    """Return the copy's path in the site. Markdown is shown as text, because its links differ."""
    # mkdocs skips names that begin with a dot.
    name = f"repository/{path.relative_to(ROOT).as_posix().lstrip('.')}"
    if path.is_dir():
        return f"{name}/index.html"
    return f"{name}.txt" if path.suffix in (".md", ".py") or not path.suffix else name


def _add(path: Path, files: Files, config: MkDocsConfig) -> None:
    uri = _uri(path)
    if files.get_file_from_path(uri) is not None:
        return
    if not path.is_dir():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
        return
    inside = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc")
    for file in inside:
        _add(file, files, config)
    folder = posixpath.dirname(uri)
    links = "\n".join(
        f'<li><a href="{html.escape(posixpath.relpath(_uri(file), folder))}">'
        f"{html.escape(file.relative_to(path).as_posix())}</a></li>"
        for file in inside
    )
    title = html.escape(path.relative_to(ROOT).as_posix())
    text = f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1><ul>{links}"
    files.append(File.generated(config, uri, content=text))
