"""Adapters that misbehave, each in one way. The suite must end clearly and in bounded time."""

import os
import sys
import time

import torch

from reference_impl.attention import Attention
from reference_impl.qwen2.parallel_linear import ParallelLinear

FAKES: dict[str, type] = {}


def fake(cls: type) -> type:
    """Register the class, whose docstring says how it misbehaves."""
    FAKES[cls.__name__] = cls
    return cls


def right(q, k, v, **options):
    return Attention().attention(q, k, v, **options)


@fake
class ReturnsNaN:
    """NaN everywhere."""

    def attention(self, q, k, v, *, causal=False):
        return torch.full_like(right(q, k, v, causal=causal), torch.nan)


@fake
class ReturnsZeros:
    """Zeros, of the right shape and dtype."""

    def attention(self, q, k, v, *, causal=False):
        return torch.zeros_like(right(q, k, v, causal=causal))


@fake
class ReturnsList:
    """The right numbers in a list."""

    def attention(self, q, k, v, *, causal=False):
        return right(q, k, v, causal=causal).tolist()


@fake
class ReturnsInput:
    """Its first input."""

    def attention(self, q, k, v, *, causal=False):
        return q


@fake
class ReturnsFirstAnswer:
    """The first answer for each shape again, whatever the numbers."""

    def __init__(self):
        self.answers = {}

    def attention(self, q, k, v, *, causal=False):
        key = (q.shape, k.shape, v.shape, q.dtype)
        if key not in self.answers:
            self.answers[key] = right(q, k, v, causal=causal).detach()
        return self.answers[key].clone()


@fake
class ChangesInput:
    """The right answer, with the queries scaled in place."""

    def attention(self, q, k, v, *, causal=False):
        out = right(q, k, v, causal=causal)
        with torch.no_grad():
            q.mul_(2)
        return out


@fake
class PrintsMegabytes:
    """A megabyte on either stream for each call, and zeros."""

    def attention(self, q, k, v, *, causal=False):
        print("out " * 250_000)
        print("err " * 250_000, file=sys.stderr)
        return torch.zeros_like(right(q, k, v, causal=causal))


@fake
class IgnoresOptions:
    """Takes every option and does nothing with it."""

    def attention(self, q, k, v, **options):
        return right(q, k, v)


@fake
class CallsExit:
    """Ends the interpreter as a script does."""

    def attention(self, q, k, v, *, causal=False):
        sys.exit(0)


@fake
class RaisesOnce:
    """An exception in the sixth call, and in no other."""

    calls = 0

    def attention(self, q, k, v, *, causal=False):
        self.calls += 1
        if self.calls == 6:
            raise RuntimeError("out of luck")
        return right(q, k, v, causal=causal)


@fake
class RaisesForLongKeys:
    """An exception where there are more keys than queries."""

    def attention(self, q, k, v, *, causal=False):
        if k.shape[2] > q.shape[2]:
            raise IndexError("index 7 is out of bounds\nsecond line")
        return right(q, k, v, causal=causal)


@fake
class RaisesLongMessage:
    """An exception whose message is a megabyte long."""

    def attention(self, q, k, v, *, causal=False):
        raise ValueError("long " * 200_000)


@fake
class Hangs:
    """Sleeps in a call."""

    def attention(self, q, k, v, *, causal=False):
        time.sleep(3600)


@fake
class HangsForGood:
    """Sleeps in a call, and takes every interruption for an error to try again after."""

    def attention(self, q, k, v, *, causal=False):
        while True:
            try:
                time.sleep(3600)
            except BaseException:
                continue


@fake
class EndsProcess:
    """Ends the process at once, with success."""

    def attention(self, q, k, v, *, causal=False):
        os._exit(0)


@fake
class WrongSignature:
    """Takes one tensor with everything in it."""

    def attention(self, qkv):
        return qkv


@fake
class RequiresMore:
    """Requires an option that the contract does not have."""

    def attention(self, q, k, v, *, rotary):
        return right(q, k, v)


@fake
class OffersNothing:
    """Has no method of any contract."""


@fake
class DeclinesEverything:
    """Declines every case."""

    def attention(self, q, k, v, *, causal=False):
        raise NotImplementedError("not today")


@fake
class LosesARank(ParallelLinear):
    """The process of the second rank ends."""

    def parallel_linear(self, kind, weights, **options):
        if torch.distributed.get_rank() == 1:
            os._exit(0)
        return super().parallel_linear(kind, weights, **options)


@fake
class HangsOnARank(ParallelLinear):
    """The second rank never comes to the reduction."""

    def parallel_linear(self, kind, weights, **options):
        if torch.distributed.get_rank() == 1:
            time.sleep(BOUND_OF_A_RANK)
        return super().parallel_linear(kind, weights, **options)


BOUND_OF_A_RANK = 300
