"""Self-attention over rotated queries and keys with a key/value cache, called step by step.

Axes in tensor names: B batch, H query heads, G key/value heads, T new tokens, S tokens so far,
D width of queries and keys, E width of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reference_impl.attention import Attention, Window
from reference_impl.rotary import Rotary, yarn_score_factor


class CachedAttention:
    """One layer's attention and its cache; a call takes the next tokens and returns their output.

    The cache keeps every rotated key: an eviction policy may change memory, never the result. A
    token's position is the number of real tokens before it in its row.
    """

    def __init__(
        self,
        *,
        rotary: Mapping[str, Any],
        window: Window | None = None,
        scale: float | None = None,
        sinks: Tensor | None = None,
        attention_steps: Attention | None = None,
        rotary_steps: Rotary | None = None,
    ) -> None:
        self.rotary_options = rotary
        self.window = window
        self.scale = scale
        self.sinks = sinks
        self.attention_steps = attention_steps or Attention()
        self.rotary_steps = rotary_steps or Rotary()
        self.k_BGSD: Tensor | None = None
        self.v_BGSE: Tensor | None = None
        self.positions_BS: Tensor | None = None
        self.seen_B1: Tensor | int = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_valid: Tensor | None = None
    ) -> Tensor:
        """Output [B, H, T, E] of the new tokens q [B, H, T, D], k [B, G, T, D], v [B, G, T, E].

        ``key_valid`` [B, T] is False for padding; what is returned at padding is unspecified.
        """
        if key_valid is None:
            key_valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        positions = self.next_positions(key_valid)
        q_positions, k_positions = self.query_positions(positions), self.key_positions(positions)
        q = self.rotary_steps.rotary(q, q_positions.clamp(min=0), **self.rotary_options)
        k = self.rotary_steps.rotary(k, k_positions.clamp(min=0), **self.rotary_options)
        self.append(k, v, torch.where(key_valid, positions, -1))
        self.seen_B1 = self.seen_B1 + key_valid.sum(-1, keepdim=True)
        return self.attend(q, positions)

    def next_positions(self, key_valid: Tensor) -> Tensor:
        """Positions [B, T] of the new tokens; a padding token has that of the token before it."""
        return self.seen_B1 + key_valid.cumsum(-1) - 1

    def query_positions(self, positions: Tensor) -> Tensor:
        """The positions that the new queries are rotated to."""
        return positions

    def key_positions(self, positions: Tensor) -> Tensor:
        """The positions that the new keys are rotated to."""
        return positions

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Add rotated keys, values and positions (-1 for padding) to the cache."""
        if self.positions_BS is not None:
            k = torch.cat([self.k_BGSD, k], dim=2)
            v = torch.cat([self.v_BGSE, v], dim=2)
            positions = torch.cat([self.positions_BS, positions], dim=1)
        self.k_BGSD, self.v_BGSE, self.positions_BS = k, v, positions

    def attend(self, q: Tensor, positions: Tensor) -> Tensor:
        """Causal, windowed attention of the new queries over the cache."""
        return self.attention_steps.attention(
            q,
            self.k_BGSD,
            self.v_BGSE,
            causal=True,
            window=self.window,
            scale=self.score_scale(q),
            q_positions=positions,
            k_positions=self.positions_BS,
            sinks=self.sinks,
        )

    def score_scale(self, q: Tensor) -> float:
        """The given scale or the inverse square root of the width, times YaRN's correction."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return scale * yarn_score_factor(self.rotary_options.get("scaling"))
