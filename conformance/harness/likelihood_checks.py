"""Checks of log likelihoods: values, what they add up to, what is greedy, and what is left behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.harness.calls import Call, dtype_name
from conformance.harness.compare import assert_close_to
from conformance.harness.failures import ConformanceFailure, Inconclusive
from conformance.harness.lanes import in_every_lane
from conformance.harness.likelihood_cases import Ids, LikelihoodCase, Request
from conformance.harness.likelihood_model import TinyLM
from conformance.harness.likelihood_oracle import in_float64, run_alone, truth, window
from conformance.harness.likelihood_subject import (
    Ran,
    bad,
    counted,
    error_in_model,
    gives_tokens,
    greedy_flags,
    modes_of,
    need_tokens,
    ran,
    ran_with,
    sums,
    tokens,
)
from conformance.harness.memo import remembered
from conformance.harness.subject import Subject

# Values


def compare(found: Ran, call: Call) -> None:
    """What was found is right: of each token, if single tokens are given, and in sum."""
    right = truth(call)
    with worst_shown(found, call):
        if gives_tokens(found):
            assert_close_to(tokens(found), right.tokens, call, name="log probabilities")
        assert_close_to(sums(found), right.sums, call, name="sums")


@contextmanager
def worst_shown(found: Ran, call: Call) -> Iterator[None]:
    """A failure shows the request that is the farthest off."""
    try:
        yield
    except ConformanceFailure as failure:
        apart = (sums(found) - truth(call).sums.value).abs()
        number = int(torch.where(apart.isnan(), torch.inf, apart).argmax())
        context, continuation = call.named("requests")[number]
        right = [round(x, 6) for x in truth(call).each[number].tolist()]
        shown = f"out[{number}].logprobs"
        failure.shown_by = f"print({shown}, 'expected', {right}, 'of', requests[{number}])"
        failure.details += (
            f"farthest off is request {number} of {len(found.logprobs)}, with a context of "
            f"{len(context)} and a continuation of {len(continuation)} tokens",
        )
        raise


def assert_right(subject: Subject, case: LikelihoodCase, *edits: str, **options: str) -> None:
    """Every score is that of the oracle, in the dtypes of the case."""

    def check(call: Call) -> None:
        call = call.then(*edits, **options)
        compare(ran(subject, call), call)

    in_every_lane(case, check, subject.device)


def assert_tokens_right(subject: Subject, case: LikelihoodCase) -> None:
    """The log probability of every token is that of the oracle."""
    call = case.call(torch.float32, subject.device)
    found = ran(subject, call)
    need_tokens(found)
    compare(found, call)


def assert_one_per_token(subject: Subject, case: LikelihoodCase) -> None:
    """As many numbers as the continuation has tokens; the shapes are checked where they are read."""
    found = ran(subject, case.call(torch.float32, subject.device))
    need_tokens(found)
    counted()


def assert_wide(subject: Subject, case: LikelihoodCase) -> None:
    """Log probabilities are float32 or float64, whatever the model is in."""
    for dtype in (torch.bfloat16, torch.float32):
        call = case.call(dtype, subject.device)
        counted()
        for number, x in enumerate(ran(subject, call).logprobs):
            if x.dtype not in (torch.float32, torch.float64):
                summary = f"logprobs are {dtype_name(x.dtype)}, expected float32 or wider"
                raise bad("wrong dtype", summary, call, f"print(out[{number}].logprobs.dtype)")


def assert_in_both_orders(subject: Subject, case: LikelihoodCase) -> None:
    """The scores are those of the requests, forwards and backwards."""
    for requests in (case.requests, case.requests[::-1]):
        assert_right(subject, replace(case, requests=requests))


def assert_as_written(subject: Subject, case: LikelihoodCase, write) -> None:
    """The same scores for requests that are written in another way than as lists."""
    call = case.call(torch.float32, subject.device, written=write)
    compare(ran(subject, call), call)


def assert_none(subject: Subject, case: LikelihoodCase) -> None:
    """No requests have no scores."""
    call = case.call(torch.float32, subject.device, written=lambda requests: "[]")
    ran(subject, call)
    counted()


# What values add up to


def assert_cross_entropy(subject: Subject, case: LikelihoodCase) -> None:
    """Sums are −cross entropy, summed over labels that are −100 in the context."""
    call = case.call(torch.float32, subject.device)
    found, model = ran(subject, call), in_float64(call.named("model"))
    losses = torch.stack([cross_entropy(model, *request) for request in call.named("requests")])
    right = replace(truth(call).sums, value=-losses)
    with worst_shown(found, call):
        assert_close_to(sums(found), right, call, name="sums")


def cross_entropy(model: TinyLM, context: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """The loss of a model for a whole text of which only the continuation is learnt, in sum."""
    ids = torch.tensor([[*context, *continuation]])
    labels = ids.clone()
    labels[:, : len(context)] = -100
    with torch.no_grad():
        logits = model(ids).logits
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum"
    )


def assert_additive(subject: Subject, case: LikelihoodCase) -> None:
    """The score of a continuation is the sum of those of its tokens, each after all before it."""
    pieces, parts = [], []
    for context, continuation in case.requests:
        parts.append(range(len(pieces), len(pieces) + len(continuation)))
        text = (*context, *continuation)
        ends = range(len(context), len(text))
        pieces += [(text[:end], text[end : end + 1]) for end in ends]
    whole, split = case, replace(case, requests=tuple(pieces))
    calls = [each.call(torch.float32, subject.device) for each in (whole, split)]
    of_whole, of_pieces = (sums(ran(subject, call)) for call in calls)
    limit, of_one = (truth(call).sums.limits.largest for call in calls)
    counted()
    for number, (score, part) in enumerate(zip(of_whole.tolist(), parts)):
        added = float(of_pieces[part].sum())
        if not abs(score - added) <= limit + len(part) * of_one:
            summary = f"request {number} has {score:.7g}, and token by token {added:.7g}"
            shown = f"print(out[{number}].logprobs.sum(), 'expected', {added})"
            raise bad("not additive", summary, calls[0], shown)


def assert_sums_to_one(subject: Subject, case: LikelihoodCase, length: int) -> None:
    """The probabilities of all continuations of a length add up to 1."""
    context = case.requests[0][0]
    every = torch.cartesian_prod(*[torch.arange(case.vocab)] * length).view(-1, length).tolist()
    source = random.Random(case.seed)
    requests = tuple((context, tuple(ids)) for ids in source.sample(every, len(every)))
    call = replace(case, requests=requests).call(torch.float32, subject.device)
    total = float(sums(ran(subject, call)).exp().sum())
    # Each logarithm is off by at most a limit, and so is that of their sum.
    limit = truth(call).sums.limits.largest
    counted()
    if not abs(total - 1) <= 2 * limit:
        summary = (
            f"{len(requests)} continuations that are all there are have probability {total:.7g}"
        )
        shown = "print(sum(x.logprobs.sum().exp() for x in out), 'expected 1')"
        raise bad("wrong values", summary, call, shown)


# Truncation


def assert_width(subject: Subject, case: LikelihoodCase) -> None:
    """The model is never given more tokens of a request than it may be."""
    call = case.call(torch.float32, subject.device)
    widest = max((seen.columns for seen in ran(subject, call).seen), default=0)
    counted()
    if widest > case.limit:
        summary = f"the model was given {widest} tokens at once, at most {case.limit} are allowed"
        raise bad("too many tokens", summary, call, "print(max(x.columns for x in model.seen))")


def assert_rows(subject: Subject, case: LikelihoodCase) -> None:
    """The model is never given more rows than ``batch_size``."""
    call = case.call(torch.float32, subject.device)
    most = max((seen.rows for seen in ran(subject, call).seen), default=0)
    counted()
    if most > case.batch_size:
        summary = f"the model was given {most} rows at once, batch_size is {case.batch_size}"
        raise bad("too many rows", summary, call, "print(max(x.rows for x in model.seen))")


# What is greedy


@remembered
def with_greedy(
    case: LikelihoodCase, dtype: torch.dtype, wrong: tuple[str | None, ...], edits: tuple[str, ...]
) -> LikelihoodCase:
    """The case with the most likely tokens for continuations, in turn but for one of them.

    ``wrong`` says which one is another, of each request: ``"first"``, ``"last"`` or none.
    """
    model = in_float64(case.call(dtype, "cpu", *edits).named("model"))
    source, requests = random.Random(case.seed), []
    for number, (context, continuation) in enumerate(case.requests):
        other = wrong[number % len(wrong)]
        at = {"first": 0, "last": len(continuation) - 1, None: None}[other]
        chosen: Ids = ()
        for place in range(len(continuation)):
            shown, _ = window((context, (*chosen, 0)), case.limit)
            best = int(run_alone(model, shown)[-1].argmax())
            if place == at:
                best = source.choice([id for id in range(case.vocab) if id != best])
            chosen = (*chosen, best)
        requests.append((context, chosen))
    return replace(case, requests=tuple(requests))


def assert_greedy(
    subject: Subject, case: LikelihoodCase, *edits: str, wrong: tuple[str | None, ...] = (None,)
) -> None:
    """``is_greedy`` is true where every token is the most likely one, and elsewhere false."""

    def check(call: Call) -> None:
        named = with_greedy(case, call.dtype, wrong, edits)
        assert_flags(subject, named.call(call.dtype, subject.device, *edits))

    in_every_lane(case, check, subject.device)


def assert_flags(subject: Subject, call: Call) -> None:
    """``is_greedy`` is right, where rounding does not decide."""
    expected = truth(call).greedy
    found = greedy_flags(ran(subject, call))
    if all(flag is None for flag in expected):
        raise Inconclusive("the most likely tokens are hardly more likely than others")
    counted()
    for number, (flag, right) in enumerate(zip(found, expected)):
        if right is not None and flag != right:
            summary = f"is_greedy of request {number} is {flag}, expected {right}"
            shown = f"print(out[{number}].is_greedy, 'expected', {right})"
            raise bad("wrong values", summary, call, shown)


TIE = "with torch.no_grad(): model.logits_SV[:, [2, 5]] = model.logits_SV.max() + 1"
TIED = (2, 5)
"""The tokens that are the two most likely everywhere, after that line."""


def assert_tie(subject: Subject, case: LikelihoodCase) -> None:
    """Of two tokens that are both the most likely one or both are greedy; no other is."""
    context = case.requests[0][0]
    requests = tuple((context, (id,)) for id in range(case.vocab))
    call = replace(case, requests=requests).call(torch.float32, subject.device, TIE)
    found = greedy_flags(ran(subject, call))
    counted()
    chosen = {id for id, flag in enumerate(found) if flag}
    if not chosen or not chosen <= set(TIED):
        summary = f"of the most likely tokens {TIED} none is greedy, or another: {sorted(chosen)}"
        raise bad("wrong values", summary, call, "print([x.is_greedy for x in out])")


# What is left behind


def assert_mode_back(subject: Subject, case: LikelihoodCase) -> None:
    """The model and its parts have the modes that they had."""
    call = case.call(torch.float32, subject.device)
    assert_modes(ran(subject, call).modes, call)


def assert_mode_back_after_error(subject: Subject, case: LikelihoodCase) -> None:
    """The model has its mode back although it raised."""
    call = case.call(torch.float32, subject.device, "model.fails_at = 0")
    assert_modes(error_in_model(subject, call), call)


def assert_modes(found: tuple[bool, ...], call: Call) -> None:
    """The modes found afterwards are those of before."""
    before = modes_of(call.named("model"))
    counted()
    if found != before:
        summary = f"training mode of the model and its parts was {before}, and is {found}"
        shown = f"print([m.training for m in model.modules()], 'expected', {list(before)})"
        raise bad("mode not restored", summary, call, shown)


def assert_no_graph(subject: Subject, case: LikelihoodCase) -> None:
    """The model runs without gradients, and log probabilities have none."""
    call = case.call(torch.float32, subject.device)
    found = ran(subject, call)
    counted()
    if any(x.requires_grad for x in found.logprobs):
        raise bad("gradients", "logprobs require gradients", call, "print(out[0].logprobs)")
    if any(seen.gradients for seen in found.seen):
        shown = "print([x.gradients for x in model.seen], 'expected False')"
        raise bad("gradients", "the model was run with gradients recorded", call, shown)


def assert_autograd_back(subject: Subject, case: LikelihoodCase) -> None:
    """Autograd records afterwards as it did before, or does not as it did not."""
    call = case.call(torch.float32, subject.device)
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            after = ran(subject, call).gradients
        counted()
        if after != recording:
            summary = f"autograd was {on(recording)} before, and is {on(after)}"
            shown = f"print(torch.is_grad_enabled(), 'expected', {recording})"
            raise bad("gradients", summary, call, shown)


def on(recording: bool) -> str:
    """In words."""
    return "on" if recording else "off"


OTHER_WEIGHTS = (
    "with torch.no_grad():",
    "    for weight in model.parameters(): weight.copy_(weight.flip(-1))",
)


def assert_new_weights(subject: Subject, case: LikelihoodCase) -> None:
    """The scores of a model whose weights were changed in place are those of its new weights."""
    call = case.call(torch.float32, subject.device)
    changed = call.then(*OTHER_WEIGHTS)
    (shared, requests), options = call.values()
    model = copy.deepcopy(shared)
    compare(ran_with(subject, call, model, requests, options), call)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.flip(-1))
    with shown_again(call, OTHER_WEIGHTS):
        compare(ran_with(subject, changed, model, requests, options), changed)


def assert_other_model(subject: Subject, case: LikelihoodCase) -> None:
    """Requests that come again to another model have its scores, and to the first one as before."""
    calls = [replace(case, seed=seed).call(torch.float32, subject.device) for seed in (1, 2)]
    for call in (*calls, calls[0]):
        compare(ran(subject, call), call)


def assert_other_requests(subject: Subject, case: LikelihoodCase) -> None:
    """Other requests of one model have their own scores, and the first ones again theirs."""
    exchanged = tuple((b, a) for a, b in case.requests)
    both = (case.requests, exchanged, case.requests)
    calls = [replace(case, requests=x).call(torch.float32, subject.device) for x in both]
    model = calls[0].named("model")
    for call in calls:
        _, options = call.values()
        compare(ran_with(subject, call, model, call.named("requests"), options), call)


@contextmanager
def shown_again(first: Call, lines: Sequence[str]) -> Iterator[None]:
    """A failure of a second call is reproduced by the first, these lines, and the same call."""
    try:
        yield
    except ConformanceFailure as failure:
        again = f"again = {first.source()}"
        failure.shown_by = "\n".join([*lines, again, failure.shown_by.replace("out[", "again[")])
        failure.call = first
        raise


# Bad requests


def with_bad(case: LikelihoodCase, request: Request) -> LikelihoodCase:
    """The case with a bad request among the others."""
    return replace(case, requests=(*case.requests[:1], request, *case.requests[1:]))
