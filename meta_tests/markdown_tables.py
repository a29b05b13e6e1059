"""Tables in Markdown, and pages that carry tables which a program makes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

Row = list[str]


def markdown(header: Sequence[str], rows: Iterable[Row]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def share(value: float) -> str:
    """A share with three digits: 0, .013, 1; what is not quite 0 or 1 is not shown as such."""
    if 0 < value < 0.0005:
        return "< .001"
    if 0.9995 <= value < 1:
        return "> .999"
    return f"{value:.3f}".rstrip("0").rstrip(".").removeprefix("0") or "0"


def shares(values: Iterable[float]) -> str:
    """Shares in one cell."""
    return " / ".join(map(share, values))


def written(page: str) -> dict[str, str]:
    """The tables that a page carries between comments, by the name in the comment."""
    pattern = r"<!-- simulated: ([\w ]+) -->\n(.*?)\n<!-- end -->"
    return dict(re.findall(pattern, page, re.DOTALL))


def rewritten(page: str, tables: Mapping[str, str]) -> str:
    """The page with these tables in the place of those that it has."""
    for name, table in tables.items():
        begin = f"<!-- simulated: {name} -->\n"
        before, found, after = page.partition(begin)
        assert found, f"no place for {name}"
        page = before + begin + table + after[after.index("\n<!-- end -->") :]
    return page
