"""The documentation's pages as tests see them: their blocks of code, and what becomes of each.

    for block in blocks("docs/tutorial.md"):
        block.language, block.mark, block.text

A comment in the line before a block, which neither the site nor GitHub shows, says what it is:

    <!-- file: train.py -->      saved under that name
    <!-- run -->                 commands that are run
    <!-- not run: REASON -->     Python that cannot be

Python without a mark is run, each page's blocks as one script.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.ranks import ROOT

SITE = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
ALL = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *SITE]

_BLOCK = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        mark: the comment before it, or "".
        language: what the fence names.
        text: its lines.
    """

    mark: str
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name it is saved under, if any."""
        kind, _, name = self.mark.partition(": ")
        return name if kind == "file" else None


def read(page: str) -> str:
    """The page's text."""
    return (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    """The page's fenced blocks in their order."""
    return [Block(mark, language, text) for mark, language, text in _BLOCK.findall(read(page))]


def script(page: str) -> str:
    """The page's Python without a mark, as one script."""
    return "\n\n".join(block.text for block in blocks(page) if block.language == "python" and not block.mark)


def files(page: str) -> list[tuple[str, str]]:
    """(name, text) of what the page tells to save; a name comes again where the page changes the file."""
    return [(block.file, block.text) for block in blocks(page) if block.file is not None]
