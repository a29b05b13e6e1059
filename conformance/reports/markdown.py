"""Markdown that no text of an implementation can break out of, and that fits a comment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

LIMIT = 60_000
"""Bytes of a summary: a comment on GitHub takes 65,536 characters."""

LINES_TRIED = (40, 20, 10, 5, 2, 0)
"""How many lines of one kind are shown: the first number with which the whole fits."""

WIDTH = 200
"""Characters of one text."""


def code(text: str, width: int = WIDTH) -> str:
    """A text as code: nothing in it is markup, a link, a mention or a reference."""
    line = _one_line(text, width).replace("`", "'")
    return f"`{line}`" if line else "*(empty)*"


def escaped(text: str, width: int = WIDTH) -> str:
    """A text as text: nothing in it is markup, a mention or a reference."""
    line = _one_line(text, width).replace("&", "&amp;").replace("<", "&lt;")
    line = re.sub(r"([\\`*_\[\]|~!])", r"\\\1", line)
    # Mentions and references are found in what is shown, so that a backslash does not stop them.
    return re.sub(r"@(?=\w)|#(?=\d)", "\\g<0>\u200b", line)


def cell(text: str) -> str:
    """Markdown inside a table: a bar would begin another cell, in code too."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> list[str]:
    """Lines of a table whose last ``right`` columns hold numbers; its cells are Markdown."""
    lines = [*["---"] * (len(heads) - right), *["---:"] * right]
    return [f"| {' | '.join(map(cell, row))} |" for row in (heads, lines, *rows)]


def bullets(lines: Iterable[str], most: int) -> list[str]:
    """A list of ``most`` lines, and how many more there are."""
    lines = list(lines)
    shown = [f"- {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"- … and {len(lines) - most} more" if most else f"- {len(lines)} in all")
    return shown


def some(ids: Sequence[str], most: int = 4) -> str:
    """The first few ids as code, and how many more there are."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(code(id) for id in ids[:most]) + more


def fitting(text: Callable[[int], str]) -> str:
    """The longest of ``text(most)`` that fits a comment; cut off where none does."""
    for most in LINES_TRIED:
        made = text(most)
        if len(made.encode("utf-8", "replace")) <= LIMIT:
            return made
    kept = made.encode("utf-8", "replace")[: LIMIT - 100].decode("utf-8", "ignore")
    return kept.rpartition("\n")[0] + "\n\n… the rest is in report.html.\n"


def _one_line(text: str, width: int) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: width - 1] + "…"
