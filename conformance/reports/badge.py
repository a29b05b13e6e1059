"""A badge: the verdict in two words with its denominator, as an image and for shields.io's endpoint."""

from __future__ import annotations

import json
from typing import Any

from conformance.harness.verdict import Verdict
from conformance.reports.files import BADGE_DATA, BADGE_IMAGE

LABEL = "conformance"

COLOURS = {
    "pass": "#1a7f4b",
    "partial": "#8a6100",
    "fail": "#b3261e",
    "inconclusive": "#5f5a80",
}
"""Of each verdict; white letters are readable on all of them."""

CHARACTER = 6.6
"""Width of a letter at 11 pixels, with room for the widest fonts."""


def badge_files(verdict: Verdict) -> dict[str, str]:
    """The badge's files by name."""
    data = badge_data(verdict)
    return {
        BADGE_IMAGE: badge_image(data["label"], data["message"], data["color"]),
        BADGE_DATA: json.dumps(data, indent=2) + "\n",
    }


def badge_data(verdict: Verdict) -> dict[str, Any]:
    """What shields.io's endpoint badge reads: schemaVersion, label, message, color."""
    return {
        "schemaVersion": 1,
        "label": LABEL,
        "message": message(verdict),
        "color": COLOURS[verdict.verdict],
    }


def message(verdict: Verdict) -> str:
    """The verdict and its denominator: ``partial, 64 of 1030 core``."""
    core = verdict.counts["levels"]["core"]
    return f"{verdict.verdict}, {core.get('pass', 0)} of {core['suite']} core"


def badge_image(label: str, text: str, colour: str) -> str:
    """An SVG of two fields; it loads nothing."""
    left, right = (round(CHARACTER * len(part) + 12) for part in (label, text))
    width = left + right
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" '
        f'aria-label="{label}: {text}"><title>{label}: {text}</title>'
        f'<clipPath id="r"><rect width="{width}" height="20" rx="3"/></clipPath>'
        f'<g clip-path="url(#r)"><rect width="{left}" height="20" fill="#444b52"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="{colour}"/></g>'
        '<g fill="#fff" text-anchor="middle" font-size="11" '
        'font-family="Verdana,Geneva,DejaVu Sans,sans-serif">'
        f'<text x="{left / 2:g}" y="14">{label}</text>'
        f'<text x="{left + right / 2:g}" y="14">{text}</text></g></svg>\n'
    )
