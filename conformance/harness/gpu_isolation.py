"""Requirements on a GPU in a process that is replaced when it loses the device.

The process is a worker of pytest-xdist. A worker that lost the device reports the requirement that
lost it and ends within it, so that xdist starts another for the rest. What the run does on its own is
decided here, before xdist reads its options. Imports no torch itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conformance.contracts import CONTRACTS
from conformance.harness import gpu_lane

ENOUGH = 3
"""After so many requirements of a contract that lost the device, the contract's others do not run."""
SPARE = 5
"""Workers that may die for other reasons."""
LOST = "lost.jsonl"
"""File in the folder of plans: which requirements lost the device."""
STATUS = 70
"""Exit status of a worker that ends itself."""

OPTIONS = ("--impl", "--smoke", "--conformance")
PACKAGE = Path(__file__).resolve().parents[1]


def arrange(config: pytest.Config) -> None:
    """With ``-m gpu`` run the suite in one worker, unless the user says how many there are."""
    if hasattr(config, "workerinput") or not asks_for_suite(config):
        return
    gpu_lane.before_cuda_starts()
    option = config.option
    if not hasattr(option, "numprocesses"):  # without pytest-xdist
        return
    alone = option.numprocesses is None and not option.tx and option.dist == "no"
    told = option.collectonly or option.usepdb
    if alone and not told and gpu_lane.has_cuda():
        option.numprocesses = 1
    if option.numprocesses and option.maxworkerrestart is None:
        option.maxworkerrestart = str(ENOUGH * len(CONTRACTS) + SPARE)


def names_gpu(mark_expression: str) -> bool:
    """Whether ``-m`` asks for the mark gpu, rather than for its absence."""
    return bool(re.search(r"(?<!not )\bgpu\b", mark_expression or ""))


def asks_for_suite(config: pytest.Config) -> bool:
    """Whether a run is of this suite: by its paths or its options, and not a user's own tests."""
    if any(str(a).startswith(OPTIONS) for a in config.invocation_params.args):
        return True
    paths = [str(argument).split("::")[0] for argument in config.args]
    return any(is_of_suite(path, config) for path in paths)


def is_of_suite(path: str, config: pytest.Config) -> bool:
    """Whether a path, or with ``--pyargs`` a module, is the package or its requirements."""
    if config.getoption("pyargs", False) and path.split(".")[0] == PACKAGE.name:
        return True
    place = Path(config.invocation_params.dir, path).resolve()
    return place == PACKAGE or (place.parent == PACKAGE and place.name.startswith("test_"))


def header(config: pytest.Config) -> str | None:
    """The line at the start of a run that says how requirements on a GPU are kept apart."""
    if hasattr(config, "workerinput") or not asks_for_suite(config):
        return None
    if config.getoption("numprocesses", None):
        return "conformance: a worker that loses the device is replaced"
    if not gpu_lane.has_cuda():
        return "conformance: no CUDA device"
    return (
        "conformance: no isolation (needs pytest-xdist and a worker): after a requirement that loses "
        "the device the others do not run"
    )


def note_lost(folder: Path, planned: dict[str, Any]) -> None:
    """Write down, for the workers to come, that a requirement lost the device."""
    with (folder / LOST).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"contract": planned["contract"], "id": planned["id"]}) + "\n")


def read_lost(folder: Path) -> list[dict[str, str]]:
    """The requirements that lost the device so far."""
    file = folder / LOST
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def why_not_run(lost: list[dict[str, str]], contract: str) -> str | None:
    """Why a contract's requirements do not run any more; None while they do."""
    if Counter(each["contract"] for each in lost)[contract] < ENOUGH:
        return None
    ids = [each["id"] for each in lost if each["contract"] == contract]
    return f"{len(ids)} requirements of {contract} lost the device: {', '.join(ids[:ENOUGH])}"


def end_worker() -> None:
    """End this process at once: what is on the device can be neither used nor put away."""
    pool = sys.modules.get("conformance.harness.rank_pool")
    with contextlib.suppress(Exception):
        if pool is not None:
            pool.end_pools()
    os._exit(STATUS)


def stack_file(folder: Path, worker: str) -> Path:
    """Where a worker that never returns to Python leaves its stacks."""
    return folder / f"stacks-{worker}.txt"
