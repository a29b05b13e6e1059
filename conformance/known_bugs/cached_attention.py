"""Documented bugs of attention with a rotary embedding and a key/value cache."""

from __future__ import annotations

import torch

from conformance.known_bugs import known_bug
from reference_impl.cached_attention import CachedAttention
from reference_impl.rotary import Rotary


class _Cache(CachedAttention):
    """An adapter and the caches that it makes in one: without options it is the adapter."""

    def __init__(self, **options) -> None:
        if options:
            super().__init__(**options)

    def cached_attention(self, **options):
        return type(self)(**options)


@known_bug(
    "rope-offset-is-retained-rows",
    contract="cached_attention",
    breaks="cached_attention.window.one-token",
)
class OffsetIsRetainedRows(_Cache):
    """After eviction, new tokens are rotated at the number of keys that the cache still holds."""

    def query_positions(self, positions):
        if self.window is None or self.window[0] is None:
            return positions
        evicted = torch.as_tensor(self.seen_B1 - self.window[0] - 1).clamp(min=0)
        return positions - evicted

    key_positions = query_positions


@known_bug(
    "rope-decode-position-zero",
    contract="cached_attention",
    breaks="cached_attention.steps.one-token",
)
class QueryOfChunkAlone(_Cache):
    """Queries are counted from the beginning of their step: the cached keys come too late."""

    def query_positions(self, positions):
        return positions - self.seen_B1


@known_bug(
    "rope-decode-position-zero.doubled",
    contract="cached_attention",
    breaks="cached_attention.steps.one-token",
)
class OffsetAdvancedTwice(_Cache):
    """The length of the first step is added to the offset once more: positions 5, then 11."""

    def query_positions(self, positions):
        if self.positions_BS is None:
            self.first_step = positions.shape[1]
            return positions
        return positions + self.first_step

    key_positions = query_positions


@known_bug(
    "rope-decode-position-zero.counts-itself",
    contract="cached_attention",
    breaks="cached_attention.steps.one-token",
)
class PastCountsCurrentTokens(_Cache):
    """After the first step, the past length already counts the tokens of the current one."""

    def query_positions(self, positions):
        first = self.positions_BS is None
        return positions if first else positions + positions.shape[1]


@known_bug(
    "rope-left-pad-shared-positions.decode",
    contract="cached_attention",
    breaks="cached_attention.padding.left",
)
class DecodeCountsSlots(_Cache):
    """The first step counts real tokens, later ones count slots: one counter for all rows."""

    def query_positions(self, positions):
        if self.positions_BS is None:
            return positions
        begin = self.positions_BS.shape[1]
        return torch.arange(begin, begin + positions.shape[1]).expand_as(positions)

    key_positions = query_positions


@known_bug(
    "rope-yarn-softmax-mscale-missing",
    contract="cached_attention",
    breaks="cached_attention.scale.yarn-mscale",
)
class NoYarnScoreFactor(_Cache):
    """The score scale is the inverse square root of the width, without YaRN's correction."""

    def score_scale(self, q):
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale


@known_bug(
    "rope-yarn-softmax-mscale-missing.once",
    contract="cached_attention",
    breaks="cached_attention.scale.yarn-mscale",
)
class YarnScoreFactorNotSquared(_Cache):
    """The score scale is multiplied by mscale where both q and k carry it: it must be squared."""

    def score_scale(self, q):
        plain = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return (plain * super().score_scale(q)) ** 0.5


@known_bug(
    "rope-theta-ignored.cached",
    contract="cached_attention",
    breaks="cached_attention.steps.one-token",
)
class DecodeThetaIgnored(_Cache):
    """The decode path builds its rotary embedding with the default theta."""

    def query_positions(self, positions):
        decoding = self.positions_BS is not None
        self.rotary_steps = _DefaultTheta() if decoding else Rotary()
        return positions


class _DefaultTheta(Rotary):
    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        return super().frequencies(rotary_dim, 10000.0, layout, scaling, length)


@known_bug(
    "attn-ring-cache-wrap-order.cached",
    contract="cached_attention",
    breaks="cached_attention.window.any-schedule",
)
class RingDropsOlderKeys(_Cache):
    """After a ring of W slots has wrapped, a step of several tokens drops the slots it passes."""

    def append(self, k, v, positions):
        if self.window is not None and self.positions_BS is not None:
            slots, held = self.window[0] + 1, self.positions_BS.shape[1]
            if held > slots and positions.shape[1] > 1:
                kept = held - held % slots
                for name in ("k_BGSD", "v_BGSE"):
                    setattr(self, name, getattr(self, name)[:, :, kept:])
                self.positions_BS = self.positions_BS[:, kept:]
        super().append(k, v, positions)


@known_bug(
    "attn-window-ignored-in-decode.cached",
    contract="cached_attention",
    breaks="cached_attention.window.one-token",
)
class WindowIgnoredForOneToken(_Cache):
    """A step of one token attends to the whole cache."""

    def attend(self, q, positions):
        window = self.window
        self.window = None if q.shape[2] == 1 else window
        out = super().attend(q, positions)
        self.window = window
        return out


@known_bug(
    "attn-window-ignored-in-decode.cached-chunk",
    contract="cached_attention",
    breaks="cached_attention.window.three-tokens",
)
class WindowFromChunkRows(_Cache):
    """The lower bound of the window is counted from the row in the step, not from the position."""

    def attend(self, q, positions):
        if self.window is None or q.shape[2] == 1:
            return super().attend(q, positions)
        row = torch.arange(q.shape[2])[:, None]
        in_window = self.positions_BS[:, None, None, :] >= row - self.window[0]
        return self.attention_steps.attention(
            q,
            self.k_BGSD,
            self.v_BGSE,
            causal=True,
            mask=in_window,
            scale=self.score_scale(q),
            q_positions=positions,
            k_positions=self.positions_BS,
            sinks=self.sinks,
        )
