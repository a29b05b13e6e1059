"""Small plots for a page: inline SVG of numbers alone, whose colours are classes of the style.

Each plot repeats what a table or a sentence beside it says, so that it is hidden from screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

WIDTH = 240
"""Of a row of the statistics, in the units of its drawing; the page scales it."""

MARGIN = 8

DECADES = (-4, 9)
"""The widest axis of ratios; what lies beyond is drawn at its end."""

MOST_BARS = 64
"""Bars of a profile; of a longer one each bar is the largest of several."""

BINS = 25
"""Of the histogram of shares: each is 4 % wide."""


def svg(
    width: float, height: float, parts: Iterable[str], kind: str, *, stretched: bool = False
) -> Markup:
    """A drawing of this size; a stretched one fills its box, whatever its shape."""
    stretch = ' preserveAspectRatio="none"' if stretched else ""
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" aria-hidden="true" '
        f'focusable="false"{stretch}>{"".join(parts)}</svg>'
    )


def ratio(value: float | None, limit: float | None) -> float:
    """A statistic as a multiple of its limit; infinite where it is not finite, or there is no room."""
    if value is None or not math.isfinite(value):
        return math.inf
    if not limit:
        return math.inf if value else 0.0
    return abs(value) / limit


def axis_of(ratios: Iterable[float]) -> tuple[int, int]:
    """The decades of an axis on which all of these ratios, and the limit itself, have their place."""
    logs = [math.log10(each) for each in ratios if 0 < each < math.inf]
    low, high = math.floor(min([-1.0, *logs])), math.ceil(max([1.0, *logs]))
    return max(low, DECADES[0]), min(high, DECADES[1])


def _place(each: float, axis: tuple[int, int]) -> float:
    low, high = axis
    log = low if each <= 0 else high if each == math.inf else math.log10(each)
    share = (min(max(log, low), high) - low) / (high - low)
    return MARGIN + share * (WIDTH - 2 * MARGIN)


def statistic_row(each: float, axis: tuple[int, int], floor: float | None = None) -> Markup:
    """One statistic on its logarithmic axis, with the lines of its limit and of its floor.

    All are multiples of the limit.
    """
    x, limit, middle = _place(each, axis), _place(1.0, axis), 9
    over = each > 1
    parts = [
        *(
            f'<path class="tick" d="M{_place(10.0**k, axis):.1f} 3V15"/>'
            for k in range(axis[0], axis[1] + 1)
            if k
        ),
        f'<path class="stem{" over" if over else ""}" d="M{limit:.1f} {middle}H{x:.1f}"/>',
        f'<path class="limit" d="M{limit:.1f} 0V18"/>',
    ]
    if floor is not None and floor < math.inf:
        parts.append(f'<path class="floor" d="M{_place(floor, axis):.1f} 0V18"/>')
    if each == math.inf:
        parts.append(f'<path class="dot over" d="M{x - 7:.1f} 4l9 5l-9 5z"/>')
    else:
        state = "over" if over else "within"
        parts.append(f'<circle class="dot {state}" cx="{x:.1f}" cy="{middle}" r="4"/>')
    return svg(WIDTH, 18, parts, "statistic")


def statistic_axis(axis: tuple[int, int]) -> Markup:
    """The labels of the axis: multiples of the limit."""
    step = 1 if axis[1] - axis[0] <= 6 else 3
    parts = []
    for k in range(axis[0], axis[1] + 1):
        if k and k % step:
            continue
        x = _place(10.0**k, axis)
        label = "limit" if k == 0 else f"×{10**k}" if -3 < k < 4 else f"×1e{k}"
        label = label if k >= 0 or k <= -3 else f"×{10.0**k:g}"
        anchor = "start" if k == axis[0] else "end" if k == axis[1] else "middle"
        parts.append(f'<text x="{x:.1f}" y="10" text-anchor="{anchor}">{label}</text>')
    return svg(WIDTH, 13, parts, "axis")


def binned(errors: Sequence[float | None], most: int = MOST_BARS) -> list[float]:
    """At most so many values: the largest of each run of neighbours; not finite is infinite."""
    values = [math.inf if e is None or not math.isfinite(e) else abs(e) for e in errors]
    size = math.ceil(len(values) / most) or 1
    return [max(values[i : i + size]) for i in range(0, len(values), size)]


def profile_bars(
    errors: Sequence[float | None], limit: float | None, floor: float | None = None
) -> Markup:
    """Bars of the largest error at each index, on a logarithmic axis, with limit and floor as lines."""
    bars, height = binned(errors), 48.0
    width = 480.0 / max(len(bars), 1)
    finite = [each for each in bars if 0 < each < math.inf]
    top = math.log10(max([*finite, (limit or 0) * 10, 1e-300]))
    bottom = math.log10(limit / 100) if limit else min([top - 3, *map(math.log10, finite)])
    if top - bottom < 1:
        bottom = top - 1

    def tall(each: float) -> float:
        if each <= 0:
            return 0.0
        log = top if each == math.inf else math.log10(each)
        return height * min(max((log - bottom) / (top - bottom), 0.0), 1.0)

    parts = []
    for index, each in enumerate(bars):
        size = max(tall(each), 1.0)
        over = limit is None or each > limit
        parts.append(
            f'<rect class="{"over" if over and each else "within"}" x="{index * width + 1:.1f}" '
            f'y="{height - size:.1f}" width="{max(width - 2, 1):.1f}" height="{size:.1f}"/>'
        )
    total = 480.0
    for kind, line in (("limit", limit), ("floor", floor)):
        if line and line < math.inf:
            y = height - tall(line)
            parts.append(f'<path class="{kind}" d="M0 {y:.1f}H{total:.1f}"/>')
    return svg(total, height, parts, "profile", stretched=True)


def histogram(shares: Iterable[float], tallest: int) -> Markup:
    """How many shares of the limit lie in each bin from 0 to 1; ``tallest`` fills the height."""
    counts = bin_counts(shares)
    parts = ['<path class="base" d="M0 23.5H200"/>']
    for index, number in enumerate(counts):
        if number:
            size = max(22.0 * number / max(tallest, 1), 1.5)
            near = " near" if index >= BINS - 5 else ""
            parts.append(
                f'<rect class="bin{near}" x="{index * 8 + 0.5:g}" y="{23 - size:.1f}" width="7" '
                f'height="{size:.1f}"/>'
            )
    parts.append('<path class="limit" d="M199.5 0V24"/>')
    return svg(200, 24, parts, "histogram")


def bin_counts(shares: Iterable[float]) -> list[int]:
    """Number of shares in each bin."""
    counts = [0] * BINS
    for share in shares:
        counts[min(int(share * BINS), BINS - 1)] += 1
    return counts


def stacked_bar(counts: Sequence[tuple[str, int]]) -> Markup:
    """A bar of all requirements, divided by how they ended; each part is of the class given."""
    total, x, parts = sum(number for _, number in counts) or 1, 0.0, []
    for kind, number in counts:
        if number:
            # A single failure among a thousand is to be seen.
            width = max(200.0 * number / total, 1.5)
            parts.append(
                f'<rect class="o-{kind}" x="{x:.2f}" y="0" width="{width:.2f}" height="8"/>'
            )
            x += width
    return svg(max(x, 200.0), 8, parts, "stack", stretched=True)
