"""What a router must choose, and with what weights, in float64.

A second formulation, on purpose: experts are compared with each other pair by pair and weights are a
dense matrix [T, E] of zeros and scores; there is no sorting, gathering or top-k. Axes are T tokens, E
experts, G groups and M members of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call
from conformance.harness.differentiated import Differentiated, differentiate
from conformance.harness.memo import remembered
from conformance.harness.tolerance import STEP_ERROR, Expectation, expect

UNCLEAR = 2.0**-17
"""Scores are in float32 at least: which of two experts is better is unclear within such a share of
score and bias, which is 128 times the rounding of float32."""
VANISHED = 1e-30
"""Scores below are not told from zero: exponentials underflow, and tiny numbers may be flushed."""


@dataclass(frozen=True)
class Choice:
    """Which experts tokens go to."""

    chosen: Tensor
    """bool [T, E], ties going to the lowest index."""
    clear: Tensor
    """bool [T]: whether no rounding can make the choice another."""
    ranked: Tensor
    """float64 [T, E], what experts are chosen by; -inf for those of groups that are not kept."""


def scores(logits: Tensor, score: str) -> Tensor:
    """Softmax or sigmoid [T, E], from exponentials of numbers that are not positive."""
    if score == "sigmoid":
        small = torch.exp(-logits.abs())
        return torch.where(logits >= 0, 1, small) / (1 + small)
    powers = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def best(ranked: Tensor, number: int) -> Tensor:
    """The ``number`` best of the last axis, bool: those that fewer than so many are better than."""
    this, other = ranked[..., :, None], ranked[..., None, :]
    place = torch.arange(ranked.shape[-1], device=ranked.device)
    before = (other > this) | ((other == this) & (place[None, :] < place[:, None]))
    return before.sum(-1) < number


def apart(ranked: Tensor, error: Tensor, chosen: Tensor) -> Tensor:
    """Whether everything chosen is better than anything else by more than the errors of both."""
    least = torch.where(chosen, ranked - error, torch.inf).amin(-1)
    most = torch.where(chosen, -torch.inf, ranked + error).amax(-1)
    return least > most


def choose(
    scores_TE: Tensor,
    error_TE: Tensor,
    top_k: int,
    bias: Tensor | None,
    groups: tuple[int, int] | None,
) -> Choice:
    """The experts of each token; ``error_TE`` is how far off a score may be."""
    ranked_TE = scores_TE if bias is None else scores_TE + bias
    clear_T = torch.ones(len(ranked_TE), dtype=torch.bool, device=ranked_TE.device)
    if groups is not None:
        number, kept = groups
        ranked_TGM = ranked_TE.unflatten(-1, (number, -1))
        counted_TGM = best(ranked_TGM, 1 if bias is None else 2)
        worth_TG = torch.where(counted_TGM, ranked_TGM, 0).sum(-1)
        error_TG = 2 * error_TE.unflatten(-1, (number, -1)).amax(-1)
        kept_TG = best(worth_TG, kept)
        clear_T = apart(worth_TG, error_TG, kept_TG)
        members = ranked_TGM.shape[-1]
        kept_TE = kept_TG.repeat_interleave(members, dim=-1)
        ranked_TE = torch.where(kept_TE, ranked_TE, -torch.inf)
    chosen_TE = best(ranked_TE, top_k)
    return Choice(chosen_TE, clear_T & apart(ranked_TE, error_TE, chosen_TE), ranked_TE)


def dense_weights(
    scores_TE: Tensor, chosen_TE: Tensor, normalize: bool, scaling_factor: float
) -> Tensor:
    """Weights [T, E], zero for experts that are not chosen."""
    weights_TE = scores_TE * chosen_TE
    if normalize:
        weights_TE = weights_TE / weights_TE.sum(-1, keepdim=True)
    return weights_TE * scaling_factor


def float64_options(call: Call) -> tuple[Tensor, dict[str, Any]]:
    """Logits and options of a call on the CPU, tensors in float64."""
    (logits,), options = call.values()
    bias = options.get("selection_bias")
    if isinstance(bias, Tensor):
        options["selection_bias"] = bias.cpu().double()
    return logits.detach().cpu().double(), options


@remembered
def expected_choice(call: Call) -> Choice:
    """The choice that a call must lead to."""
    logits, options = float64_options(call)
    scores_TE, bias = scores(logits, options.get("score", "softmax")), options.get("selection_bias")
    size_TE = scores_TE if bias is None else scores_TE + bias.abs()
    error_TE = UNCLEAR * size_TE + VANISHED
    return choose(scores_TE, error_TE, options["top_k"], bias, options.get("groups"))


def as_rows(dense_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """The chosen entries [T, K] in the order of experts; every token has as many."""
    return dense_TE[chosen_TE].unflatten(0, (len(dense_TE), -1))


@dataclass(frozen=True)
class Weights:
    """Weights [T, K] of chosen experts, in the order of experts, and the gradient of the logits."""

    exact: Differentiated
    """Computed from the logits of the call as float32 computes it."""
    rounded: Differentiated
    """The same with the noise of the dtype of the call."""

    def expectation(self, dtype: torch.dtype) -> Expectation:
        """What weights of this dtype must be: computed in float32, and rounded to it."""
        value, noise = self.exact.values["output 0"], self.exact.noise["output 0"]
        noise = noise * STEP_ERROR[torch.float32] / STEP_ERROR[dtype]
        noise = noise if dtype == torch.float32 else noise + value.abs()
        expectation = expect(value, [], noise, dtype)
        # Weights that are equal are rounded alike: their errors are one, however many they are.
        limits = expectation.limits
        limits = replace(limits, gain=max(limits.gain, 2 * STEP_ERROR[dtype]))
        return replace(expectation, limits=limits)

    def gradient(self) -> Expectation:
        """What the gradient of the logits must be."""
        return self.rounded.expectation("logits")


def expected_weights(call: Call, chosen_TE: Tensor) -> Weights:
    """The weights of the experts that were chosen, which may be others where that is unclear."""
    if torch.equal(chosen_TE, expected_choice(call).chosen):
        return _weights_of_the_best(call)
    return _weights(call, chosen_TE)


@remembered
def _weights_of_the_best(call: Call) -> Weights:
    return _weights(call, expected_choice(call).chosen)


def _weights(call: Call, chosen_TE: Tensor) -> Weights:
    (logits,), options = call.values()
    kind, normalize = options.get("score", "softmax"), options.get("normalize", False)
    factor = options.get("scaling_factor", 1.0)

    def weights(logits: Tensor) -> tuple[Tensor]:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        dense_TE = dense_weights(scores(wide, kind), chosen_TE, normalize, factor)
        return (as_rows(dense_TE, chosen_TE),)

    return both(weights, {"logits": logits.detach().cpu()}, call)


def both(function: Any, inputs: Mapping[str, Tensor], call: Call) -> Weights:
    """The oracle of a function of the logits, as of float32 and as of the dtype of the call."""
    seed = call.case.seed
    rounded = differentiate(function, inputs, call.dtype, seed)
    if call.dtype == torch.float32:
        return Weights(rounded, rounded)
    wide = {name: x.float() for name, x in inputs.items()}
    return Weights(differentiate(function, wide, torch.float32, seed), rounded)


@remembered
def expected_loss(call: Call) -> Differentiated:
    """The load-balancing loss of a call, and its gradient: what share of slots experts get is given."""
    logits = call.values()[0][0].detach().cpu()
    share_E = expected_choice(call).chosen.double().mean(0)

    def loss(logits: Tensor, share: Tensor) -> tuple[Tensor]:
        mean_E = scores(logits, "softmax").mean(0)
        return ((len(share) * share @ mean_E.to(share))[None],)

    # An input, so that the noise has what rounding the share does to gradients, which cancel.
    inputs = {"logits": logits, "share": share_E}
    return differentiate(loss, inputs, call.dtype, call.case.seed)
