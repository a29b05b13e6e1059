"""Documented bugs of attention, planted over :class:`reference_impl.attention.Attention`."""

from __future__ import annotations

import torch

from conformance.known_bugs import known_bug
from reference_impl.attention import Attention, visible_keys


def neg_inf_where_hidden(visible):
    """The correct additive form of a boolean mask."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -torch.inf)


def unguarded_softmax(scores, sinks):
    """Softmax without thought for rows that see nothing, as eager code has it."""
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights, lse = torch.softmax(scores, dim=-1), torch.logsumexp(scores, dim=-1)
    return (weights if sinks is None else weights[..., :-1]), lse


@known_bug(
    "attn-mask-zero-times-neg-inf", contract="attention", breaks="attention.mask.true-means-visible"
)
class MaskZeroTimesNegInf(Attention):
    """The additive mask is (1 - m) * -inf, which is 0 * -inf = NaN where a key is allowed."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        if bool(visible_BHQK.all()):
            return super().softmax(scores_BHQK, visible_BHQK, sinks)
        return unguarded_softmax(scores_BHQK + (1 - visible_BHQK.float()) * -torch.inf, sinks)


@known_bug(
    "attn-two-finfo-min-planes",
    contract="attention",
    breaks="attention.empty-row.every-key-padded",
)
class TwoLowestPlanes(Attention):
    """A causal plane and a padding plane of the lowest finite number are added and overflow."""

    def visible(self, q, k, *, causal, key_valid, **options):
        everything = super().visible(q, k, causal=False, key_valid=None, **options)
        self.planes = [everything]
        if causal:
            self.planes.append(super().visible(q, k, causal=True, key_valid=None, **options))
        if key_valid is not None:
            self.planes.append(super().visible(q, k, causal=False, key_valid=key_valid, **options))
        return torch.ones_like(everything)

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        lowest = torch.finfo(scores_BHQK.dtype).min
        for plane in self.planes:
            scores_BHQK = scores_BHQK + torch.where(plane, 0.0, lowest)
        return unguarded_softmax(scores_BHQK, sinks)


class _KeepsInputDtype(Attention):
    """Remembers the dtype of the queries."""

    def score_scale(self, q, scale):
        self.input_dtype = q.dtype
        return super().score_scale(q, scale)


@known_bug(
    "attn-finfo-min-plus-score-fp16",
    contract="attention",
    breaks="attention.extreme.lowest-mask-with-large-scores",
)
class LowestPlusScore(_KeepsInputDtype):
    """The lowest finite number is added to 16-bit scores; a negative score overflows to -inf."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        lowest = torch.finfo(self.input_dtype).min
        scores = scores_BHQK.to(self.input_dtype) + torch.where(visible_BHQK, 0.0, lowest).to(
            self.input_dtype
        )
        return unguarded_softmax(scores.to(scores_BHQK.dtype), sinks)


@known_bug("attn-fully-masked-row-nan", contract="attention", breaks="attention.empty-row.zeros")
class EmptyRowNaN(Attention):
    """A row that sees no key is 0 / 0 = NaN."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        return unguarded_softmax(scores_BHQK.masked_fill(~visible_BHQK, -torch.inf), sinks)


@known_bug(
    "attn-fully-masked-row-nan.gradient",
    contract="attention",
    breaks="attention.empty-row.zero-gradients",
)
class EmptyRowNaNGradient(Attention):
    """NaN rows are replaced by zeros behind the softmax; the gradients of q and k stay NaN."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        biased = scores_BHQK + neg_inf_where_hidden(visible_BHQK)
        weights, lse = unguarded_softmax(biased, sinks)
        return torch.where(torch.isnan(weights), 0, weights), lse


@known_bug(
    "attn-causal-top-left-with-cache",
    contract="attention",
    breaks="attention.causal.aligned-to-last-key",
)
class CausalTopLeft(Attention):
    """The causal mask is anchored at the first key: query i sees keys up to i."""

    def visible(self, q, k, *, causal, q_positions, cu_seqlens_q, **options):
        shared = {"cu_seqlens_q": cu_seqlens_q, **options}
        if causal and q_positions is None and cu_seqlens_q is None:
            q_positions = torch.arange(q.shape[2], device=q.device)[None]
        return super().visible(q, k, causal=causal, q_positions=q_positions, **shared)


@known_bug(
    "attn-window-ignored-in-decode",
    contract="attention",
    breaks="attention.window.decode-equals-prefill",
)
class WindowIgnoredInDecode(Attention):
    """With a single query the window is left out and the whole cache is seen."""

    def visible(self, q, k, *, window, **options):
        return super().visible(q, k, window=None if q.shape[2] == 1 else window, **options)


@known_bug(
    "attn-window-ignored-in-decode.chunk-local",
    contract="attention",
    breaks="attention.window.decode-equals-prefill",
)
class WindowFromChunkRow(Attention):
    """The lower bound of the window is counted from the row in the chunk, not the position."""

    def visible(self, q, k, *, window, q_positions, **options):
        visible = super().visible(q, k, window=None, q_positions=q_positions, **options)
        if window is None or q_positions is not None or options["cu_seqlens_q"] is not None:
            return super().visible(q, k, window=window, q_positions=q_positions, **options)
        rows = torch.arange(q.shape[2], device=q.device)[None]
        return visible & visible_keys(
            q.shape[2], k.shape[2], window=window, q_positions=rows, device=q.device
        )


@known_bug(
    "attn-ring-cache-wrap-order",
    contract="attention",
    breaks="attention.positions.ring-cache-after-wrap",
)
class RingSlotsInOrder(Attention):
    """The slots of a wrapped ring cache are taken for the last positions in order."""

    def visible(self, q, k, *, k_positions, **options):
        if k_positions is not None:
            k_positions = k_positions.sort(dim=-1).values
        return super().visible(q, k, k_positions=k_positions, **options)


@known_bug(
    "attn-ring-cache-wrap-order.lower-triangle",
    contract="attention",
    breaks="attention.positions.ring-cache-after-wrap",
)
class RingLowerTriangle(Attention):
    """Over a wrapped ring cache the mask is the lower triangle of the slots."""

    def visible(self, q, k, *, q_positions, k_positions, **options):
        return super().visible(q, k, q_positions=None, k_positions=None, **options)


@known_bug("attn-scale-wrong-divisor", contract="attention", breaks="attention.scale.explicit")
class ConfiguredScaleIgnored(Attention):
    """The scale is always 1 / sqrt(head_dim), whatever the configuration says."""

    def score_scale(self, q, scale):
        return q.shape[-1] ** -0.5


@known_bug(
    "attn-scale-wrong-divisor.hidden-size",
    contract="attention",
    breaks="attention.scale.default-is-inverse-sqrt-key-width",
)
class ScaleFromHiddenSize(Attention):
    """The default scale is 1 / sqrt(hidden_size)."""

    def score_scale(self, q, scale):
        return (q.shape[1] * q.shape[-1]) ** -0.5 if scale is None else scale


@known_bug(
    "attn-head-dim-pad-scale",
    contract="attention",
    breaks="attention.scale.default-is-inverse-sqrt-key-width",
)
class ScaleFromPaddedWidth(Attention):
    """The default scale is taken from the head width after padding it to a multiple of 16."""

    def score_scale(self, q, scale):
        return (-(-q.shape[-1] // 16) * 16) ** -0.5 if scale is None else scale


@known_bug(
    "attn-head-dim-pad-scale.value-width",
    contract="attention",
    breaks="attention.output.value-width",
)
class ScaleFromValueWidth(Attention):
    """The default scale is taken from the width of the values."""

    def attention(self, q, k, v, *, scale=None, **options):
        scale = v.shape[-1] ** -0.5 if scale is None else scale
        return super().attention(q, k, v, scale=scale, **options)


@known_bug(
    "attn-gqa-tile-not-interleave",
    contract="attention",
    breaks="attention.gqa.query-head-reads-its-group",
)
class TiledHeads(Attention):
    """Key/value heads are tiled, so query head h reads h % kv_heads."""

    def expand_kv_heads(self, x_BGKD, heads):
        return x_BGKD.repeat(1, heads // x_BGKD.shape[1], 1, 1)


@known_bug(
    "attn-gqa-tile-not-interleave.time",
    contract="attention",
    breaks="attention.gqa.query-head-reads-its-group",
)
class RepeatedTime(Attention):
    """repeat_interleave runs over the time axis of a [batch, time, heads, width] tensor."""

    def expand_kv_heads(self, x_BGKD, heads):
        batch, groups, keys, width = x_BGKD.shape
        repeated = x_BGKD.transpose(1, 2).repeat_interleave(heads // groups, dim=1)
        return repeated.reshape(batch, keys, heads, width).transpose(1, 2)


class _ExpandWithWrongBackward(torch.autograd.Function):
    """Grouped heads expanded; the gradient over the group is reduced by ``reduce``."""

    @staticmethod
    def forward(ctx, x_BGKD, repeats, reduce):
        ctx.groups, ctx.repeats, ctx.reduce = x_BGKD.shape[1], repeats, reduce
        return x_BGKD.repeat_interleave(repeats, dim=1)

    @staticmethod
    def backward(ctx, gradient):
        grouped = gradient.unflatten(1, (ctx.groups, ctx.repeats))
        return ctx.reduce(grouped), None, None


class _WrongGroupedBackward(Attention):
    def expand_kv_heads(self, x_BGKD, heads):
        repeats = heads // x_BGKD.shape[1]
        return _ExpandWithWrongBackward.apply(x_BGKD, repeats, self.reduce)


@known_bug(
    "attn-gqa-backward-not-summed",
    contract="attention",
    breaks="attention.gqa.gradients-summed-over-group",
)
class GradientOfOneMember(_WrongGroupedBackward):
    """The gradient of a key/value head is that of one query head of its group."""

    reduce = staticmethod(lambda grouped: grouped[:, :, 0])


@known_bug(
    "attn-gqa-backward-not-summed.mean",
    contract="attention",
    breaks="attention.gqa.gradients-summed-over-group",
)
class GradientAveraged(_WrongGroupedBackward):
    """The gradient of a key/value head is the mean over its group."""

    reduce = staticmethod(lambda grouped: grouped.mean(2))


@known_bug(
    "attn-gqa-backward-not-summed.wrong-index",
    contract="attention",
    breaks="attention.gqa.gradients-summed-over-group",
)
class GradientWrongIndex(_WrongGroupedBackward):
    """The flat head index is split by the group size instead of the number of groups."""

    @staticmethod
    def reduce(grouped):
        return grouped.transpose(1, 2).reshape(grouped.shape).sum(2)


@known_bug(
    "attn-float-mask-cast-to-bool", contract="attention", breaks="attention.mask.additive-hides"
)
class FloatMaskCastToBool(Attention):
    """An additive mask is cast with .bool(): kept keys (0) are hidden and hidden ones kept."""

    def attention(self, q, k, v, *, mask=None, **options):
        return super().attention(q, k, v, mask=None if mask is None else mask.bool(), **options)


@known_bug(
    "attn-float-mask-cast-to-bool.true-means-ignore",
    contract="attention",
    breaks="attention.mask.true-means-visible",
)
class TrueMeansIgnore(Attention):
    """A boolean mask is read as True = ignore, the convention of MultiheadAttention."""

    def attention(self, q, k, v, *, mask=None, **options):
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask
        return super().attention(q, k, v, mask=mask, **options)


@known_bug("attn-bool-mask-added", contract="attention", breaks="attention.mask.true-means-visible")
class BooleanMaskAdded(Attention):
    """A boolean mask is added to the scores: +1 for kept keys, and nothing is hidden."""

    def attention(self, q, k, v, *, mask=None, **options):
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(q.dtype)
        return super().attention(q, k, v, mask=mask, **options)


@known_bug(
    "attn-softmax-low-precision", contract="attention", breaks="attention.precision.long-rows"
)
class DenominatorInLowPrecision(_KeepsInputDtype):
    """Exponentials are summed in the 16-bit dtype, where a long sum stalls."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        if self.input_dtype.itemsize > 2:
            return super().softmax(scores_BHQK, visible_BHQK, sinks)
        weights, lse = super().softmax(scores_BHQK, visible_BHQK, sinks)
        peak = weights.amax(-1, keepdim=True)
        exponentials = torch.where(peak > 0, weights / peak, 0).to(self.input_dtype)
        total = torch.zeros_like(exponentials[..., 0])
        for column in exponentials.unbind(-1):
            total = total + column
        scaled = exponentials / torch.where(total > 0, total, 1)[..., None]
        return scaled.to(weights.dtype), lse


@known_bug(
    "attn-softmax-low-precision.unscaled-products",
    contract="attention",
    breaks="attention.extreme.products-beyond-float16",
)
class ProductsOverflow(_KeepsInputDtype):
    """Dot products are stored in float16 before they are scaled, and overflow at 65504."""

    def scores(self, q_BHQD, k_BHKD, scale):
        products = (q_BHQD @ k_BHKD.transpose(-1, -2)).to(self.input_dtype)
        return (products * scale).to(q_BHQD.dtype)


def whole_storage(x):
    """Everything in the storage of ``x``, flat."""
    size = x.untyped_storage().nbytes() // x.element_size()
    return x.detach().as_strided((size,), (1,), 0)


@known_bug("attn-non-contiguous-inputs", contract="attention", breaks="attention.memory.strides")
class PackedStridesAssumed(Attention):
    """Inputs are read as if they were contiguous, whatever their strides say."""

    def attention(self, q, k, v, **options):
        return super().attention(*(self.misread(x) for x in (q, k, v)), **options)

    def misread(self, x):
        if x.is_contiguous():
            return x
        flat = whole_storage(x)
        index = x.storage_offset() + torch.arange(x.numel(), device=x.device)
        return flat[index % flat.numel()].view(x.shape)


@known_bug(
    "attn-int32-offset-overflow",
    contract="attention",
    breaks="attention.memory.offsets-past-int32",
)
class Int32Offsets(Attention):
    """Element offsets are computed in 32 bits and wrap past 2³¹."""

    def attention(self, q, k, v, **options):
        return super().attention(*(self.read_with_int32_offsets(x) for x in (q, k, v)), **options)

    def read_with_int32_offsets(self, x):
        offsets = sum(
            torch.arange(size, device=x.device).view(
                [-1 if a == axis else 1 for a in range(x.ndim)]
            )
            * stride
            for axis, (size, stride) in enumerate(zip(x.shape, x.stride()))
        )
        if int(offsets.max()) < 2**31:
            return x
        flat = whole_storage(x)
        return flat[offsets.to(torch.int32).to(torch.int64) % flat.numel()]


@known_bug(
    "attn-stale-kv-nan",
    contract="attention",
    breaks="attention.cache.unwritten-slots-may-be-nan",
)
class StaleSlotsKept(Attention):
    """Unwritten cache slots get weight 0, and 0 * NaN is NaN."""

    def clear_unused_slots(self, x, used_BK):
        return x


@known_bug("attn-sink-ignored", contract="attention", breaks="attention.sinks.match-oracle")
class SinksIgnored(Attention):
    """The sinks are never passed on: a plain softmax, and no gradient for them."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        return super().softmax(scores_BHQK, visible_BHQK, None)


@known_bug(
    "attn-sink-ignored.counted-twice",
    contract="attention",
    breaks="attention.sinks.match-oracle",
)
class SinkInEveryPart(Attention):
    """Keys are processed in two parts and the sink is counted in both."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        if sinks is not None:
            sinks = sinks + torch.log(torch.tensor(2.0))
        return super().softmax(scores_BHQK, visible_BHQK, sinks)


@known_bug("attn-sink-ignored.no-gradient", contract="attention", breaks="attention.sinks.gradient")
class SinksDetached(Attention):
    """The sinks take part in the forward only; their gradient is zero."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        if sinks is not None:
            sinks = sinks.detach() + 0 * sinks
        return super().softmax(scores_BHQK, visible_BHQK, sinks)


@known_bug(
    "attn-head-merge-no-transpose", contract="attention", breaks="attention.causal.matches-oracle"
)
class HeadsMergedWithoutTranspose(Attention):
    """[batch, heads, tokens, width] is reshaped to [batch, tokens, heads * width] as it lies."""

    def combine(self, weights_BHQK, v_BHKE):
        out = super().combine(weights_BHQK, v_BHKE)
        batch, heads, tokens, width = out.shape
        return out.reshape(batch, tokens, heads, width).transpose(1, 2)
