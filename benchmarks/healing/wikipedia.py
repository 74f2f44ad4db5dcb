"""Write Wikipedia articles to heal on, where a package index can be reached but no hub.

Usage: wikipedia.py TEXTS.jsonl. Writes the 103 whole articles in the test data of the gensim
package (CC BY-SA; 626,000 of SmolLM2's tokens). Needs `pip install mwparserfromhell`.
"""

from __future__ import annotations

import argparse
import bz2
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from pathlib import Path

from sleb_bench.files import write_texts

GENSIM = "gensim==4.4.0"
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHORTEST = 2000
"""Characters of markup below which a page is a stub."""
NOT_TEXT = re.compile(
    r"<ref[^>/]*/>|<ref.*?</ref>|<gallery.*?</gallery>|<math.*?</math>|<!--.*?-->", re.DOTALL
)
LINKS = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]")
TABLES = re.compile(r"\{\|.*?\|\}", re.DOTALL)
APPENDIX = re.compile(
    r"\n\s*(?:See also|References|External links|Notes|Further reading|Bibliography)\s*\n"
)
LIST_MARKS = ("|", "!", "*", "#", ":", ";")


def main() -> None:
    """Write the articles."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    write_texts(parser.parse_args().output, articles())


def articles() -> Iterator[str]:
    """Yield articles: title, blank line, prose."""
    from mwparserfromhell import parse  # type: ignore[import-not-found]

    for title, markup in pages():
        if len(markup) < SHORTEST or markup[:9].lower() == "#redirect":
            continue
        bare = TABLES.sub("", LINKS.sub("", NOT_TEXT.sub("", markup)))
        text = APPENDIX.split(parse(bare).strip_code(normalize=True, collapse=True))[0]
        lines = (line for line in text.splitlines() if not line.startswith(LIST_MARKS))
        prose = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
        yield f"{title}\n\n{prose}"


def pages() -> Iterator[tuple[str, str]]:
    """Yield the titles and the markup of gensim's pages."""
    with tempfile.TemporaryDirectory() as folder:
        download = ("download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", folder)
        subprocess.run([sys.executable, "-m", "pip", *download, GENSIM], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, bz2.open(archive.open(DUMP)) as dump:
            for _, element in ET.iterparse(dump):
                if element.tag.endswith("}page"):
                    yield (
                        element.findtext("{*}title") or "",
                        element.findtext("{*}revision/{*}text") or "",
                    )
                    element.clear()


if __name__ == "__main__":
    main()
