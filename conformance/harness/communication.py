"""What a rank communicates, counted by kind of collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.harness.rank_pool import end_pools

KINDS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "all_to_all",
    "reduce",
    "gather",
)
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")
"""Of the operations of ``torch.distributed``, and of functional collectives."""


_loaded: list[bool] = []


def ready_to_count() -> None:
    """Load what counting needs, here and once: it takes a rank more than a second."""
    if not _loaded:
        with collectives():
            torch.empty(0).clone()
        end_pools()  # ranks that are forked from now on have it
        _loaded.append(True)


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Count the collectives of the body.

    Both those of ``torch.distributed`` and functional ones are operations that torch dispatches.
    torch's CommDebugMode counts them the same way, and takes a second to import.
    """
    with _Counting() as mode:
        yield mode.counts


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple = (), options: dict | None = None
    ) -> Any:
        namespace, name = operation.name().split("::")
        if namespace in NAMESPACES:
            kind = kind_of(name)
            self.counts[kind] += kind in KINDS
        return operation(*arguments, **(options or {}))


def kind_of(name: str) -> str:
    """The kind of collective of an operation such as ``allreduce_``; its own name for others."""
    plain = name.replace("_", "")
    for kind in KINDS:
        if kind.replace("_", "") in plain:
            return kind
    return name
