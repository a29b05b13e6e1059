"""Packages that only some commands need: one line that says what to install where one is missing."""

from __future__ import annotations

import importlib.util


class MissingExtra(ImportError):
    """A package that is not installed, and the extra of this project that brings it."""


def need(package: str, extra: str, purpose: str) -> None:
    """Raise :class:`MissingExtra` unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        wanted = f"pip install 'model-conformance[{extra}]'"
        raise MissingExtra(f"{purpose} needs {package.replace('_', '-')}: {wanted}", name=package)
