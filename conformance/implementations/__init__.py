"""Bundled adapters by name: where each lives, and what it is. Nothing is imported until asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bundled:
    """A bundled adapter."""

    name: str
    target: str
    """``module:attribute``; the attribute is called without arguments if it is a class."""
    summary: str


BUNDLED: dict[str, Bundled] = {
    adapter.name: adapter
    for adapter in (
        Bundled(
            "reference",
            "conformance.implementations.reference:Reference",
            "the executable specification itself",
        ),
    )
}
