"""New shards, and counting what is loaded into them: every element of every parameter once, by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from reference_impl.flat_shards.layout import Overlap
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.unit import FlatUnit
from reference_impl.stored import CheckpointError

Fresh = dict[str, dict[str, Tensor]]
"""New shards by unit and shard name."""


def empty_shards(model: MultiStageModel) -> Fresh:
    """New shards of zeros: all that a checkpoint has."""
    return {
        unit.name: {name: torch.zeros_like(unit.shards[name]) for name in model.state_shard_names}
        for unit in model.units
    }


class SafeLoad:
    """What was written to the shards of a unit.

    Fast-LLM fills shards with NaN and looks for what is left. Here ranges are counted: a checkpoint
    that holds NaN is told from one that lacks elements, and a parameter that is loaded twice does
    not stand in for one that is not loaded.
    """

    def __init__(self, unit: FlatUnit, shard_names: Sequence[str]) -> None:
        self.unit = unit
        self.shard_names = [name for name in shard_names if unit.shard_length(name)]
        self._written: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)

    def count(self, overlap: Overlap, shard_name: str) -> None:
        """These elements of the shard were written."""
        written = self._written[overlap.name, shard_name]
        written.append((overlap.target, overlap.target + overlap.count))

    def check(self, source: str) -> None:
        """Raise :class:`CheckpointError` that names a parameter unless each element came once."""
        for shard_name in self.shard_names:
            for name in self.unit.layout.names:
                begin, end = self.unit.range_in_shard(name)
                place = begin
                for first, last in sorted(self._written[name, shard_name]):
                    if first != place:
                        break
                    place = last
                written = sum(last - first for first, last in self._written[name, shard_name])
                if place != end or written != end - begin:
                    problem = (
                        f"{written} elements of its {shard_name} were loaded on rank "
                        f"{self.unit.ranks.rank}, expected {end - begin} once each"
                    )
                    raise CheckpointError(source, problem, key=name)
