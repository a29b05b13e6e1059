"""Other right ways to compute attention: other orders, blocks, roundings and memory layouts."""

from __future__ import annotations

import math

import torch

from conformance.correct_variants import correct_variant
from reference_impl.attention import Attention, merge_attention


@correct_variant("attn-eager-rounded", contract="attention")
class EagerRounded(Attention):
    """Every intermediate is stored in the model's dtype; softmax in float32 (transformers eager)."""

    def score_scale(self, q, scale):
        self.dtype = q.dtype
        return super().score_scale(q, scale)

    def scores(self, q_BHQD, k_BHKD, scale):
        # Scaled before the product, so that float16 does not overflow.
        return (q_BHQD * scale).to(self.dtype).float() @ k_BHKD.transpose(-1, -2)

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        scores_BHQK = scores_BHQK.to(self.dtype).to(scores_BHQK.dtype)
        weights, lse = super().softmax(scores_BHQK, visible_BHQK, sinks)
        return weights.to(self.dtype).to(weights.dtype), lse


@correct_variant("attn-online-softmax", contract="attention")
class OnlineSoftmax(Attention):
    """Keys in blocks of three with a running peak and denominator (flash-attention)."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        scores = scores_BHQK.masked_fill(~visible_BHQK, -torch.inf)
        shape = (*scores.shape[:3], 1)
        peak = torch.full(shape, -torch.inf, dtype=scores.dtype, device=scores.device)
        total = torch.zeros_like(peak)
        if sinks is not None:
            peak = sinks.to(scores.dtype)[None, :, None, None].expand(shape)
            total = torch.where(torch.isneginf(peak), 0, torch.ones_like(peak))
        for block in scores.split(3, dim=-1):
            raised = torch.maximum(peak, block.amax(-1, keepdim=True))
            base = torch.where(torch.isneginf(raised), 0, raised)
            total = total * torch.exp(peak - base) + torch.exp(block - base).sum(-1, keepdim=True)
            peak = raised
        base = torch.where(torch.isneginf(peak), 0, peak)
        weights = torch.exp(scores - base) / torch.where(total > 0, total, 1)
        lse = torch.where(total > 0, torch.log(total) + base, -torch.inf)
        return weights, lse.squeeze(-1)


VISIBILITY = (
    "causal",
    "window",
    "mask",
    "key_valid",
    "key_lengths",
    "q_segments",
    "k_segments",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "q_positions",
    "k_positions",
)


class _ExplicitMask(Attention):
    """Turns every option about visibility into one mask, and clears unused slots."""

    def attention(self, q, k, v, **options):
        visible = self.visible(
            q,
            k,
            **{
                name: options[name]
                for name in VISIBILITY
                if name in options and not (name == "mask" and is_additive(options[name]))
            },
        ).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        mask = visible
        if is_additive(options.get("mask")):
            mask = options["mask"].masked_fill(~visible, -torch.inf)
        lengths, positions = options.get("key_lengths"), options.get("k_positions")
        used = self.used_slots(k, key_lengths=lengths, k_positions=positions)
        k, v = self.clear_unused_slots(k, used), self.clear_unused_slots(v, used)
        rest = {name: value for name, value in options.items() if name not in VISIBILITY}
        return self.masked_attention(q, k, v, mask, **rest)

    def masked_attention(self, q, k, v, mask, **options):
        """Attention with a mask [B, H, Q, K], boolean or additive, and options that remain."""
        return Attention().attention(q, k, v, mask=mask, **options)


def is_additive(mask):
    """Whether this is a floating mask."""
    return mask is not None and mask.dtype != torch.bool


@correct_variant("attn-split-keys", contract="attention")
class SplitKeys(_ExplicitMask):
    """Two halves of the keys, merged by log-sum-exp; the sink applied last (split-KV decode)."""

    def masked_attention(self, q, k, v, mask, *, sinks=None, return_lse=False, **options):
        dtype, half = q.dtype, k.shape[2] // 2
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
        parts = [
            Attention().attention(
                q, k[:, :, keys], v[:, :, keys], mask=mask[..., keys], return_lse=True, **options
            )
            for keys in (slice(0, half), slice(half, None))
            if k[:, :, keys].shape[2]
        ]
        out, lse = parts[0] if len(parts) == 1 else merge_attention(*parts[0], *parts[1])
        if sinks is not None:
            sink = sinks.to(lse.dtype)[None, :, None]
            kept = torch.where(torch.isneginf(lse), 0, torch.sigmoid(lse - sink))
            out, lse = out * kept[..., None], torch.logaddexp(lse, sink)
        out = out.to(dtype)
        return (out, lse) if return_lse else out


@correct_variant("attn-grouped-without-copies", contract="attention")
class GroupedWithoutCopies(_ExplicitMask):
    """Query heads are folded into [batch, groups, members * queries]; nothing is repeated."""

    def masked_attention(self, q, k, v, mask, *, sinks=None, **options):
        members = q.shape[1] // k.shape[1]
        folded = q.unflatten(1, (k.shape[1], members)).flatten(2, 3)
        mask = mask.unflatten(1, (k.shape[1], members)).flatten(2, 3)
        if sinks is not None:  # a sink belongs to a query head: fold it as a head of its own
            return Attention().attention(
                q, k, v, mask=mask.unflatten(2, (members, -1)).flatten(1, 2), sinks=sinks, **options
            )
        result = Attention().attention(folded, k, v, mask=mask, **options)
        unfold = lambda x: x.unflatten(2, (members, q.shape[2])).flatten(1, 2)
        return tuple(map(unfold, result)) if isinstance(result, tuple) else unfold(result)


@correct_variant("attn-head-by-head", contract="attention")
class HeadByHead(_ExplicitMask):
    """A Python loop over batch rows and heads."""

    def masked_attention(self, q, k, v, mask, *, sinks=None, return_lse=False, **options):
        members = q.shape[1] // k.shape[1]
        rows = []
        for b in range(q.shape[0]):
            heads = [
                Attention().attention(
                    q[b : b + 1, h : h + 1],
                    k[b : b + 1, h // members : h // members + 1],
                    v[b : b + 1, h // members : h // members + 1],
                    mask=mask[b : b + 1, h : h + 1],
                    sinks=None if sinks is None else sinks[h : h + 1],
                    return_lse=True,
                    **options,
                )
                for h in range(q.shape[1])
            ]
            rows.append([torch.cat(parts, dim=1) for parts in zip(*heads)])
        out, lse = (torch.cat(parts) for parts in zip(*rows))
        return (out, lse) if return_lse else out


@correct_variant("attn-base-two", contract="attention")
class BaseTwo(Attention):
    """Powers of two instead of exponentials, log2(e) folded into the scale (most GPU kernels)."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        log2_e = math.log2(math.e)
        scores = (scores_BHQK * log2_e).masked_fill(~visible_BHQK, -torch.inf)
        peak = scores.amax(-1, keepdim=True)
        if sinks is not None:
            peak = torch.maximum(peak, sinks.to(scores.dtype)[None, :, None, None] * log2_e)
        peak = torch.where(torch.isneginf(peak), 0, peak)
        powers = torch.exp2(scores - peak)
        total = powers.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp2(sinks.to(scores.dtype)[None, :, None, None] * log2_e - peak)
        weights = powers / torch.where(total > 0, total, 1)
        return weights, torch.where(total > 0, (torch.log2(total) + peak) / log2_e, -torch.inf)[
            ..., 0
        ]


@correct_variant("attn-normalised-last", contract="attention")
class NormalisedLast(Attention):
    """Unnormalised probabilities, stored in the model's dtype, meet the values; then the division."""

    def score_scale(self, q, scale):
        self.dtype = q.dtype
        return super().score_scale(q, scale)

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        weights, lse = super().softmax(scores_BHQK, visible_BHQK, sinks)
        self.largest = weights.detach().amax(-1, keepdim=True)
        self.largest = torch.where(self.largest > 0, self.largest, 1)
        return (weights / self.largest).to(self.dtype).to(weights.dtype), lse

    def combine(self, weights_BHQK, v_BHKE):
        return super().combine(weights_BHQK, v_BHKE) * self.largest


@correct_variant("attn-scaled-keys", contract="attention")
class ScaledKeys(Attention):
    """The scale is applied to the keys."""

    def scores(self, q_BHQD, k_BHKD, scale):
        return q_BHQD @ (k_BHKD * scale).transpose(-1, -2)


@correct_variant("attn-root-scale-on-both", contract="attention")
class RootScaleOnBoth(Attention):
    """The square root of the scale on queries and keys alike (torch's math backend)."""

    def scores(self, q_BHQD, k_BHKD, scale):
        root = math.sqrt(scale)
        return (q_BHQD * root) @ (k_BHKD * root).transpose(-1, -2)


@correct_variant("attn-scaled-scores", contract="attention")
class ScaledScores(Attention):
    """The scale is applied to the finished dot products, kept in float32."""

    def scores(self, q_BHQD, k_BHKD, scale):
        return (q_BHQD @ k_BHKD.transpose(-1, -2)) * scale


@correct_variant("attn-einsum", contract="attention")
class Einsum(Attention):
    """The contractions as einsum over [batch, length, heads, width]."""

    def scores(self, q_BHQD, k_BHKD, scale):
        q_BQHD, k_BKHD = q_BHQD.transpose(1, 2), k_BHKD.transpose(1, 2)
        return torch.einsum("bqhd,bkhd->bhqk", q_BQHD * scale, k_BKHD)

    def combine(self, weights_BHQK, v_BHKE):
        return torch.einsum("bhqk,bkhe->bqhe", weights_BHQK, v_BHKE.transpose(1, 2)).transpose(1, 2)


@correct_variant("attn-sink-as-column", contract="attention")
class SinkAsColumn(Attention):
    """The sink is appended to the scores as a column, which is dropped after the softmax."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        if sinks is None:
            return super().softmax(scores_BHQK, visible_BHQK, None)
        column = sinks.to(scores_BHQK.dtype)[None, :, None, None]
        column = column.expand(*scores_BHQK.shape[:3], 1)
        shape = (*torch.broadcast_shapes(visible_BHQK.shape, scores_BHQK.shape)[:3], 1)
        shown = torch.ones(shape, dtype=torch.bool, device=scores_BHQK.device)
        visible = visible_BHQK.expand(*shape[:3], -1)
        weights, lse = super().softmax(
            torch.cat([scores_BHQK, column], -1), torch.cat([visible, shown], -1), None
        )
        return weights[..., :-1], lse


@correct_variant("attn-float64-inside", contract="attention")
class Float64Inside(Attention):
    """Everything in float64, rounded once."""

    def attention(self, q, k, v, **options):
        wide = {
            name: value.double() if name in ("mask", "sinks") and is_additive(value) else value
            for name, value in options.items()
        }
        result = super().attention(q.double(), k.double(), v.double(), **wide)
        if isinstance(result, tuple):
            return result[0].to(q.dtype), result[1].float()
        return result.to(q.dtype)


@correct_variant("attn-transposed-output", contract="attention")
class TransposedOutput(Attention):
    """The output is a view of [batch, length, heads, width] memory, as the next layer wants it."""

    def combine(self, weights_BHQK, v_BHKE):
        out = super().combine(weights_BHQK, v_BHKE)
        return out.transpose(1, 2).contiguous().transpose(1, 2)


@correct_variant("attn-keys-reversed", contract="attention")
class KeysReversed(_ExplicitMask):
    """The keys are walked from the last to the first."""

    def masked_attention(self, q, k, v, mask, **options):
        return Attention().attention(q, k.flip(2), v.flip(2), mask=mask.flip(-1), **options)
