"""Cases of log likelihoods: a small model, requests of many lengths, and how they are batched.

Hypothesis draws lengths, and a seed that the ids go by. No two requests have the same length, but
where that is the point, and they are not sorted: whoever pads, sorts or slices has something to mix up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, shown_case
from conformance.harness.likelihood_lines import stand_alone
from conformance.harness.qwen2_cases import as_strategy

Ids = tuple[int, ...]
Request = tuple[Ids, Ids]
Lengths = tuple[tuple[int, int], ...]
"""Of each request the lengths of its context and its continuation."""

MAKER = "from conformance.harness.likelihood_model import tiny_lm"
ORDINARY = {"batch_size": 1, "padding_side": "right", "pad_id": 0, "max_length": None}
"""The defaults of the contract, which calls leave out."""
MODES = {
    "evaluation": (),
    "training": ("model.train()",),
    "training but for dropout": ("model.train()", "model.dropout.eval()"),
    "evaluation but for dropout": ("model.dropout.train()",),
}
"""The modes of the model and its only part, and the lines that set them."""


@dataclass(frozen=True)
class LikelihoodCall(Call):
    """A call whose model comes from this package, and is written out where it is printed."""

    @property
    def printed(self) -> tuple[str, ...]:
        """The lines, with the model's own in the place of its import."""
        model = stand_alone(self.case.kind)
        own = (model if line == MAKER else (line,) for line in self.lines)
        return tuple(line for lines in own for line in lines)


@dataclass(frozen=True, kw_only=True)
class LikelihoodCase:
    """A model, requests, and how they are batched."""

    requests: tuple[Request, ...] = ()
    batch_size: int = 1
    padding_side: str = "right"
    pad_id: int = 0
    max_length: int | None = None
    kind: str = "states"
    vocab: int = 13
    positions: int = 24
    mode: str = "evaluation"
    dtype: str = "float32"
    seed: int = 0

    def __repr__(self) -> str:
        """The requests, and whatever is not at its default."""
        return shown_case(self, always=1)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set()
        totals = [len(context) + len(continuation) for context, continuation in self.requests]
        if len(totals) < 2:
            equal.add("one request")
        if len(set(totals)) < 2:
            equal.add("equal lengths")
        elif totals == sorted(totals):
            equal.add("shortest first")
        elif totals == sorted(totals, reverse=True):
            equal.add("longest first")
        if all(len(context) == len(continuation) for context, continuation in self.requests):
            equal.add("contexts as long as continuations")
        return frozenset(equal)

    @property
    def limit(self) -> int:
        """The most tokens that the model is given at once."""
        return self.positions if self.max_length is None else self.max_length

    def call(
        self,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *edits: str,
        written: Callable[[Sequence[Request]], str] | None = None,
        **options: str,
    ) -> Call:
        """The call; ``edits`` are lines that change ``model``, options are source text.

        ``written`` writes the requests in another way than as lists.
        """
        model = {"seed": str(self.seed), "vocab": str(self.vocab), "positions": str(self.positions)}
        if dtype != torch.float32:
            model["dtype"] = str(dtype)
        if device != "cpu":
            model["device"] = repr(device)
        given = ", ".join(f"{name}={value}" for name, value in model.items())
        own = {name: getattr(self, name) for name in ORDINARY}
        chosen = {name: repr(x) for name, x in own.items() if x != ORDINARY[name]}
        return LikelihoodCall(
            "loglikelihood",
            (
                MAKER,
                f"model = tiny_lm({self.kind!r}, {given})",
                *MODES[self.mode],
                f"requests = {(written or as_lists)(self.requests)}",
                *edits,
            ),
            ("model", "requests"),
            tuple((chosen | options).items()),
            dtype=dtype,
            case=self,
        )


def as_lists(requests: Sequence[Request]) -> str:
    """The requests as source text, as lm-eval has them: a list of pairs of lists."""
    return repr([(list(context), list(continuation)) for context, continuation in requests])


def as_tuples(requests: Sequence[Request]) -> str:
    """The requests as source text: tuples all the way."""
    return repr(tuple(requests))


# Requests of given lengths

Build = Callable[[random.Random, int, Lengths], list[Request]]


def ids_of(source: random.Random, vocab: int, length: int) -> Ids:
    """So many ids."""
    return tuple(source.choices(range(vocab), k=length))


def independent(source: random.Random, vocab: int, lengths: Lengths) -> list[Request]:
    """Requests that have nothing in common."""
    return [(ids_of(source, vocab, a), ids_of(source, vocab, b)) for a, b in lengths]


def one_context(source: random.Random, vocab: int, lengths: Lengths) -> list[Request]:
    """Several continuations of one context, and another request between them."""
    context = ids_of(source, vocab, lengths[0][0] + 1)
    found = [(context, ids_of(source, vocab, b)) for _, b in lengths]
    return [found[0], *independent(source, vocab, lengths[1:2]), *found[1:]]


def letters(source: random.Random, vocab: int, lengths: Lengths) -> list[Request]:
    """Multiple choice: contexts with the same few single tokens to choose from, next to each other."""
    choices = source.sample(range(vocab), 4)
    return [(ids_of(source, vocab, a), (id,)) for a, _ in lengths[:3] for id in choices]


def nested(source: random.Random, vocab: int, lengths: Lengths) -> list[Request]:
    """Every context is the beginning of one text, and every continuation is what follows in it."""
    text = ids_of(source, vocab, max(a + b for a, b in lengths))
    return [(text[:a], text[a : a + b]) for a, b in lengths]


def split_anywhere(source: random.Random, vocab: int, lengths: Lengths) -> list[Request]:
    """The same text, with its continuation beginning anywhere; and another one."""
    text = ids_of(source, vocab, lengths[0][0] + lengths[0][1] + 1)
    found = [(text[:at], text[at:]) for at in range(1, len(text))]
    source.shuffle(found)
    return [*found[:2], *independent(source, vocab, lengths[1:2]), *found[2:6]]


def two_tokens(source: random.Random, vocab: int, lengths: Lengths) -> list[Request]:
    """Nothing but two tokens, in contexts that share their beginnings."""
    pair = source.sample(range(vocab), 2)
    text = source.choices(pair, k=max(a for a, _ in lengths))
    return [(tuple(text[:a]), tuple(source.choices(pair, k=b))) for a, b in lengths]


def with_pad(source: random.Random, vocab: int, lengths: Lengths) -> list[Request]:
    """The token that pads, 0, is everywhere: at both ends of contexts and of continuations."""
    found = []
    for context, continuation in independent(source, vocab, lengths):
        inner = [id if source.random() < 0.5 else 0 for id in (*context, *continuation)]
        begin, a = (0, *inner[: len(context)], 0), len(continuation)
        found.append((begin, (0, *inner[len(inner) - a :], 0)))
    return found


def repeated(source: random.Random, vocab: int, lengths: Lengths) -> list[Request]:
    """Requests that come two and three times, not next to each other."""
    found = independent(source, vocab, lengths)
    return [*found, found[0], *found[:2]]


# Lengths

SHORT = st.tuples(st.integers(1, 7), st.integers(1, 5))
LONG = st.tuples(st.integers(13, 15), st.integers(1, 4))
SMALLEST = st.tuples(st.integers(1, 2), st.integers(1, 2))


def mixed(lengths: Sequence[tuple[int, int]]) -> Lengths:
    """Neither the shortest nor the longest first."""
    ordered = sorted(lengths, key=sum)
    return tuple(ordered[1::2] + ordered[::2][::-1] if len(ordered) > 2 else ordered[::-1])


def several(
    each: SearchStrategy[tuple[int, int]] = SHORT, least: int = 3, most: int = 6
) -> SearchStrategy[Lengths]:
    """Requests of pairwise different lengths."""
    listed = st.lists(each, min_size=least, max_size=most, unique_by=sum)
    return listed.map(mixed)


SEVERAL = several()
SINGLE = SHORT.map(lambda each: (each,))
COMPANY = st.tuples(LONG, SMALLEST, several(LONG, least=1, most=2), SHORT).map(
    lambda drawn: (drawn[0], drawn[1], *drawn[2], drawn[3])
)
"""Short requests among much longer ones."""
ONE_TOKEN = several(st.tuples(st.integers(1, 9), st.just(1)))
ONE_CONTEXT = several(st.tuples(st.just(1), st.integers(1, 8)))

MODELS = st.sampled_from([(11, 20), (13, 24), (17, 22), (12, 19)])
"""Sizes of the vocabulary, and positions: no request of these lengths is truncated by them."""
SEEDS = st.integers(0, 3)
"""Few, so that a model and its perturbed copies serve several cases."""


def likelihood_cases(
    lengths: SearchStrategy[Lengths] = SEVERAL, *, build: Build = independent, **fixed: object
) -> SearchStrategy[LikelihoodCase]:
    """Cases with requests of such lengths; a strategy or a value fixes a field."""
    return _likelihood_cases(lengths, build, fixed)


@st.composite
def _likelihood_cases(
    draw: st.DrawFn, lengths: SearchStrategy[Lengths], build: Build, fixed: dict[str, Any]
) -> LikelihoodCase:
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    vocab, positions = draw(MODELS)
    given = {"vocab": vocab, "positions": positions, "seed": draw(SEEDS)} | given
    source = random.Random(draw(st.integers(0, 2**16)))
    return LikelihoodCase(requests=tuple(build(source, given["vocab"], draw(lengths))), **given)


# Truncation

BEYOND = (3, -1, 1, 0, 2)
"""How many tokens more than ``limit`` requests have; with one more nothing is lost yet."""
AROUND = st.just(BEYOND)


@st.composite
def truncated_cases(
    draw: st.DrawFn,
    beyond: SearchStrategy[Sequence[int]] = AROUND,
    *,
    shorter: bool = False,
    fills: bool = False,
    **fixed: object,
) -> LikelihoodCase:
    """Cases with requests around the longest that the model can be given, not shorter ones alone.

    ``shorter``: ``max_length`` is given, and below the model's. ``fills``: continuations of exactly
    that length, between others.
    """
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    vocab, positions = draw(MODELS)
    given = {"vocab": vocab, "positions": positions, "seed": draw(SEEDS)} | given
    if shorter:
        given["max_length"] = draw(st.integers(6, 11))
    limit = given.get("max_length") or given["positions"]
    source = random.Random(draw(st.integers(0, 2**16)))
    lengths = []
    for more in draw(beyond):
        continuation = limit if fills and more > 0 else draw(st.integers(1, 4))
        lengths.append((limit + more - continuation, continuation))
    found = independent(source, given["vocab"], (*lengths, *draw(several(SMALLEST, 1, 2))))
    return LikelihoodCase(requests=tuple(found), **given)
