"""The workflows and the action that are written into a repository.

They are the files themselves, and not generated: what is read here is what runs there.
"""

from __future__ import annotations

from pathlib import Path

from conformance.harness.data import DataMissing

ACTION = ".github/actions/conformance/action.yml"
CPU_GATE = ".github/workflows/conformance.yml"
GPU_GATE = ".github/workflows/conformance-gpu.yml"

TEMPLATES = Path(__file__).resolve().parent / "templates"


def action() -> str:
    """The composite action: beside the package in a checkout, inside it in a wheel."""
    checkout = TEMPLATES.parents[2]
    for file in (TEMPLATES / "action.yml", checkout / ACTION):
        if file.is_file():
            return file.read_text("utf-8")
    raise DataMissing(f"the action of the suite is neither in {TEMPLATES} nor in {checkout}")


def cpu_gate(*, split: bool = False) -> str:
    """The workflow that holds every pull request to the suite, on one runner or on four."""
    name = "conformance-split.yml" if split else "conformance.yml"
    return (TEMPLATES / name).read_text("utf-8")


def gpu_gate() -> str:
    """The workflow for a runner with a CUDA device, with the benchmark gate."""
    return (TEMPLATES / "conformance-gpu.yml").read_text("utf-8")
