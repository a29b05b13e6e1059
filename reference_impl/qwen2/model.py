"""Qwen2 over the ranks of a group: prefill, chunks and decoding with a key/value cache.

Axes in tensor names::

    B batch    T new tokens    S tokens so far, the new ones included    C width of the model
    H query heads of a rank    G key/value heads of a rank    D head width    V vocabulary

Per block, ``x += o(attention(norm(x)))`` and ``x += mlp(norm(x))``, with one sum over the ranks each.
Every step is a method, so that a planted bug replaces one of them.

Sources: transformers ``models/qwen2``; Qwen2 (arXiv 2407.10671).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference_impl.attention import Attention
from reference_impl.hf_directory import EMBEDDING, HEAD
from reference_impl.qwen2.config import Qwen2Config
from reference_impl.qwen2.layers import (
    ParallelMLP,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from reference_impl.qwen2.sharding import kv_replicas
from reference_impl.ranks import OneRank, Ranks
from reference_impl.rotary import Rotary


@dataclass(frozen=True)
class KVCache:
    """What attention has seen: rotated keys, values, and which slots hold a token.

    A call with a cache gives a new one and leaves the old one as it was.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values [B, G, S, D] of each block."""
    valid_BS: Tensor
    """False for padding."""

    @property
    def length(self) -> int:
        """S, how many slots are filled."""
        return self.valid_BS.shape[1]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps)`` in float32 at least, rounded to the dtype of x, times a weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The shape and dtype of ``x`` [..., C]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class ParallelAttention(nn.Module):
    """Self-attention of the heads of a rank; the output projection sums over the ranks."""

    def __init__(
        self,
        config: Qwen2Config,
        weights: Mapping[str, Tensor],
        *,
        ranks: Ranks,
        replicas: Ranks,
    ) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks
        parts = {
            f"{name}.{what}": weights[f"{name}_proj.{what}"]
            for name in "qkv"
            for what in ("weight", "bias")
        }
        self.qkv = QKVParallelLinear(parts, ranks=ranks, replicas=replicas)
        self.o = RowParallelLinear(
            weights["o_proj.weight"], weights.get("o_proj.bias"), ranks=ranks
        )

    def forward(
        self,
        x_BTC: Tensor,
        positions_BT: Tensor,
        valid_BS: Tensor,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Output [B, T, C], and the keys and values [B, G, S, D] seen so far."""
        q, k, v = (self.split_heads(part) for part in self.project(x_BTC))
        q, k = self.rotate(q, positions_BT), self.rotate(k, positions_BT)
        k, v = self.append(past, k, v)
        y_BHTD = self.attend(q, k, v, valid_BS)
        return self.o(y_BHTD.transpose(1, 2).flatten(2)), (k, v)

    def project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, T, heads x D]."""
        return self.qkv(x_BTC)

    def split_heads(self, x_BTF: Tensor) -> Tensor:
        """[B, T, heads x D] as [B, heads, T, D]."""
        return x_BTF.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def rotate(self, x_BHTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Rotary embedding of halves."""
        scaling = None if self.config.scaling is None else dict(self.config.scaling)
        theta = self.config.rope_theta
        return Rotary().rotary(x_BHTD, positions_BT, theta=theta, scaling=scaling)

    def append(
        self, past: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, with one entry a key/value head."""
        if past is None:
            return k, v
        return torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid_BS: Tensor) -> Tensor:
        """Causal attention [B, H, T, D]; the last query is at the last slot of the cache."""
        return Attention().attention(q, k, v, causal=True, key_valid=valid_BS)


class Block(nn.Module):
    """One block of the model."""

    attention_class: type[ParallelAttention] = ParallelAttention

    def __init__(
        self,
        config: Qwen2Config,
        weights: Mapping[str, Tensor],
        *,
        ranks: Ranks,
        replicas: Ranks,
    ) -> None:
        super().__init__()
        self.input_norm = self.norm(weights["input_layernorm.weight"], config)
        self.attention = self.attention_class(
            config, under("self_attn.", weights), ranks=ranks, replicas=replicas
        )
        self.attention_norm = self.norm(weights["post_attention_layernorm.weight"], config)
        parts = {f"{n}.weight": weights[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down")}
        self.mlp = self.make_mlp(parts, ranks)

    def norm(self, weight: Tensor, config: Qwen2Config) -> nn.Module:
        """The norm with this weight."""
        return RMSNorm(weight, config.rms_norm_eps)

    def make_mlp(self, parts: dict[str, Tensor], ranks: Ranks) -> nn.Module:
        """The MLP of these parts."""
        return ParallelMLP(parts, ranks=ranks)

    def forward(
        self, x: Tensor, positions: Tensor, valid: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The residual stream [B, T, C] behind the block, and its keys and values."""
        y, seen = self.attention(self.input_norm(x), positions, valid, past)
        x = x + y
        return x + self.mlp(self.attention_norm(x)), seen


class Qwen2(nn.Module):
    """The model of a rank, made of the parts of the weights that it holds.

    ``weights``: by the names of a Hugging Face checkpoint, as :func:`reference_impl.qwen2.loading.\
load_shards` gives them; the head may be left out where it is tied.
    """

    block_class: type[Block] = Block

    def __init__(
        self, config: Qwen2Config, weights: Mapping[str, Tensor], *, ranks: Ranks | None = None
    ) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks or OneRank()
        config.check_ranks(self.ranks.size)
        replicas = self.ranks.split(kv_replicas(config.num_kv_heads, self.ranks.size))
        vocabulary = {"vocab_size": config.vocab_size, "ranks": self.ranks}
        self.embed = VocabParallelEmbedding(weights[EMBEDDING], **vocabulary)
        self.blocks = nn.ModuleList(
            self.block_class(
                config, under(f"model.layers.{i}.", weights), ranks=self.ranks, replicas=replicas
            )
            for i in range(config.num_layers)
        )
        self.norm = self.blocks[0].norm(weights["model.norm.weight"], config)
        self.head = VocabParallelHead(weights.get(HEAD, weights[EMBEDDING]), **vocabulary)
        if HEAD not in weights:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def forward(
        self,
        ids: Tensor,
        *,
        cache: KVCache | None = None,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Logits [B, T, V] of the next tokens ``ids`` int64 [B, T], and the cache with them in it.

        ``valid`` bool [B, T] is False for padding, which no token sees. ``positions`` int64 [B, T];
        default: the number of real tokens before each in its row. Raises ValueError for ids that are
        not of the vocabulary, no tokens, and masks, positions or a cache that do not fit.
        """
        valid_BT = self.check_input(ids, cache, valid, positions)
        valid_BS = valid_BT if cache is None else torch.cat([cache.valid_BS, valid_BT], dim=1)
        if positions is None:
            positions = self.next_positions(ids, valid_BS)
        self.check_positions(positions)
        x, layers = self.embed(ids), []
        for number, block in enumerate(self.blocks):
            past = None if cache is None else cache.layers[number]
            x, seen = block(x, positions, valid_BS, past)
            layers.append(seen)
        return self.head(self.norm(x)), KVCache(tuple(layers), valid_BS)

    def next_positions(self, ids: Tensor, valid_BS: Tensor) -> Tensor:
        """Positions [B, T] of the new tokens; a padding token has that of the token before it."""
        return (valid_BS.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]

    def check_input(
        self, ids: Tensor, cache: KVCache | None, valid: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """Which new tokens are real, [B, T]; ValueError for what does not fit."""
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"ids have shape {list(ids.shape)}, expected [batch, tokens >= 1]")
        shape = tuple(ids.shape)
        if valid is not None and (tuple(valid.shape) != shape or valid.dtype != torch.bool):
            raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}, expected bool {shape}")
        if positions is not None and tuple(positions.shape) != shape:
            raise ValueError(f"positions have shape {list(positions.shape)}, expected {shape}")
        if cache is not None:
            self.check_cache(cache, len(ids))
        return torch.ones_like(ids, dtype=torch.bool) if valid is None else valid

    def check_cache(self, cache: KVCache, batch: int) -> None:
        """Raise ValueError for a cache of another batch or another model."""
        heads = max(1, self.config.num_kv_heads // self.ranks.size)
        expected = [batch, heads, cache.length, self.config.head_dim]
        for k, _ in cache.layers:
            if list(k.shape) != expected:
                raise ValueError(f"the cache has shape {list(k.shape)}, expected {expected}")
        if len(cache.layers) != self.config.num_layers:
            found = len(cache.layers)
            raise ValueError(f"the cache has {found} layers, expected {self.config.num_layers}")

    def check_positions(self, positions: Tensor) -> None:
        """Raise ValueError for positions that the model was not made for."""
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= self.config.max_positions:
            wrong = low if low < 0 else high
            raise ValueError(f"position {wrong} is not below {self.config.max_positions}")


def under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights below a prefix, without it."""
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
