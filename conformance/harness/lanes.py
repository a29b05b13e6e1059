"""The dtypes that one case is checked in.

Every case runs in float32 against the float64 oracle (the semantic lane). A case that drew a 16-bit
dtype runs in that dtype too (the precision lane). Checks that compare bit by bit are the exact lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from conformance.harness.failures import Declined, Inconclusive, failing_at
from conformance.harness.shown import whole_course_shown

SEMANTIC, PRECISION, EXACT = "semantic", "precision", "exact"

_precision_lane: ContextVar[bool] = ContextVar("precision_lane", default=True)


@contextmanager
def semantic_and_exact_only() -> Iterator[None]:
    """Leave the precision lane out, to see what the other two catch alone."""
    token = _precision_lane.set(False)
    try:
        yield
    finally:
        _precision_lane.reset(token)


_taken: ContextVar[set[torch.dtype] | None] = ContextVar("taken", default=None)
_limit: ContextVar[frozenset[torch.dtype] | None] = ContextVar("limit", default=None)


@contextmanager
def dtypes_noted() -> Iterator[set[torch.dtype]]:
    """The dtypes that are not declined, until the first that fails."""
    taken: set[torch.dtype] = set()
    token = _taken.set(taken)
    try:
        yield taken
    finally:
        _taken.reset(token)


@contextmanager
def limited_to(dtypes: frozenset[torch.dtype]) -> Iterator[None]:
    """Run cases in these dtypes alone, as for an implementation that declines the others.

    Cases that are not checked in several dtypes are run as they are.
    """
    token = _limit.set(dtypes or None)
    try:
        yield
    finally:
        _limit.reset(token)


def lane_of(dtype: torch.dtype) -> str:
    """The lane in which values of this dtype are compared with the oracle."""
    return SEMANTIC if dtype in (torch.float32, torch.float64) else PRECISION


def dtypes_of(case: Any) -> list[torch.dtype]:
    """The dtypes that ``case`` is checked in."""
    drawn = getattr(torch, case.dtype)
    if drawn == torch.float32 or not _precision_lane.get():
        return [torch.float32]
    return [torch.float32, drawn]


def in_every_lane(case: Any, check: Callable[[Any], None], device: str = "cpu") -> None:
    """Run ``check`` on the call that ``case`` makes in each dtype.

    An implementation may decline a dtype; the case is declined when it declines all of them, and
    inconclusive when none was conclusive.
    """
    unusable: list[Exception] = []
    limit, taken = _limit.get(), _taken.get()
    dtypes = [dtype for dtype in dtypes_of(case) if limit is None or dtype in limit]
    for dtype in dtypes:
        call = case.call(dtype, device)
        try:
            with whole_course_shown(), failing_at(call):
                check(call)
        except (Declined, NotImplementedError, Inconclusive) as reason:
            unusable.append(reason)
            continue
        except BaseException:
            _note(taken, dtype)
            raise
        _note(taken, dtype)
    if len(unusable) == len(dtypes):
        raise unusable[0]


def _note(taken: set[torch.dtype] | None, dtype: torch.dtype) -> None:
    if taken is not None:
        taken.add(dtype)
