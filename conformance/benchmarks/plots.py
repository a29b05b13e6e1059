"""Plots of records as SVG: the roofline, and time against tokens. Needs matplotlib, and no display.

The same records give the same bytes with the same matplotlib: no date, and ids from a fixed salt.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from conformance.benchmarks.recording import Record, short
from conformance.benchmarks.rows import TIMED, Row, intensity

SETTINGS = {
    "svg.hashsalt": "conformance",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MARKERS = "osD^vPX*<>"

Series = dict[str, list[tuple[float, float]]]
"""Points by the name of a line."""


def timed(record: Record) -> list[Row]:
    """The rows with times."""
    return [row for row in record["rows"] if row["status"] == TIMED]


def roofline_points(records: Sequence[Record]) -> Series:
    """(operations a byte, TFLOP/s) of each row by implementation."""
    return {
        short(record["implementation"]): [(intensity(r), r["tflops"]) for r in timed(record)]
        for record in records
    }


def time_lines(records: Sequence[Record], pattern: str) -> Series:
    """(tokens, milliseconds) by implementation, of rows whose name matches ``pattern``.

    The pattern's only group is the number of tokens. Compressed experts have a line of their own.
    """
    lines: Series = {}
    for record in records:
        for row in timed(record):
            found = re.fullmatch(pattern, row["name"])
            if found:
                compressed = row["contract"] == "shared_core_block"
                name = short(record["implementation"]) + (" (compressed)" if compressed else "")
                point = (float(found[1]), 1e3 * row["seconds"]["median"])
                lines.setdefault(name, []).append(point)
    return {name: sorted(points) for name, points in lines.items()}


def roofline(records: Sequence[Record], title: str) -> str:
    """The roofline of a machine with every row as a point, as SVG.

    The ceilings are the highest of all runs: what is measured while others compute is none.
    """
    ceilings = [each for record in records for each in record["ceilings"].values()]
    product = max(speed for each in ceilings for speed in each["product"].values()) / 1e12
    copy = max(each["copy"] for each in ceilings) / 1e12
    points = roofline_points(records)
    every = [x for line in points.values() for x, _ in line]
    left, right = min(every) / 2, max([*every, product / copy]) * 2

    def draw(axes: Any) -> None:
        ridge = product / copy
        axes.plot([left, ridge, right], [left * copy, product, product], "k-", linewidth=1)
        axes.annotate(f"copy {1e3 * copy:,.4g} GB/s", (left * 1.1, left * copy * 5))
        axes.annotate(f"product {product:,.3g} TFLOP/s", (ridge, product * 1.15))
        for (name, line), marker in zip(points.items(), MARKERS * 9):
            axes.plot(*zip(*line), marker, label=name, markersize=4, alpha=0.8)
        axes.set(xlabel="operations a byte, from the shape", ylabel="TFLOP/s")

    return drawn(draw, title)


def times(lines: Series, title: str, tokens: str) -> str:
    """Time against tokens, a line an implementation, as SVG."""

    def draw(axes: Any) -> None:
        for (name, line), marker in zip(lines.items(), MARKERS * 9):
            axes.plot(*zip(*line), f"{marker}-", label=name, markersize=4, linewidth=1)
        at = sorted({x for line in lines.values() for x, _ in line})
        axes.set_xticks(at, [f"{x:,.0f}" for x in at], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set(xlabel=tokens, ylabel="ms")

    return drawn(draw, title)


def drawn(draw: Any, title: str) -> str:
    """A figure with logarithmic axes and a legend beside it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(xscale="log", yscale="log", title=title)
        draw(axes)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
