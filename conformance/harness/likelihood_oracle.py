"""The oracle of log likelihoods: every token by a forward pass of its own, in float64.

Of each token of a continuation the model is given what stands before it, alone: no padding, no batch,
no mask, nothing behind it. Noise is what moving every weight at random does to the result.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.harness.calls import Call
from conformance.harness.differentiated import PERTURBATION, PERTURBED, moved_at_random
from conformance.harness.likelihood_cases import Ids, Request
from conformance.harness.likelihood_model import TinyLM
from conformance.harness.memo import remembered
from conformance.harness.tolerance import Expectation, expect


@dataclass(frozen=True)
class Truth:
    """What the scores must be."""

    each: tuple[Tensor, ...]
    """log p of the tokens of each continuation, float64 [continuation]."""
    tokens: Expectation
    """Of all requests, one behind the other."""
    sums: Expectation
    """[requests]."""
    greedy: tuple[bool | None, ...]
    """Whether each continuation is the most likely one; None where rounding might decide."""


def truth(call: Call) -> Truth:
    """What the scores of a call must be."""
    options = call.values()[1]
    return _truth(call.lines, options.get("max_length"), call.dtype)


@remembered
def _truth(lines: tuple[str, ...], max_length: int | None, dtype: torch.dtype) -> Truth:
    named = Call("", lines, ()).namespace()
    model: TinyLM = named["model"]
    limit = model.config.max_position_embeddings if max_length is None else max_length
    windows = [window(request, limit) for request in named["requests"]]
    exact = in_float64(model)
    logits = [logits_by_prefixes(exact, *each) for each in windows]
    each = [logprobs(*pair) for pair in zip(logits, windows)]
    tokens = torch.cat(each)
    sums = torch.stack([x.sum() for x in each])
    noise_tokens, noise_sums = tokens.square(), sums.square()
    generator = torch.Generator().manual_seed(0)
    for _ in range(PERTURBED):
        moved_model = moved(exact, generator)
        found = [logprobs(logits_alone(moved_model, *each), each) for each in windows]
        change = [(one - other) / PERTURBATION for one, other in zip(found, each)]
        noise_tokens = noise_tokens + torch.cat(change).square()
        noise_sums = noise_sums + torch.stack([x.sum() for x in change]).square()
    variants, steps = [], torch.float32
    if dtype not in (torch.float32, torch.float64) and not model.looked_up:
        # Where rounding depends on the batch it is that of 16 bits; elsewhere only the softmax rounds.
        alone = copied(model).to("cpu")
        variants = [logprobs(logits_alone(alone, *one).double(), one) for one in windows]
        steps = dtype
    of_tokens = expect(
        tokens, [torch.cat(variants)] if variants else [], noise_tokens.sqrt(), steps
    )
    total = [torch.stack([x.sum() for x in variants])] if variants else []
    of_sums = expect(sums, total, noise_sums.sqrt(), steps)
    unsure = of_tokens.limits.largest
    greedy = tuple(is_most_likely(*pair, unsure) for pair in zip(logits, windows))
    return Truth(tuple(each), of_tokens, of_sums, greedy)


Window = tuple[Ids, Ids]
"""What the model is shown of a request, and the tokens that are scored."""


def window(request: Request, limit: int) -> Window:
    """The last ``limit`` of all tokens but the last one, and the continuation."""
    context, continuation = (tuple(ids) for ids in request)
    shown = (*context, *continuation)[:-1]
    return shown[max(0, len(shown) - limit) :], continuation


def logits_by_prefixes(model: TinyLM, shown: Ids, continuation: Ids) -> Tensor:
    """The logits [continuation, vocabulary] before each token, each by a pass over its prefix."""
    first = len(shown) - len(continuation) + 1
    ends = range(first, len(shown) + 1)
    return torch.stack([run_alone(model, shown[:end])[-1] for end in ends])


def logits_alone(model: TinyLM, shown: Ids, continuation: Ids) -> Tensor:
    """The same by one pass over the request alone."""
    return run_alone(model, shown)[len(shown) - len(continuation) :]


def run_alone(model: TinyLM, ids: Ids) -> Tensor:
    """The logits [tokens, vocabulary] of one row."""
    with torch.no_grad():
        every = torch.ones(1, len(ids), dtype=torch.bool)
        positions = torch.arange(len(ids))[None]
        return model.logits(torch.tensor([ids]), every, positions)[0]


def logprobs(logits: Tensor, one: Window) -> Tensor:
    """log p [continuation] of its tokens."""
    chosen = torch.tensor(one[1])
    return (logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)).detach()


def is_most_likely(logits: Tensor, one: Window, unsure: float) -> bool | None:
    """Whether no other token is as likely as the one in the continuation, at every place."""
    chosen = torch.tensor(one[1])[:, None]
    others = logits.scatter(-1, chosen, -torch.inf).amax(-1)
    ahead = logits.gather(-1, chosen)[:, 0] - others
    if bool((ahead < -unsure).any()):
        return False
    return True if bool((ahead > unsure).all()) else None


def copied(model: TinyLM) -> TinyLM:
    """A model of its own with the same weights, in evaluation mode."""
    return copy.deepcopy(model).eval()


def in_float64(model: TinyLM) -> TinyLM:
    """A copy in float64 on the CPU."""
    return copied(model).to("cpu", torch.float64)


def moved(model: TinyLM, generator: torch.Generator) -> TinyLM:
    """A copy with every weight off by a random share of itself."""
    other = copied(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(moved_at_random(weight, generator))
    return other
