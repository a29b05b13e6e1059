"""Documented bugs of real code, planted over the reference in a few lines each.

A planted bug has the id of its catalogue entry (``fixtures/known_bugs``); where one entry describes
several variants, the others append a word after a dot. The suite must fail every one of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

AREAS = (
    "attention",
    "rotary",
    "cached_attention",
    "gpt_function",
    "gpt_loading",
    "parallel_linear",
    "weight_loader",
    "causal_lm",
    "flat_layout",
    "flat_shards",
    "flat_checkpoints",
    "moe_router",
    "experts",
    "moe_block",
    "expert_parallel_block",
    "shared_core",
    "shared_core_fit",
    "shared_core_block",
    "compression_statistics",
    "compressed_checkpoint",
    "distillation_loss",
    "loglikelihood",
    "checkpoint_watcher",
)


@dataclass(frozen=True)
class PlantedBug:
    """A wrong implementation of one contract."""

    id: str
    contract: str
    breaks: str
    """Slug of the requirement whose rule the bug breaks."""
    mechanism: str
    make: type
    """A class whose instances, made without arguments, have the contract's method."""

    @property
    def entry(self) -> str:
        """Id of the catalogue entry."""
        return self.id.split(".")[0]


PLANTED: dict[str, PlantedBug] = {}

NOT_EXPRESSIBLE: dict[str, str] = {}
"""Catalogue entries that no contract can express, and why."""


def known_bug(id: str, *, contract: str, breaks: str) -> Callable[[type], type]:
    """Register the decorated class, whose docstring says what is wrong with it, as a planted bug."""

    def register(planted: type) -> type:
        PLANTED[id] = PlantedBug(id, contract, breaks, " ".join(planted.__doc__.split()), planted)
        return planted

    return register


def all_known_bugs() -> dict[str, PlantedBug]:
    """Every planted bug by id."""
    for area in AREAS:
        importlib.import_module(f"conformance.known_bugs.{area}")
    return dict(PLANTED)
