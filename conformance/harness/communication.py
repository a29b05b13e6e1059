"""What a rank communicates, counted by kind of collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

KINDS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "all_to_all",
    "reduce",
    "gather",
)


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Count the collectives of the body, whether of ``torch.distributed`` or functional ones.

    torch's own CommDebugMode sees both. The counts are complete when the body has ended.
    """
    from torch.distributed.tensor.debug import CommDebugMode

    counts: Counter[str] = Counter()
    with CommDebugMode() as mode:
        yield counts
    for operation, number in mode.get_comm_counts().items():
        counts[kind_of(str(operation))] += number


def kind_of(operation: str) -> str:
    """The kind of collective of an operation such as ``c10d.allreduce_``."""
    plain = operation.split(".")[-1].replace("_", "")
    for kind in KINDS:
        if kind.replace("_", "") in plain:
            return kind
    return operation
