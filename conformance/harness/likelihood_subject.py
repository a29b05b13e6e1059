"""Asking for log likelihoods, and watching what happens to the model and to the requests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call, dtype_name
from conformance.harness.failures import ConformanceFailure, Declined, failing_at
from conformance.harness.likelihood_cases import Request
from conformance.harness.likelihood_model import Seen, TinyLM
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, changes_caught, errors_named, first_line

Modes = tuple[bool, ...]
"""Whether the model is in training mode, and whether each of its parts is."""


@dataclass(frozen=True)
class Ran:
    """What one call gave and did."""

    scores: Sequence[Any]
    logprobs: tuple[Tensor, ...]
    """As they were given, of each request [continuation] or []."""
    seen: tuple[Seen, ...]
    """How the model was called."""
    modes: Modes
    """Those that the model had afterwards."""
    gradients: bool
    """Whether autograd was recording afterwards."""


def bad(kind: str, summary: str, call: Call, shown_by: str = "print(out)") -> ConformanceFailure:
    """A failure of this call."""
    return ConformanceFailure(kind, summary, call=call, shown_by=shown_by)


def counted() -> None:
    """Count one comparison of the exact lane."""
    current_tally().comparisons["exact"] += 1


def modes_of(model: TinyLM) -> Modes:
    """The modes of all modules."""
    return tuple(module.training for module in model.modules())


@contextmanager
def model_kept(model: TinyLM) -> Iterator[None]:
    """The model of a call is shared: it is as it was for whoever comes next."""
    modes, fails_at, gradients = modes_of(model), model.fails_at, torch.is_grad_enabled()
    model.seen.clear()
    try:
        with changes_caught([*model.parameters(), *model.buffers()]):
            yield
    finally:
        torch.set_grad_enabled(gradients)
        model.fails_at = fails_at
        for module, training in zip(model.modules(), modes):
            module.training = training


def ran(subject: Subject, call: Call) -> Ran:
    """What the call gives, with as many scores as requests, each with log probabilities."""
    (model, requests), options = call.values()
    return ran_with(subject, call, model, requests, options)


def ran_with(
    subject: Subject, call: Call, model: TinyLM, requests: Sequence[Request], options: dict
) -> Ran:
    """The same for a model, requests and options that the lines of the call may not give."""
    given = copy.deepcopy(requests)
    with failing_at(call), model_kept(model):
        found = subject(model, given, **options)
        if given != requests:
            shown = "print(requests, 'expected: not changed')"
            raise bad("changed input", "the requests were changed", call, shown)
        modes, gradients, seen = modes_of(model), torch.is_grad_enabled(), tuple(model.seen)
        found = as_sequence(found, len(requests), call)
        logprobs = tuple(
            logprobs_of(score, number, len(request[1]), call)
            for number, (score, request) in enumerate(zip(found, requests))
        )
    return Ran(found, logprobs, seen, modes, gradients)


def as_sequence(found: Any, number: int, call: Call) -> Sequence[Any]:
    """The scores: a sequence with one for each request."""
    with errors_named("the sequence of scores"):
        if not isinstance(found, Sequence):
            name = type(found).__name__
            raise bad("wrong type", f"the scores are {name}, expected a sequence", call)
        length = len(found)
    if length != number:
        shown = "print(len(out), 'expected', len(requests))"
        raise bad("wrong number", f"{length} scores of {number} requests", call, shown)
    return found


def logprobs_of(score: Any, number: int, length: int, call: Call) -> Tensor:
    """The log probabilities of a score: floating, [continuation] or []."""
    shown = f"print(out[{number}])"
    with errors_named("logprobs"):
        found = getattr(score, "logprobs", None)
    if not isinstance(found, Tensor):
        name = type(found).__name__
        raise bad("wrong type", f"logprobs is {name}, expected a tensor", call, shown)
    if not found.is_floating_point():
        raise bad("wrong dtype", f"logprobs are {dtype_name(found.dtype)}", call, shown)
    if tuple(found.shape) not in ((length,), ()):
        summary = f"logprobs of request {number} have shape {list(found.shape)}"
        raise bad("wrong shape", f"{summary}, expected [{length}]", call, shown)
    return found


def gives_tokens(found: Ran) -> bool:
    """Whether there is a number for each token, and not their sum alone."""
    return all(x.ndim == 1 for x in found.logprobs)


def need_tokens(found: Ran) -> None:
    """Decline what needs single tokens."""
    if not gives_tokens(found):
        raise Declined("gives the sums of log probabilities alone")


def sums(found: Ran) -> Tensor:
    """The log probabilities of whole continuations, float64 [requests]."""
    return torch.stack([x.detach().to("cpu", torch.float64).sum() for x in found.logprobs])


def tokens(found: Ran) -> Tensor:
    """The log probabilities of all tokens one behind the other, float64."""
    return torch.cat([x.detach().to("cpu", torch.float64) for x in found.logprobs])


def greedy_flags(found: Ran) -> list[bool]:
    """What each score says of being greedy."""
    flags = [getattr(score, "is_greedy", None) for score in found.scores]
    if any(flag is None for flag in flags):
        raise Declined("does not say what is greedy")
    with errors_named("is_greedy"):
        return [bool(flag) for flag in flags]


def assert_refused(subject: Subject, call: Call, why: str) -> None:
    """The call raises an exception: any will do."""
    (model, requests), options = call.values()
    counted()
    try:
        with failing_at(call), model_kept(model):
            found = subject(model, copy.deepcopy(requests), **options)
            with errors_named("the scores"):
                # What is computed only when it is looked at may refuse then.
                list(found) if isinstance(found, Sequence) else found
    except ConformanceFailure as failure:
        if failure.kind.startswith("raised"):
            return
        raise
    raise bad("accepted bad input", f"there is no exception for {why}", call)


def error_in_model(subject: Subject, call: Call) -> Modes:
    """The modes of the model after a call in which the model raises."""
    (model, requests), options = call.values()
    after: list[Modes] = []

    def observed() -> None:
        try:
            subject(model, copy.deepcopy(requests), **options)
        finally:
            after.append(modes_of(model))

    raised = outcome(observed, model, call)
    if raised is None:
        raise bad("swallowed an error", "the model raised, and nothing was said", call)
    return after[0]


def outcome(function: Callable[[], None], model: TinyLM, call: Call) -> str | None:
    """The kind of failure that a function ends with, if it raises; other failures go on."""
    try:
        with failing_at(call), model_kept(model):
            function()
    except ConformanceFailure as failure:
        if failure.kind.startswith("raised"):
            return first_line(failure)
        raise
    return None
