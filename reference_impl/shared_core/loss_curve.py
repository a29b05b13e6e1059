"""The course of a distillation run: a table of its losses, and a picture of them."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reference_impl.atomic_files import write_atomically
from reference_impl.shared_core.extras import MissingExtra, need

COLUMNS = ("step", "loss", "kl", "ce", "learning_rate")
"""``loss`` is ``alpha · kl + (1 − alpha) · ce``: ``kl`` is the divergence times T²."""
CSV, PNG = "loss_curve.csv", "loss_curve.png"


def curve_of(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The rows of the curve, by ``COLUMNS``, from the log of transformers' Trainer.

    A term that was not computed has no entry.
    """
    kept = (entry for entry in history if "loss" in entry)
    return [{name: entry[name] for name in COLUMNS if name in entry} for entry in kept]


def write_csv(curve: Sequence[Mapping[str, float]], folder: Path) -> None:
    """Write the table, whole or not at all; numbers are read back as they were."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    write_atomically(folder / CSV, lambda file: file.write(text.getvalue().encode()))


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of a table that :func:`write_csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: (int if name == "step" else float)(x) for name, x in row.items() if x}
            for row in csv.DictReader(file)
        ]


def write_png(curve: Sequence[Mapping[str, float]], folder: Path) -> bool:
    """Draw loss and terms over the steps; False, and a line on stderr, without matplotlib."""
    try:
        need("matplotlib", "distillation", PNG)
    except MissingExtra as missing:
        print(missing, file=sys.stderr)
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("loss", "-"), ("kl", "--"), ("ce", ":")):
        points = [(row["step"], row[name]) for row in curve if name in row]
        if points:
            axes.plot(*zip(*points), style, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    write_atomically(folder / PNG, lambda file: file.write(drawn.getvalue()))
    return True
