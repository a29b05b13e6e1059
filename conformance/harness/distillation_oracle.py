"""What a distillation loss must be, and its gradient, in float64.

A second formulation, on purpose: nothing is taken out of the batch, the labels are rolled instead of
the logits cut, divergences are differences of entropies, and the outcomes of a teacher that gives some
columns are made with a dense membership [B, T, V]. Axes are B batch, T tokens, V vocabulary, K columns
that the teacher gives, and O outcomes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.harness.calls import Call
from conformance.harness.differentiated import Differentiated, Function, differentiate
from conformance.harness.distillation_cases import IGNORED
from conformance.harness.memo import remembered
from conformance.harness.tolerance import STEP_ERROR, Expectation, expect

VANISHED = 1e-30
"""Gradients below it are zero in float32, by one way to compute them or another."""
VANISHED_MASS = 1e-9
"""Of the columns that are not given; 1 − Σ q may be below zero with a rounded normaliser."""


def on_cpu(values: Any) -> Any:
    """A tensor on the CPU, detached; anything else as it is."""
    return values.detach().cpu() if isinstance(values, Tensor) else values


def loss_of(labels_BT: Tensor, options: dict[str, Any]) -> Function:
    """The loss as a function of logits, and of what stands for the rounding of log probabilities.

    ``of_teacher``, ``of_student`` and ``of_mixture`` [B, T, O] are ones, by which log probabilities are
    multiplied: moved at random they give the noise of rounding them, which in the divergence of nearly
    equal distributions is all that there is. ``of_normalisers`` [B, T, 3] do so to log Σ exp of the
    student, the teacher and the cross entropy, which may be taken from large logits.
    """
    alpha, temperature = options.get("alpha", 0.5), options.get("temperature", 1.0)
    next_BT = labels_BT.roll(-1, dims=1)
    next_BT[:, -1] = IGNORED
    valid_BT = next_BT != IGNORED
    count = options.get("num_items_in_batch") or max(1, int(valid_BT.sum()))
    indices = options.get("teacher_indices")

    def loss(
        student: Tensor,
        teacher: Tensor,
        of_student: Tensor,
        of_teacher: Tensor,
        of_mixture: Tensor,
        of_normalisers: Tensor,
        logsumexp: Tensor | None = None,
    ) -> tuple[Tensor]:
        vocabulary = options.get("vocab_size") or student.shape[-1]
        student = student[..., :vocabulary]
        total = student.new_zeros(())
        of_first, of_second, of_third = of_normalisers.split(1, dim=-1)
        if alpha > 0:
            log_s = log_probabilities(student / temperature, of_first)
            if indices is None:
                log_q = log_probabilities(teacher[..., :vocabulary] / temperature, of_second)
            else:
                log_q, log_s = outcomes(teacher / temperature, logsumexp, log_s, indices)
            each_BT = divergence(log_q * of_teacher, log_s * of_student, of_mixture, options)
            total = total + alpha * temperature**2 * torch.where(valid_BT, each_BT, 0).sum()
        if alpha < 1:
            chosen = F.one_hot(torch.where(valid_BT, next_BT, 0), vocabulary).to(torch.bool)
            log_p = torch.where(chosen, log_probabilities(student, of_third), 0).sum(-1)
            rounding = of_student[..., 0]
            total = total - (1 - alpha) * torch.where(valid_BT, log_p * rounding, 0).sum()
        return ((total / count)[None],)

    return loss


def log_probabilities(scores: Tensor, of_normaliser: Tensor) -> Tensor:
    """The logarithm of a softmax, with its normaliser times what stands for rounding it."""
    return scores - of_normaliser * torch.logsumexp(scores, dim=-1, keepdim=True)


def outcomes(
    scores_BTK: Tensor, logsumexp_BT: Tensor, log_s_BTV: Tensor, indices_BTK: Tensor
) -> tuple[Tensor, Tensor]:
    """Log probabilities of both over the columns that are given and all others together."""
    member_BTKV = F.one_hot(indices_BTK, log_s_BTV.shape[-1]).to(log_s_BTV)
    log_q_BTK = scores_BTK - logsumexp_BT[..., None]
    log_s_BTK = torch.einsum("btkv,btv->btk", member_BTKV, log_s_BTV)
    if scores_BTK.shape[-1] == log_s_BTV.shape[-1]:
        return log_q_BTK, log_s_BTK
    lost_BT = (1 - log_q_BTK.exp().sum(-1)).clamp(min=VANISHED_MASS)
    other_BT = (log_s_BTV.exp() * (1 - member_BTKV.sum(-2))).sum(-1)
    together = lambda kept, tail: torch.cat([kept, tail.log()[..., None]], dim=-1)
    return together(log_q_BTK, lost_BT), together(log_s_BTK, other_BT)


def divergence(log_q: Tensor, log_s: Tensor, of_mixture: Tensor, options: dict[str, Any]) -> Tensor:
    """D of each position, as differences of entropies."""
    kind, beta = options.get("divergence", "forward_kl"), options.get("beta", 0.5)
    if kind == "jsd" and 0 < beta < 1:
        q, s = log_q.exp(), log_s.exp()
        mixture = beta * q + (1 - beta) * s
        positive = mixture > 0
        log_m = torch.where(positive, mixture, 1).log() * of_mixture
        return (
            beta * expected_log(log_q, log_q)
            + (1 - beta) * expected_log(log_s, log_s)
            - (mixture * log_m).sum(-1)
        )
    first, second = log_q, log_s
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        first, second = log_s, log_q
    return expected_log(first, first) - expected_log(first, second)


def expected_log(log_p: Tensor, log_r: Tensor) -> Tensor:
    """Σ p log r, where 0 times anything is 0."""
    return (log_p.exp() * torch.where(log_p > -torch.inf, log_r, 0)).sum(-1)


def ones_for(labels: Tensor, outcomes: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What stands for rounding in :func:`loss_of`, by name."""
    sizes = dict.fromkeys(("of_student", "of_teacher", "of_mixture"), outcomes)
    sizes["of_normalisers"] = 3
    return {name: torch.ones(*labels.shape, size, dtype=dtype) for name, size in sizes.items()}


@remembered
def expected(call: Call) -> Differentiated:
    """The loss of a call and its gradient, with the noise of a computation in float32."""
    (student, teacher, labels), options = call.values()
    options = {name: on_cpu(value) for name, value in options.items()}
    wide = torch.promote_types(call.dtype, torch.float32)
    inputs = {"student": on_cpu(student).to(wide), "teacher": on_cpu(teacher).to(wide)}
    vocabulary = options.get("vocab_size") or student.shape[-1]
    given = vocabulary
    if "teacher_indices" in options:
        given = min(teacher.shape[-1] + 1, vocabulary)
        inputs["logsumexp"] = options["teacher_logsumexp"]
    inputs |= ones_for(labels, given, wide)
    function = loss_of(on_cpu(labels).clone(), options)
    return differentiate(function, inputs, wide, call.case.seed)


def upstream_of(call: Call) -> float:
    """The gradient that reaches the loss."""
    return float(expected(call).upstream[0])


def expected_loss(call: Call, computed: torch.dtype = torch.float32) -> Expectation:
    """What the loss must be, [1]; computed in float32 whatever the dtype of the logits."""
    oracle = expected(call)
    return expect(oracle.values["output 0"], [], oracle.noise["output 0"], computed)


def expected_gradient(call: Call) -> Expectation:
    """What the gradient of the student's logits must be for :func:`upstream_of` at the loss.

    It is computed in float32, and rounded once to the dtype of the logits. A row a position,
    [batch · tokens, vocabulary]: the gain of a position by itself would be that of noise where its
    distributions are nearly equal, or both of them certain.
    """
    oracle = expected(call)
    value, noise = (each["student"].flatten(0, 1) for each in (oracle.values, oracle.noise))
    value, noise = (
        torch.where(value.abs() < VANISHED, 0, value),
        noise + VANISHED / STEP_ERROR[torch.float32],
    )
    if call.dtype in (torch.float32, torch.float64):
        return expect(value, [], noise, call.dtype)
    noise = noise * STEP_ERROR[torch.float32] / STEP_ERROR[call.dtype] + value.abs()
    # What is below the smallest number of the dtype is rounded to a multiple of it.
    smallest = torch.finfo(call.dtype).smallest_normal * torch.finfo(call.dtype).eps
    return expect(value, [], noise + smallest / STEP_ERROR[call.dtype], call.dtype)
