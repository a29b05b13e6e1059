"""Other right ways to compute the same thing. The suite must pass every one of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

AREAS = (
    "attention",
    "rotary",
    "gpt_checkpoint",
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
class CorrectVariant:
    """A correct implementation of one contract that is not the reference."""

    id: str
    contract: str
    summary: str
    make: Callable[[], object]
    """Makes an object that has the contract's method."""


VARIANTS: dict[str, CorrectVariant] = {}


def correct_variant(id: str, *, contract: str) -> Callable[[type], type]:
    """Register the decorated class, whose docstring says how it differs, as a correct variant."""

    def register(variant: type) -> type:
        VARIANTS[id] = CorrectVariant(id, contract, " ".join(variant.__doc__.split()), variant)
        return variant

    return register


def all_correct_variants() -> dict[str, CorrectVariant]:
    """Every correct variant by id."""
    for area in AREAS:
        importlib.import_module(f"conformance.correct_variants.{area}")
    return dict(VARIANTS)
