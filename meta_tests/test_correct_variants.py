"""Correct implementations pass: other orders, blockings, roundings and memory layouts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import settings

from conformance.correct_variants import all_correct_variants
from conformance.harness import profiles
from conformance.harness.failures import Declined
from conformance.harness.kill_matrix import failures
from conformance.harness.memo import keep_whole_gate
from conformance.harness.requirement import all_requirements

VARIANTS = all_correct_variants()
BROAD = {
    "attention": ("attention.combined.sequence", "attention.combined.everything"),
    "rotary": ("rotary.options.any-combination",),
    "rotary_module": ("rotary_module.options.any-combination",),
    "cached_attention": ("cached_attention.options.any-combination",),
    "gpt_checkpoint": (
        "gpt_checkpoint.function.small",
        "gpt_checkpoint.function.medium",
        "gpt_checkpoint.dtype.bfloat16",
    ),
    "parallel_linear": (
        "parallel_linear.dtype.bfloat16",
        "parallel_linear.dtype.float16",
        "parallel_linear.groups.independent",
    ),
    "weight_loader": ("weight_loader.held.coordinates", "weight_loader.dtype.as-asked"),
    "causal_lm": ("causal_lm.function.one-rank", "causal_lm.dtype.bfloat16"),
    "flat_layout": (
        "flat_layout.ranges.in-shard",
        "flat_layout.reshard.any-to-any",
        "flat_layout.reshard.tensor-parallel",
        "flat_layout.order.positions",
    ),
    "flat_shards": (
        "flat_shards.step.sgd",
        "flat_shards.gradient.micro-batches",
        "flat_shards.gradient.bfloat16",
        "flat_shards.forward.bfloat16",
    ),
}

CASES = {"flat_shards": (3, 24)}
"""Cases of the gate, and random ones, of contracts whose cases train a model on real ranks.

All twelve of the gate take a minute a variant, and a hundred random ones as long.
"""

EXACT = {"weight_loader", "flat_layout"}
"""Contracts that compute nothing, so that nothing is compared within limits."""


@pytest.fixture(scope="module", autouse=True)
def many_implementations_meet_the_same_cases():
    torch.set_num_threads(1)
    keep_whole_gate()


def test_there_are_variants_of_the_large_contracts():
    counts = Counter(variant.contract for variant in VARIANTS.values())
    assert counts["attention"] >= 10
    assert counts["rotary"] >= 8
    assert counts["gpt_checkpoint"] >= 10
    assert counts["parallel_linear"] >= 8
    assert counts["weight_loader"] >= 8
    assert counts["causal_lm"] >= 10
    assert counts["flat_layout"] >= 8
    assert counts["flat_shards"] >= 12


@pytest.mark.parametrize("id", VARIANTS)
def test_variant_passes_the_gate(id):
    variant = VARIANTS[id]
    cases, _ = CASES.get(variant.contract, (None, None))
    method = getattr(variant.make(), variant.contract)
    assert failures(method, variant.contract, cases=cases) == []


@pytest.mark.parametrize("id", VARIANTS)
def test_variant_passes_a_hundred_random_cases(id):
    """Requirements that draw every option pass on a hundred cases, in all three dtypes."""
    variant, precision = VARIANTS[id], []
    _, cases = CASES.get(variant.contract, (None, 100))
    hundred = settings(profiles.PROFILES["gate"], max_examples=cases)
    for slug in BROAD[variant.contract]:
        with profiles.temporarily(profiles.without_shrinking(hundred), seed=20261):
            try:
                tally = all_requirements()[slug].check(getattr(variant.make(), variant.contract))
            except Declined:
                continue
        precision.append(tally.comparisons["precision"])
    assert not precision or sum(precision) >= 10 or variant.contract in EXACT
