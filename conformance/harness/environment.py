"""What a run ran on: versions, platform, device, our variables. Imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conformance.harness.resolve import Resolved

PACKAGES = ("torch", "transformers", "hypothesis", "pytest")

PREFIX = "CONFORMANCE_"


def describe_environment(device: str) -> dict[str, object]:
    """Versions of what matters, as installed, and the environment variables of the suite."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "device": device,
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIX)},
    }


def describe_implementation(resolved: Resolved, chosen_by: str, root: Path) -> dict[str, object]:
    """Name, version and file of an implementation, and what chose it."""
    return {
        "name": resolved.name,
        "version": resolved.version,
        "file": _relative(resolved.file, root),
        "chosen_by": chosen_by,
    }


def _relative(file: str | None, root: Path) -> str | None:
    """A path that means the same on another machine, where there is one."""
    if file is None:
        return None
    path = Path(file)
    for folder in (root, Path(__file__).resolve().parents[2]):
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return str(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
