"""Implementations whose offsets wrap, which the requirements on very large tensors must tell."""

import contextlib
from dataclasses import dataclass

import pytest
import torch

from conformance.harness import gpu_large
from conformance.harness.failures import ConformanceFailure
from conformance.harness.requirement import all_requirements
from conformance.harness.subject import Subject
from conformance.implementations.reference import Reference

BOUNDARY = 2**20
"""In the place of 2**31: what lies beyond it is read from the beginning."""

REFERENCE = Reference()


@contextlib.contextmanager
def low_boundary():
    """Tensors that pass a boundary which a CPU reaches."""
    gpu_large.BOUNDARY[0], before = BOUNDARY, gpu_large.BOUNDARY[0]
    try:
        yield
    finally:
        gpu_large.BOUNDARY[0] = before


def wrapped(x):
    """The tensor as it is read with offsets that begin again at the boundary."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    flat = x.permute(order).reshape(-1)
    read = flat[torch.arange(flat.numel()) % BOUNDARY].view([x.shape[i] for i in order])
    return read.permute([order.index(i) for i in range(x.ndim)])


def wraps_queries(q, k, v):
    return REFERENCE.attention(wrapped(q), k, v)


def wraps_output(q, k, v):
    return wrapped(REFERENCE.attention(q, k, v))


def wraps_keys(q, k, v):
    return REFERENCE.attention(q, wrapped(k), v)


def wraps_values(q, k, v):
    return REFERENCE.attention(q, k, wrapped(v))


def wraps_rows(x, positions):
    return REFERENCE.rotary(wrapped(x), positions)


def wraps_tokens(hidden, indices, weights, gate_up_proj, down_proj):
    return REFERENCE.experts(wrapped(hidden), indices, weights, gate_up_proj, down_proj)


@dataclass(frozen=True)
class NearMiss:
    """A method that is right below the boundary, and what it must fail."""

    breaks: str
    method: object

    def check(self):
        with low_boundary():
            all_requirements()[self.breaks].check(self.method)


NEAR_LARGE = {
    "queries": NearMiss("attention.large.queries", wraps_queries),
    "attention output": NearMiss("attention.large.queries", wraps_output),
    "values": NearMiss("attention.large.cache", wraps_values),
    "rotated rows": NearMiss("rotary.large.elements", wraps_rows),
    "tokens": NearMiss("experts.large.tokens", wraps_tokens),
}


@pytest.mark.parametrize("name", NEAR_LARGE)
def test_wrapped_offsets_are_told(name):
    with pytest.raises(ConformanceFailure) as caught:
        NEAR_LARGE[name].check()
    assert caught.value.kind == "wrong values"


LAYOUTS = [
    (gpu_large.assert_large_queries, "attention", 32, method, tokens_first)
    for method in (wraps_queries, wraps_output)
    for tokens_first in (False, True)
]
LAYOUTS += [
    (gpu_large.assert_large_cache, "attention", 256, method, tokens_first)
    for method in (wraps_keys, wraps_values)
    for tokens_first in (False, True)
]
LAYOUTS += [
    (gpu_large.assert_large_rotation, "rotary", 32, wraps_rows, tokens_first)
    for tokens_first in (False, True)
]


@pytest.mark.parametrize(("check", "contract", "heads", "method", "tokens_first"), LAYOUTS)
def test_every_layout_tells_them(check, contract, heads, method, tokens_first):
    case = gpu_large.LargeCase("rows", heads=heads, tokens_first=tokens_first)
    with low_boundary(), pytest.raises(ConformanceFailure, match="differs from the oracle"):
        check(Subject(contract, method), case)


@pytest.mark.parametrize("slug", sorted({near.breaks for near in NEAR_LARGE.values()}))
def test_the_reference_passes(slug):
    method = getattr(REFERENCE, slug.split(".")[0])
    NearMiss(slug, method).check()
    assert all_requirements()[slug].last_tally.executed
