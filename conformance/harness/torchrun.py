"""A run that torchrun starts on every rank: one of them reports, and all end alike.

Each rank is a pytest run of its own, with the same requirements in the same order. Requirements of
several ranks meet in the group of all of them (:mod:`conformance.harness.rank_pool`), so no rank may
do what the others do not. Imports no torch of its own.
"""

from __future__ import annotations

import os
from datetime import timedelta

STARTED = "TORCHELASTIC_RUN_ID"
"""The variable by which a process knows that torchrun started it."""

LAST_MEETING = 600.0
"""Seconds that a rank waits at the end for the slowest, which ran the same on another machine."""

LOST = 3
"""Exit status of a rank that the others did not meet: that of a broken harness."""


class CannotRun(ValueError):
    """A run that the ranks could not make alike; the message is one line."""


def rank() -> int | None:
    """The rank of this process among all that torchrun started; None without torchrun."""
    return int(os.environ["RANK"]) if STARTED in os.environ else None


def reports() -> bool:
    """Whether this process writes files about the run: the first rank does, for all."""
    return rank() in (None, 0)


def several_ranks() -> bool:
    """Whether torchrun started more than one process."""
    return STARTED in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def check(*, workers: int, repeatable: bool) -> None:
    """Raise :class:`CannotRun` where the ranks would not run the same cases in the same order.

    ``workers`` are those of pytest-xdist in one rank; ``repeatable`` says whether another process
    draws the same cases.
    """
    if not several_ranks():
        return
    if workers > 1:
        raise CannotRun(f"under torchrun a rank is one process: leave out -n {workers}")
    if not repeatable:
        raise CannotRun(
            "under torchrun all ranks must draw the same cases, and this profile draws at random: "
            "give --hypothesis-seed"
        )


def agreed(status: int) -> int:
    """The exit status that all ranks end with: that of the first rank that is red, or 0."""
    if not several_ranks():
        return status
    import torch.distributed as dist

    if not dist.is_initialized():  # no requirement of several ranks was run
        return status
    statuses = [status] * dist.get_world_size()
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=LAST_MEETING))
        dist.all_gather_object(statuses, status)
    except RuntimeError:  # a rank is gone, or the group was broken before
        return status or LOST
    return next((each for each in statuses if each), 0)
