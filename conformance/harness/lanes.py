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
    dtypes = dtypes_of(case)
    for dtype in dtypes:
        call = case.call(dtype, device)
        try:
            with failing_at(call):
                check(call)
        except (Declined, NotImplementedError, Inconclusive) as reason:
            unusable.append(reason)
    if len(unusable) == len(dtypes):
        raise unusable[0]
