"""Documented bugs as somebody else's code has them.

Nothing of the planted bugs or of the reference is used: other functions, another order of operations,
often another dtype or only some sizes. What these do wrong has to be recognised all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Elsewhere:
    """An implementation with a documented bug, and a requirement that it fails."""

    method: Callable[..., Any]
    contract: str
    requirement: str
    bugs: frozenset[str]
    """Ids of the planted bugs that it is; two where it has both."""


ELSEWHERE: dict[str, Elsewhere] = {}


def elsewhere(*bugs: str, fails: str) -> Callable[[Callable], Callable]:
    """Register the decorated method under its own name."""

    def register(method: Callable) -> Callable:
        contract = fails.split(".")[0]
        ELSEWHERE[method.__name__] = Elsewhere(method, contract, fails, frozenset(bugs))
        return method

    return register


# Attention, over torch's own


def repeated(k: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


@elsewhere("attn-causal-top-left-with-cache", fails="attention.causal.one-token-decode")
def fused_causal_is_top_left(q, k, v, *, causal=False, scale=None):
    return F.scaled_dot_product_attention(
        q, repeated(k, q), repeated(v, q), is_causal=causal, scale=scale
    )


@elsewhere("attn-causal-top-left-with-cache", fails="attention.causal.aligned-to-last-key")
def lower_triangle_of_wide_heads(q, k, v, *, causal=False):
    if q.shape[3] % 8 or q.shape[3] < 16:
        raise NotImplementedError("head widths that are multiples of 8, from 16 on")
    scores = torch.einsum("bhqd,bhkd->bhqk", q / q.shape[3] ** 0.5, repeated(k, q)).float()
    if causal:
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1).to(q.dtype), repeated(v, q))


@elsewhere("attn-gqa-tile-not-interleave", fails="attention.gqa.matches-oracle")
def heads_are_tiled(q, k, v, *, causal=False):
    groups = q.shape[1] // k.shape[1]
    k, v = (each.repeat(1, groups, 1, 1) for each in (k, v))
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    visible = visible.tril(k.shape[2] - q.shape[2]) if causal else visible
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


@elsewhere("attn-scale-wrong-divisor", fails="attention.scale.explicit")
def scale_is_not_read(q, k, v, *, scale=None):
    return F.scaled_dot_product_attention(q, repeated(k, q), repeated(v, q))


@elsewhere(
    "attn-scale-wrong-divisor.hidden-size",
    fails="attention.full.matches-oracle",
)
def scale_of_the_whole_hidden_state(q, k, v):
    hidden = q.shape[1] * q.shape[3]
    return F.scaled_dot_product_attention(q, repeated(k, q), repeated(v, q), scale=hidden**-0.5)


@elsewhere("attn-bool-mask-added", fails="attention.mask.true-means-visible")
def boolean_mask_as_a_bias(q, k, v, *, mask=None):
    bias = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, repeated(k, q), repeated(v, q), attn_mask=bias)


@elsewhere("attn-sink-ignored", fails="attention.sinks.match-oracle")
def sinks_have_no_effect(q, k, v, *, causal=False, sinks=None):
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    mask = visible.tril(k.shape[2] - q.shape[2]) if causal else None
    return F.scaled_dot_product_attention(q, repeated(k, q), repeated(v, q), attn_mask=mask)


@elsewhere(
    "attn-gqa-tile-not-interleave",
    "attn-causal-top-left-with-cache",
    fails="attention.gqa.matches-oracle",
)
def tiled_and_top_left(q, k, v, *, causal=False):
    groups = q.shape[1] // k.shape[1]
    k, v = (each.repeat(1, groups, 1, 1) for each in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


# Rotary embedding, over complex numbers


def turned(x, positions, theta=10000.0, divide=1.0):
    """Neighbouring channels as complex numbers, turned."""
    width = x.shape[-1]
    channels = torch.arange(0, width, 2, dtype=torch.float64, device=x.device)
    frequencies = 1.0 / theta ** (channels / width)
    angles = positions[:, None, :, None].double() * frequencies / divide
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def halves(x):
    """[a0 .. aP, b0 .. bP] as [a0, b0, a1, b1, …]."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def unhalved(x):
    return torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)


@elsewhere("rope-pair-layout-mismatch", fails="rotary.layout.half")
def neighbours_whatever_the_layout(x, positions, *, theta=10000.0):
    return turned(x, positions, theta).to(x.dtype)


@elsewhere("rope-theta-ignored", fails="rotary.theta.configured")
def theta_of_the_first_llama(x, positions, *, theta=10000.0):
    return unhalved(turned(halves(x), positions)).to(x.dtype)


@elsewhere("rope-left-pad-shared-positions", fails="rotary.positions.left-padded")
def positions_of_the_first_row(x, positions, *, theta=10000.0):
    return unhalved(turned(halves(x), positions[:1].expand_as(positions), theta)).to(x.dtype)


@elsewhere("rope-linear-scaling-ignored.multiplies", fails="rotary.linear.frequencies")
def positions_times_the_factor(x, positions, *, theta=10000.0, scaling=None):
    if scaling is not None and scaling.get("rope_type") != "linear":
        raise NotImplementedError("other rules than linear")
    divide = 1 / scaling["factor"] if scaling else 1.0
    return unhalved(turned(halves(x), positions, theta, divide)).to(x.dtype)


# Mixture of experts: every expert on every token, and a matrix of weights


def dense(hidden, indices, weights, gate_up, down, *, exchanged=False, assign=False):
    """Outputs of all experts, combined by a [tokens, experts] matrix."""
    tokens, experts = hidden.shape[0], gate_up.shape[0]
    table = hidden.new_zeros(tokens, experts + 1, dtype=torch.float32)
    for slot in range(indices.shape[1]):
        at = indices[:, slot : slot + 1]
        part = weights[:, slot : slot + 1].float()
        table = table.scatter(1, at, part) if assign else table.scatter_add(1, at, part)
    first, second = torch.einsum("th,eih->tei", hidden, gate_up).chunk(2, dim=-1)
    gate, up = (second, first) if exchanged else (first, second)
    each = torch.einsum("tei,ehi->teh", F.silu(gate) * up, down)
    return torch.einsum("teh,te->th", each.float(), table[:, :experts]).to(hidden.dtype)


@elsewhere("moe-gate-up-order-or-interleave", fails="experts.forward.values")
def up_before_gate(hidden, indices, weights, gate_up_proj, down_proj):
    return dense(hidden, indices, weights, gate_up_proj, down_proj, exchanged=True)


@elsewhere("moe-combine-duplicate-index-overwrite.counted-once", fails="experts.slots.repeated")
def one_place_for_an_expert(hidden, indices, weights, gate_up_proj, down_proj):
    return dense(hidden, indices, weights, gate_up_proj, down_proj, assign=True)


@elsewhere("moe-softmax-topk-renorm-semantics.never", fails="moe_router.softmax.normalised")
def never_divided_by_the_sum(logits, *, top_k, normalize=False):
    scores = torch.exp(logits.double() - logits.double().logsumexp(-1, keepdim=True))
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    return scores.gather(-1, order).float(), order


@elsewhere("moe-softmax-topk-renorm-semantics.always", fails="moe_router.softmax.not-normalised")
def always_divided_by_the_sum(logits, *, top_k, normalize=False):
    chosen, order = logits.float().sort(dim=-1, descending=True, stable=True)
    chosen, order = chosen[:, :top_k], order[:, :top_k]
    return (chosen - chosen.logsumexp(-1, keepdim=True)).exp(), order


# Distillation, over torch's losses


def kl_and_cross_entropy(student, teacher, labels, alpha, temperature, *, reverse, squared):
    student, teacher, labels = student[:, :-1].float(), teacher[:, :-1].float(), labels[:, 1:]
    valid = labels != -100
    log_s, log_q = (F.log_softmax(x[valid] / temperature, -1) for x in (student, teacher))
    given, other = (log_q, log_s) if reverse else (log_s, log_q)
    divergence = F.kl_div(given, other, reduction="batchmean", log_target=True)
    divergence = divergence * (temperature**2 if squared else 1.0)
    return alpha * divergence + (1 - alpha) * F.cross_entropy(student[valid], labels[valid])


@elsewhere("dist-temperature-squared", fails="distillation_loss.temperature.values")
def temperature_not_squared(student, teacher, labels, *, alpha=0.5, temperature=1.0):
    return kl_and_cross_entropy(
        student, teacher.detach(), labels, alpha, temperature, reverse=False, squared=False
    )


@elsewhere("distill-direction-reversed", fails="distillation_loss.forward-kl.values")
def student_from_the_teacher(student, teacher, labels, *, alpha=0.5, temperature=1.0):
    return kl_and_cross_entropy(
        student, teacher.detach(), labels, alpha, temperature, reverse=True, squared=True
    )


def in_half_precision_alone(method: Callable) -> Callable:
    """The same method, which declines float32."""

    def only(q, k, v, *, causal=False):
        if q.dtype not in HALF:
            raise NotImplementedError("16-bit dtypes alone")
        return method(q, k, v, causal=causal)

    return only


for name in ("heads_are_tiled", "tiled_and_top_left"):
    known = ELSEWHERE[name]
    ELSEWHERE[f"{name}_in_16_bits"] = Elsewhere(
        in_half_precision_alone(known.method), known.contract, known.requirement, known.bugs
    )
