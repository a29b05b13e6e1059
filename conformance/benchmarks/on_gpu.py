"""Everything that there is to show on a GPU, in one command with one archive of results.

    python -m conformance.benchmarks.on_gpu --output results.tar.gz --budget 570 requirements
    python -m conformance.benchmarks.on_gpu --output results.tar.gz --budget 570 kernels gate

``requirements``  ``pytest -m gpu`` on the reference and the bundled adapters that compute on a GPU
``kernels``       the records of the kernel benchmarks of those that have any
``gate``          the trial of the regression gate, as it is and with slowdowns of 3 and 5 %

A command that is not done when the budget is spent is ended, and what it has written is in the archive:
its output, reports and records. Exit status 1 says that a command failed or was ended.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.benchmarks.machine import timed_device

ATTENTION = (
    "torch-sdpa",
    "torch-sdpa-flash",
    "torch-sdpa-efficient",
    "torch-sdpa-cudnn",
)
COMPILED = ("torch-flex-compiled",)
"""Last: it compiles for every shape."""
EXPERTS = (
    "torch-experts-grouped",
    "torch-folded-experts",
    "transformers-experts-eager",
    "transformers-experts-batched",
    "transformers-experts-grouped",
)
MODELS = ("transformers-sdpa", "transformers-eager", "transformers-qwen3-moe", "transformers-qwen2")
KERNELS = (*ATTENTION, *EXPERTS, *COMPILED)
GATED = "torch-kernels"
SLOWDOWNS = (3, 5)
SHOWN = 25
"""Last lines of each command's output that are printed."""


@dataclass(frozen=True)
class Command:
    """A command and the name of what it writes, without ``python``."""

    name: str
    arguments: tuple[str, ...]


def commands(step: str, folder: Path) -> list[Command]:
    """The commands of a step, the most telling first; what they write is below ``folder``."""
    if step == "requirements":
        return [
            Command(
                f"requirements-{name}",
                (
                    *("-m", "pytest", "-m", "gpu", "--impl", name, "-q"),
                    f"--conformance-report={folder / name}",
                ),
            )
            for name in ("reference", *ATTENTION, *EXPERTS, *MODELS, *COMPILED)
        ]
    if step == "kernels":
        chosen = [part for name in KERNELS for part in ("--impl", name)]
        record = ("--device", "cuda", "--record", str(folder))
        return [Command("kernels", ("-m", "conformance.benchmarks", *chosen, *record))]
    injected = [part for percent in SLOWDOWNS for part in ("--inject", str(percent))]
    trial = ("-m", "conformance.benchmarks.gate_trial", "--device", "cuda", "--impl", GATED)
    runs = ("--runs", "3", "--injected-runs", "1")
    output = ("--output", str(folder / "gate_trial-cuda.json"))
    return [Command("gate", (*trial, *runs, *injected, *output))]


def run(command: Command, folder: Path, seconds: float) -> str:
    """Run a command for so long at most, with its output in a file; how it ended, in words."""
    log = folder / f"{command.name}.txt"
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command.arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its workers can be ended with it
        )
        try:
            how = f"status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            how = "ended for want of time"
    print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:]))
    print(f"== {command.name}: {how} after {time.monotonic() - began:.0f} s", flush=True)
    return how


def run_all(steps: Sequence[str], folder: Path, budget: float) -> dict[str, str]:
    """How every command ended, by its name."""
    end = time.monotonic() + budget
    found = {}
    for step in steps:
        for command in commands(step, folder):
            left = end - time.monotonic()
            found[command.name] = run(command, folder, left) if left > 0 else "not begun"
    return found


STEPS = ("requirements", "kernels", "gate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps, and pack what they wrote."""
    name = "conformance.benchmarks.on_gpu"
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="*", default=[], metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.tar.gz")
    parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS")
    options = parser.parse_args(arguments)
    if unknown := [step for step in options.steps if step not in STEPS]:
        parser.error(f"{unknown[0]!r} is no step: expected {', '.join(STEPS)}")
    try:
        timed_device("cuda")
    except ValueError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 4
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(options.steps or STEPS, Path(folder), options.budget)
        with tarfile.open(options.output, "w:gz") as archive:
            archive.add(folder, arcname="results")
    for command, how in found.items():
        print(f"{command:<45} {how}")
    return 0 if all(how == "status 0" for how in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
