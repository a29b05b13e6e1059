"""Subtle mistakes that no catalogue lists, each caught by the requirement that it names.

They are nearly right: wrong for one head, one length, one option or one pair of channels.
"""

import math

import pytest
import torch
from mutants import Broken, CacheAdapter, OtherGradient, broken

from reference_impl import rotary as steps
from reference_impl.attention import Attention
from reference_impl.rotary import Rotary, RotaryModule

NEAR: dict[str, Broken] = {}


def near_miss(breaks: str):
    return broken(NEAR, breaks=breaks)


@pytest.mark.parametrize("name", NEAR)
def test_near_miss_is_caught(name):
    NEAR[name].assert_caught()


# Attention: scores and softmax


@near_miss("attention.scale.default-is-inverse-sqrt-key-width")
class ScaleTwoPercentOff(Attention):
    """The default scale is 2 percent too large."""

    def score_scale(self, q, scale):
        return 1.02 * q.shape[-1] ** -0.5 if scale is None else scale


@near_miss("attention.gradient.scale-and-value-width")
class ScaleOfOneIsDefault(Attention):
    """An explicit scale of one is taken for none given."""

    def score_scale(self, q, scale):
        return q.shape[-1] ** -0.5 if scale in (None, 1.0) else scale


@near_miss("attention.scale.zero")
class FalsyScaleIsDefault(Attention):
    """``scale or default``: a scale of 0 is taken for none given."""

    def score_scale(self, q, scale):
        return scale or q.shape[-1] ** -0.5


@near_miss("attention.softcap.before-masks")
class SoftcapAfterMask(Attention):
    """The cap is applied to masked scores: minus infinity becomes minus the cap."""

    def cap(self, scores_BHQK, softcap):
        self.softcap = softcap
        return scores_BHQK

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        if self.softcap is not None:
            scores_BHQK = super().cap(
                scores_BHQK.masked_fill(~visible_BHQK, -torch.inf), self.softcap
            )
            visible_BHQK = torch.ones_like(visible_BHQK)
        return super().softmax(scores_BHQK, visible_BHQK, sinks)


@near_miss("attention.extreme.large-equal-scores")
class PeakNotSubtracted(Attention):
    """Exponentials are taken of the scores as they are: beyond 88 they overflow."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        exponentials = torch.exp(scores_BHQK.masked_fill(~visible_BHQK, -torch.inf))
        total = exponentials.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks.to(total.dtype))[None, :, None, None]
        weights = exponentials / torch.where(total == 0, 1, total)
        return weights, torch.log(total).squeeze(-1)


@near_miss("attention.full.matches-oracle")
class ApproximateExponential(Attention):
    """Weights come from an exponential that is off by three parts in ten thousand."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        weights, lse = super().softmax(scores_BHQK, visible_BHQK, sinks)
        return weights * (1 + 3e-4 * torch.sin(40 * scores_BHQK.masked_fill(~visible_BHQK, 0))), lse


@near_miss("attention.full.matches-oracle")
class TensorFloat32(Attention):
    """Scores of float32 inputs are computed from ten bits of mantissa."""

    def scores(self, q_BHQD, k_BHKD, scale):
        short = lambda x: x.to(torch.float16).to(x.dtype)
        return super().scores(short(q_BHQD), short(k_BHKD), scale)


@near_miss("attention.extreme.products-beyond-float16")
class ScoresInFloat16(Attention):
    """Scores are stored in float16, whatever the inputs are."""

    def scores(self, q_BHQD, k_BHKD, scale):
        return super().scores(q_BHQD, k_BHKD, 1.0).half().to(q_BHQD.dtype) * scale


@near_miss("attention.extreme.values-beyond-float16")
class Bfloat16AsFloat16(Attention):
    """bfloat16 inputs are converted to float16 on the way in: beyond 65504 they are infinite."""

    def attention(self, q, k, v, **options):
        if q.dtype != torch.bfloat16:
            return super().attention(q, k, v, **options)
        result = super().attention(q.half(), k.half(), v.half(), **options)
        if isinstance(result, tuple):
            return result[0].bfloat16(), result[1]
        return result.bfloat16()


@near_miss("attention.precision.long-rows")
class ValuesSummedInLowPrecision(Attention):
    """Weighted values are summed key by key in the 16-bit dtype."""

    def score_scale(self, q, scale):
        self.dtype = q.dtype
        return super().score_scale(q, scale)

    def combine(self, weights_BHQK, v_BHKE):
        if self.dtype.itemsize > 2:
            return super().combine(weights_BHQK, v_BHKE)
        total = torch.zeros(*weights_BHQK.shape[:3], v_BHKE.shape[3], dtype=self.dtype)
        for key in range(v_BHKE.shape[2]):
            total = total + (weights_BHQK[..., key, None] * v_BHKE[:, :, key, None]).to(self.dtype)
        return total.to(weights_BHQK.dtype)


# Attention: one head, one length, one width


@near_miss("attention.gqa.query-head-reads-its-group")
class LastHeadReadsFirstGroup(Attention):
    """The last query head reads the first key/value head."""

    def expand_kv_heads(self, x_BGKD, heads):
        x_BHKD = super().expand_kv_heads(x_BGKD, heads)
        return torch.cat([x_BHKD[:, :-1], x_BHKD[:, :1]], dim=1)


@near_miss("attention.gqa.query-head-reads-its-group")
class GroupsRightForTwo(Attention):
    """With more than two key/value heads, they are tiled."""

    def expand_kv_heads(self, x_BGKD, heads):
        groups = x_BGKD.shape[1]
        if groups <= 2:
            return super().expand_kv_heads(x_BGKD, heads)
        return x_BGKD.repeat(1, heads // groups, 1, 1)


@near_miss("attention.gqa.query-head-reads-its-group")
class GroupsRightForThree(Attention):
    """With more than three key/value heads, as every large model has, they are tiled."""

    def expand_kv_heads(self, x_BGKD, heads):
        groups = x_BGKD.shape[1]
        if groups <= 3:
            return super().expand_kv_heads(x_BGKD, heads)
        return x_BGKD.repeat(1, heads // groups, 1, 1)


@near_miss("attention.tiles.many-heads")
class HeadsBeyondEight(Attention):
    """The ninth query head and those after it are the first ones again."""

    def combine(self, weights_BHQK, v_BHKE):
        out = super().combine(weights_BHQK, v_BHKE)
        return out[:, torch.arange(out.shape[1]) % 8]


class _LastKeyDropped(Attention):
    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        keys = scores_BHQK.shape[-1]
        if keys % self.tile == 0 and keys > 1:
            visible_BHQK = visible_BHQK & (torch.arange(keys) < keys - 1)
        return super().softmax(scores_BHQK, visible_BHQK, sinks)


@near_miss("attention.full.matches-oracle")
class LastKeyOfTileOf16(_LastKeyDropped):
    """The last key is dropped when the number of keys is a multiple of 16."""

    tile = 16


@near_miss("attention.tiles.matches-oracle")
class LastKeyOfTileOf64(_LastKeyDropped):
    """The last key is dropped when the number of keys is a multiple of 64."""

    tile = 64


@near_miss("attention.tiles.causal")
class SecondQueryTile(Attention):
    """From query 64 on the causal mask is one key short, as with a wrong tile offset."""

    def visible(self, q, k, *, causal, **options):
        visible = super().visible(q, k, causal=causal, **options)
        if not causal:
            return visible
        shifted = torch.cat([visible[..., 1:], visible[..., :1] & False], dim=-1)
        late = (torch.arange(q.shape[2]) >= 64)[:, None]
        return torch.where(late & shifted.any(-1, keepdim=True), shifted, visible)


@near_miss("attention.causal.sees-no-future-key")
class QueriesBeyond16(Attention):
    """From query 16 on the causal mask is one key short."""

    def visible(self, q, k, *, causal, **options):
        visible = super().visible(q, k, causal=causal, **options)
        if not causal:
            return visible
        shifted = torch.cat([visible[..., 1:], visible[..., :1] & False], dim=-1)
        late = (torch.arange(q.shape[2]) >= 16)[:, None]
        return torch.where(late & shifted.any(-1, keepdim=True), shifted, visible)


class _ChannelsDropped(Attention):
    def scores(self, q_BHQD, k_BHKD, scale):
        used = self.used(q_BHQD.shape[-1])
        return super().scores(q_BHQD[..., :used], k_BHKD[..., :used], scale)


@near_miss("attention.extreme.odd-widths")
class LastChannelsOfOddWidths(_ChannelsDropped):
    """Channels beyond the last multiple of 4 are left out of the scores."""

    def used(self, width):
        return max(4, width // 4 * 4)


@near_miss("attention.tiles.widths")
class ChannelsBeyond96(_ChannelsDropped):
    """Channels beyond 96 are left out of the scores: wrong for the usual width of 128."""

    def used(self, width):
        return min(width, 96)


@near_miss("attention.causal.one-token-decode")
class NewestKeyMissedInDecode(Attention):
    """A single query does not see the newest key."""

    def visible(self, q, k, *, causal, **options):
        visible = super().visible(q, k, causal=causal, **options)
        if not causal or q.shape[2] > 1 or k.shape[2] == 1:
            return visible
        return visible & (torch.arange(k.shape[2]) < k.shape[2] - 1)


# Attention: windows, masks, padding


@near_miss("attention.window.left-bound-is-inclusive")
class WindowOneMore(Attention):
    """The left bound reaches one key too far."""

    def visible(self, q, k, *, window, **options):
        if window is not None and window[0] is not None:
            window = (window[0] + 1, window[1])
        return super().visible(q, k, window=window, **options)


@near_miss("attention.window.left-bound-is-inclusive")
class WideWindowRoundedUp(Attention):
    """Windows of more than 4 tokens are rounded up to a multiple of 8, as whole tiles."""

    def visible(self, q, k, *, window, **options):
        if window is not None and window[0] is not None and window[0] >= 4:
            window = (-(-(window[0] + 1) // 8) * 8 - 1, window[1])
        return super().visible(q, k, window=window, **options)


@near_miss("attention.window.with-padding")
class WindowLostWithPadding(Attention):
    """With padding in the batch the window is left out."""

    def visible(self, q, k, *, window, key_valid, **options):
        window = window if key_valid is None else None
        return super().visible(q, k, window=window, key_valid=key_valid, **options)


@near_miss("attention.window.with-documents")
class WindowLostWithSegments(Attention):
    """Within packed documents the window is left out."""

    def visible(self, q, k, *, window, q_segments, cu_seqlens_q, **options):
        window = window if q_segments is None and cu_seqlens_q is None else None
        more = {"q_segments": q_segments, "cu_seqlens_q": cu_seqlens_q}
        return super().visible(q, k, window=window, **more, **options)


@near_miss("attention.packed.cumulative-full")
class PackedIsAlwaysCausal(Attention):
    """Documents packed by cumulative lengths are causal, asked or not."""

    def visible(self, q, k, *, causal, cu_seqlens_q, **options):
        causal = causal or cu_seqlens_q is not None
        return super().visible(q, k, causal=causal, cu_seqlens_q=cu_seqlens_q, **options)


@near_miss("attention.packed.empty-document")
class EmptyDocumentEndsPacking(Attention):
    """Documents after an empty one are not attended to: its length of 0 ends the loop."""

    def visible(self, q, k, *, cu_seqlens_q, **options):
        visible = super().visible(q, k, cu_seqlens_q=cu_seqlens_q, **options)
        if cu_seqlens_q is None or bool((cu_seqlens_q.diff() > 0).all()):
            return visible
        end = int(cu_seqlens_q[int((cu_seqlens_q.diff() == 0).nonzero()[0])])
        return visible & (torch.arange(q.shape[2]) < end)[:, None]


@near_miss("attention.packed.segments-see-their-own")
class SegmentsInEightBits(Attention):
    """Segment ids are compared in eight bits: document 256 sees document 0."""

    def visible(self, q, k, *, q_segments, k_segments, **options):
        if q_segments is not None:
            q_segments, k_segments = q_segments.to(torch.int8), k_segments.to(torch.int8)
        return super().visible(q, k, q_segments=q_segments, k_segments=k_segments, **options)


@near_miss("attention.positions.causal")
class PositionsInBfloat16(Attention):
    """Positions are compared in bfloat16, which counts to 256."""

    def visible(self, q, k, *, q_positions, k_positions, **options):
        if q_positions is not None:
            q_positions, k_positions = (p.bfloat16().long() for p in (q_positions, k_positions))
        return super().visible(q, k, q_positions=q_positions, k_positions=k_positions, **options)


@near_miss("attention.padding.sees-real-keys")
class PaddingOfFirstRow(Attention):
    """All rows have the padding of the first."""

    def visible(self, q, k, *, key_valid, **options):
        key_valid = None if key_valid is None else key_valid[:1]
        return super().visible(q, k, key_valid=key_valid, **options)


@near_miss("attention.padding.sees-real-keys")
class PaddingAlwaysRight(Attention):
    """Real keys are counted and taken from the front, where left padding is."""

    def visible(self, q, k, *, key_valid, **options):
        if key_valid is not None:
            key_valid = torch.arange(k.shape[2]) < key_valid.sum(-1, keepdim=True)
        return super().visible(q, k, key_valid=key_valid, **options)


@near_miss("attention.padding.anywhere")
class PaddingIsContiguous(Attention):
    """Everything from the first to the last real key is taken for real, holes included."""

    def visible(self, q, k, *, key_valid, **options):
        if key_valid is not None:
            after, before = (
                key_valid.flip(-1).cummax(-1).values.flip(-1),
                key_valid.cummax(-1).values,
            )
            key_valid = after & before
        return super().visible(q, k, key_valid=key_valid, **options)


@near_miss("attention.mask.additive-is-added")
class BiasOfFirstHead(Attention):
    """The bias of the first head is added to all."""

    def add_bias(self, scores_BHQK, bias):
        return scores_BHQK + bias[:, :1]


@near_miss("attention.mask.broadcasts")
class MaskOfTwoAxes(Attention):
    """A mask without axes for batch and heads, [queries, keys], is taken for none."""

    def attention(self, q, k, v, *, mask=None, **options):
        if mask is not None and mask.ndim == 2:
            mask = None
        return super().attention(q, k, v, mask=mask, **options)


@near_miss("attention.cache.nothing-written")
class EmptyCacheIsNaN(Attention):
    """A row whose cache is empty gives NaN."""

    def attention(self, q, k, v, *, key_lengths=None, return_lse=False, **options):
        more = {"key_lengths": key_lengths, "return_lse": True}
        out, lse = super().attention(q, k, v, **more, **options)
        if key_lengths is not None:
            out = torch.where((key_lengths == 0)[:, None, None, None], torch.nan, out)
        return (out, lse) if return_lse else out


@near_miss("attention.cache.shorter-than-queries")
class ShortCacheAlignedToFront(Attention):
    """A row with fewer written slots than queries is aligned to its first slot."""

    def visible(self, q, k, *, key_lengths, causal, **options):
        visible = super().visible(q, k, key_lengths=key_lengths, causal=causal, **options)
        if key_lengths is None or not causal:
            return visible
        aligned = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]
        written = (torch.arange(k.shape[2]) < key_lengths[:, None])[:, None, None]
        short = (key_lengths < q.shape[2])[:, None, None, None]
        return torch.where(short, aligned & written, visible)


# Attention: sinks, log-sum-exp, gradients


@near_miss("attention.sinks.match-oracle")
class SinkOfFirstHead(Attention):
    """All heads have the sink of the first."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        sinks = None if sinks is None else sinks[:1].expand(sinks.shape)
        return super().softmax(scores_BHQK, visible_BHQK, sinks)


@near_miss("attention.sinks.match-oracle")
class SinkScaled(Attention):
    """The sink is multiplied by the scale, as if it were a score of a key."""

    def score_scale(self, q, scale):
        self.factor = super().score_scale(q, scale)
        return self.factor

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        return super().softmax(
            scores_BHQK, visible_BHQK, None if sinks is None else sinks * self.factor
        )


class _OtherLse(Attention):
    def attention(self, q, k, v, *, return_lse=False, **options):
        out, lse = super().attention(q, k, v, return_lse=True, **options)
        return (out, self.other(lse, q, k, v, options)) if return_lse else out


@near_miss("attention.lse.matches-oracle")
class LseInBaseTwo(_OtherLse):
    """The log-sum-exp is a logarithm to base 2."""

    def other(self, lse, q, k, v, options):
        return lse / math.log(2)


@near_miss("attention.lse.matches-oracle")
class LseRoundedToBfloat16(_OtherLse):
    """The log-sum-exp goes through bfloat16."""

    def other(self, lse, q, k, v, options):
        return lse.bfloat16().float()


@near_miss("attention.lse.with-options")
class LseWithoutBias(_OtherLse):
    """The additive mask is not in the log-sum-exp."""

    def other(self, lse, q, k, v, options):
        if options.get("mask") is None or options["mask"].dtype == torch.bool:
            return lse
        without = {**options, "mask": None, "return_lse": True}
        return Attention().attention(q, k, v, **without)[1]


@near_miss("attention.lse.with-options")
class LseOfUncappedScores(_OtherLse):
    """The soft cap, the window and the padding are not in the log-sum-exp."""

    def other(self, lse, q, k, v, options):
        without = {**options, "softcap": None, "window": None, "key_valid": None}
        return Attention().attention(q, k, v, **without, return_lse=True)[1]


class _GradientWithout(Attention):
    """The gradient of v comes from weights that know nothing of some options."""

    def attention(self, q, k, v, *, return_lse=False, **options):
        out = super().attention(q, k, v.detach(), return_lse=return_lse, **options)
        without = {**options, **dict.fromkeys(self.forgotten)}
        if options.get("sinks") is not None:
            without["sinks"] = options["sinks"].detach()
        if not v.requires_grad or return_lse:
            return super().attention(q, k, v, return_lse=return_lse, **options)
        through_v = super().attention(q.detach(), k.detach(), v, **without)
        return out + through_v - through_v.detach()


@near_miss("attention.gradient.masked")
class GradientOfValuesUnmasked(_GradientWithout):
    """The gradient of v does not know the mask."""

    forgotten = ("mask",)


@near_miss("attention.gradient.padding")
class GradientOfValuesWithPadding(_GradientWithout):
    """The gradient of v does not know the padding or the documents."""

    forgotten = ("key_valid", "q_segments", "k_segments", "cu_seqlens_q", "cu_seqlens_k")


@near_miss("attention.gradient.softcap")
class SoftcapDerivativeForgotten(Attention):
    """The backward pass goes through the soft cap as if it were not there."""

    def cap(self, scores_BHQK, softcap):
        if softcap is None:
            return scores_BHQK
        capped = super().cap(scores_BHQK, softcap).detach()
        return scores_BHQK + (capped - scores_BHQK).detach()


@near_miss("attention.gradient.causal")
class GradientOfLastKeyLost(Attention):
    """The last key gets no gradient."""

    def attention(self, q, k, v, **options):
        lost = lambda g: torch.cat([g[:, :, :-1], 0 * g[:, :, -1:]], dim=2)
        return super().attention(q, OtherGradient.apply(k, lost), v, **options)


# Rotary embedding


class _OtherFrequencies(Rotary):
    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        found = super().frequencies(rotary_dim, theta, layout, scaling, length)
        return self.other(*found, rotary_dim, theta, scaling or {}, length)


@near_miss("rotary.theta.configured")
class ThetaOnePercentOff(Rotary):
    """theta is one percent too large."""

    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        return super().frequencies(rotary_dim, 1.01 * theta, layout, scaling, length)


@near_miss("rotary.layout.half")
class TwoPairsSwapped(_OtherFrequencies):
    """The last two pairs have each other's frequency."""

    def other(self, frequencies, factor, *rest):
        return torch.cat([frequencies[:-2], frequencies[-2:].flip(0)]), factor


@near_miss("rotary.llama3.bands")
class Llama3HardStep(_OtherFrequencies):
    """Llama 3's pairs between the bands are kept or divided instead of blended."""

    def other(self, frequencies, factor, rotary_dim, theta, scaling, length):
        if scaling.get("rope_type") == "llama3":
            plain = steps.default_frequencies(rotary_dim, theta)
            slow = frequencies < (plain + plain / scaling["factor"]) / 2
            frequencies = torch.where(slow, plain / scaling["factor"], plain)
        return frequencies, factor


@near_miss("rotary.yarn.frequencies")
class YarnRampOnePairLate(_OtherFrequencies):
    """YaRN's ramp begins and ends one pair late."""

    def other(self, frequencies, factor, rotary_dim, theta, scaling, length):
        if scaling.get("rope_type") == "yarn":
            plain = steps.default_frequencies(rotary_dim, theta)
            ratio = frequencies / plain
            frequencies = plain * torch.cat([ratio[:1], ratio[:-1]])
        return frequencies, factor


@near_miss("rotary.yarn.mscale-alone")
class MscaleAloneUsed(_OtherFrequencies):
    """mscale without mscale_all_dim is used for the factor on cos and sin."""

    def other(self, frequencies, factor, rotary_dim, theta, scaling, length):
        alone = scaling.get("mscale") and not scaling.get("mscale_all_dim")
        if alone and scaling.get("attention_factor") is None:
            factor = steps.yarn_mscale(scaling["factor"], scaling["mscale"])
        return frequencies, factor


@near_miss("rotary.partial.frequencies")
class LastChannelsRotated(Rotary):
    """A partial rotation turns the last channels and lets the first pass."""

    def rotary(self, x, positions, *, rotary_dim=None, **options):
        if rotary_dim in (None, x.shape[-1]):
            return super().rotary(x, positions, **options)
        moved = x.roll(rotary_dim, -1)
        return (
            super().rotary(moved, positions, rotary_dim=rotary_dim, **options).roll(-rotary_dim, -1)
        )


@near_miss("rotary.positions.far")
class PositionsClamped(Rotary):
    """Positions end at 65536, as a table does."""

    def positions(self, x, positions):
        return positions.clamp(max=65536)


@near_miss("rotary.positions.far")
class FarTablesInBfloat16(Rotary):
    """cos and sin go through bfloat16 beyond position 1000."""

    def tables(self, x, positions, frequencies_P, attention_factor):
        tables = super().tables(x, positions, frequencies_P, attention_factor)
        far = (positions > 1000)[:, None, :, None]
        return tuple(torch.where(far, t.bfloat16().to(t.dtype), t) for t in tables)


@near_miss("rotary.heads.alike")
class LastHeadNotRotated(Rotary):
    """The last head is not rotated."""

    def rotate(self, x_BHTR, cos, sin, layout):
        y = super().rotate(x_BHTR, cos, sin, layout)
        return torch.cat([y[:, :-1], x_BHTR[:, -1:]], dim=1)


@near_miss("rotary.longrope.switch")
class LongFactorsOneTokenEarly(Rotary):
    """LongRoPE switches at the trained length instead of behind it."""

    def length(self, x, positions):
        return super().length(x, positions) + 1


@near_miss("rotary.dynamic.beyond-trained-length")
class LengthIsNumberOfTokens(Rotary):
    """Dynamic scaling goes by the number of tokens of the call instead of the largest position."""

    def length(self, x, positions):
        return x.shape[2]


@near_miss("rotary.tiles.tokens")
class TokensBeyond32(Rotary):
    """From token 32 of a call on, the tile's offset is forgotten: positions begin again."""

    def positions(self, x, positions):
        return positions[:, torch.arange(positions.shape[1]) % 32]


@near_miss("rotary.tiles.widths")
class ChannelsBeyond96NotRotated(Rotary):
    """Pairs from the forty-eighth on do not turn: wrong for the usual width of 128."""

    def tables(self, x, positions, frequencies_P, attention_factor):
        cos, sin = super().tables(x, positions, frequencies_P, attention_factor)
        late = torch.arange(cos.shape[-1]) >= 48
        return torch.where(late, 1, cos), torch.where(late, 0, sin)


@near_miss("rotary.layers.partial")
class RotaryDimOfLayersIgnored(Rotary):
    """rotary_dim in the table of a type of layer is not read."""

    def layer_options(self, layers, layer_type):
        options = super().layer_options(layers, layer_type)
        return None if options is None else {k: v for k, v in options.items() if k != "rotary_dim"}


@near_miss("rotary.gradient.x")
class GradientOfLastPairUnturned(Rotary):
    """The gradient of the last channel is a hundredth too small."""

    def rotary(self, x, positions, **options):
        width = x.shape[-1]
        weights = torch.ones(width, dtype=x.dtype)
        weights[-1] = 0.99
        return super().rotary(OtherGradient.apply(x, lambda g: g * weights), positions, **options)


# Rotary embedding as a module


class _Modules:
    module: type

    def rotary_module(self, head_dim, **options):
        return self.module(**options)


class _ResetToDefaultTheta(RotaryModule):
    def reset_parameters(self):
        self.options = {**self.options, "theta": 10000.0}


@near_miss("rotary_module.meta.restored")
class ResetToDefaultTheta(_Modules):
    """reset_parameters computes the tables with the default theta."""

    module = _ResetToDefaultTheta


class _TableOfTheFirstCall(RotaryModule):
    def forward(self, x, positions):
        self.positions = getattr(self, "positions", positions)
        if self.positions.shape != positions.shape:
            self.positions = positions
        return super().forward(x, self.positions)


@near_miss("rotary_module.scaling.stateless")
class TableOfTheFirstCall(_Modules):
    """cos and sin of the first call are kept for later calls of the same shape."""

    module = _TableOfTheFirstCall


# Attention with a cache


@near_miss("cached_attention.window.any-schedule")
class EvictsOneTooMany(CacheAdapter):
    """The window is one key short once it is full."""

    def attend(self, q, positions):
        full, window = self.positions_BS.shape[1] > 8, self.window
        if window is not None and full:
            self.window = (max(window[0] - 1, 0), 0)
        out = super().attend(q, positions)
        self.window = window
        return out


@near_miss("cached_attention.scale.given")
class ScaleOfFirstStepOnly(CacheAdapter):
    """A given scale is used in the first step only."""

    def score_scale(self, q):
        if self.scale is not None and self.positions_BS.shape[1] > q.shape[2]:
            return q.shape[-1] ** -0.5
        return super().score_scale(q)


@near_miss("cached_attention.scale.yarn-mscale")
class MscaleNotSquared(CacheAdapter):
    """YaRN's correction of the score scale is not squared."""

    def score_scale(self, q):
        plain = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return math.sqrt(super().score_scale(q) * plain)


@near_miss("cached_attention.steps.any-schedule")
class ValuesKeptInBfloat16(CacheAdapter):
    """Values go through bfloat16 in the cache."""

    def append(self, k, v, positions):
        super().append(k, v.bfloat16().to(v.dtype), positions)


@near_miss("cached_attention.sinks.once")
class SinksOfFirstStepOnly(CacheAdapter):
    """After the first step the sinks are forgotten."""

    def attend(self, q, positions):
        out = super().attend(q, positions)
        self.sinks = None
        return out


@near_miss("cached_attention.steps.any-schedule")
class StepsBeyondFour(CacheAdapter):
    """In later steps of more than four tokens, those behind the fifth are taken for the fifth."""

    def attend(self, q, positions):
        if self.positions_BS.shape[1] > q.shape[2] > 4:
            positions = torch.minimum(positions, positions[:, 4:5])
        return super().attend(q, positions)


@near_miss("cached_attention.scale.zero")
class FalsyScaleOfCacheIsDefault(CacheAdapter):
    """``scale or default``: a scale of 0 is taken for none given."""

    def score_scale(self, q):
        return super().score_scale(q) or q.shape[-1] ** -0.5


@near_miss("cached_attention.padding.ended-rows")
class LaterPaddingIgnored(CacheAdapter):
    """Padding in later steps, of rows that have ended, is taken for tokens."""

    def __call__(self, q, k, v, *, key_valid=None):
        if self.positions_BS is not None and key_valid is not None:
            key_valid = torch.ones_like(key_valid)
        return super().__call__(q, k, v, key_valid=key_valid)


@near_miss("cached_attention.steps.past-128-tokens")
class CacheOf128(CacheAdapter):
    """The cache has room for 128 tokens; later ones overwrite the first."""

    def append(self, k, v, positions):
        super().append(k, v, positions)
        self.k_BGSD, self.v_BGSE = self.k_BGSD[:, :, -128:], self.v_BGSE[:, :, -128:]
        self.positions_BS = self.positions_BS[:, -128:]
