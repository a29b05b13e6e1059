"""Blocks whose experts are on several ranks, as data: those of one rank with a number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.moe_block_cases import BlockCase, block_cases

NAMES = ("hidden", "router", "gate_up_proj", "down_proj")
REPLICATED, EXPERTS = NAMES[:2], NAMES[2:]


@dataclass(frozen=True, kw_only=True, repr=False)  # shown as blocks are
class ParallelBlockCase(BlockCase):
    """A block, and over how many ranks its experts are dealt out."""

    ranks: int = 2

    def confusable(self) -> frozenset[str]:
        """Also: one rank, which has all experts."""
        return super().confusable() | ({"one rank"} if self.ranks == 1 else set())


def parallel_cases(ranks: int = 2, **fixed: Any) -> SearchStrategy[ParallelBlockCase]:
    """Cases on so many ranks, which divide 6, 12 and 18 experts; options as in ``block_cases``."""
    given = {"experts": st.sampled_from([6, 12, 18]), "normalize": st.booleans()} | fixed
    return block_cases(**given).map(
        lambda case: ParallelBlockCase(**{**vars(case), "ranks": ranks})
    )
