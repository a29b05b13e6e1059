"""Results that are kept for the cases that come again: inputs, oracles and floors.

One run meets each case a few times in a row, so little is kept. Where many implementations meet the
same cases, as in the kill matrix, :func:`keep_whole_gate` keeps them all, in about 2 GB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

FEW, WHOLE_GATE = 128, 8192

_capacity = FEW
_memos: list[_Memo] = []


class _Memo:
    """A function with a least-recently-used cache of adjustable size."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.resize(_capacity)

    def resize(self, capacity: int) -> None:
        self.cached = functools.lru_cache(maxsize=capacity)(self.function)

    def __call__(self, *arguments: Any) -> Any:
        return self.cached(*arguments)


def remembered(function: Function) -> Function:
    """Keep what ``function`` returns for its hashable arguments; nobody may change it."""
    memo = _Memo(function)
    _memos.append(memo)
    return memo  # type: ignore[return-value]


def keep_whole_gate() -> None:
    """From now on keep the results of every case of the gate."""
    global _capacity
    if _capacity != WHOLE_GATE:
        _capacity = WHOLE_GATE
        for memo in _memos:
            memo.resize(_capacity)


def forget_everything() -> None:
    """Free what is kept; it is made again when it is asked for."""
    for memo in _memos:
        memo.cached.cache_clear()
