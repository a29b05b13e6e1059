"""Attention, rotary embedding, and one layer of both with a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class Attention(Protocol):
    """Scaled dot-product attention."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        mask: Tensor | None = None,
        key_valid: Tensor | None = None,
        key_lengths: Tensor | None = None,
        q_segments: Tensor | None = None,
        k_segments: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Softmax(q kᵀ · scale) v over the keys that each query sees.

        ``q`` is [batch, q_heads, q_len, head_dim], ``k`` [batch, kv_heads, kv_len, head_dim], ``v``
        [batch, kv_heads, kv_len, value_dim]; the result is [batch, q_heads, q_len, value_dim] in the
        dtype of ``q``. Query head h reads key/value head ``h // (q_heads // kv_heads)``.

        A key is visible when every option allows it. A row that sees no key gives zeros and zero
        gradients. Unless positions are given, the last query is at the position of the last key.

        ``causal``
            keys up to the query's own position.
        ``window`` (left, right)
            keys from ``position - left`` to ``position + right``, both included; None leaves a
            side open. A sliding window of W tokens is ``(W - 1, 0)``.
        ``scale``
            factor on the dot products; default ``head_dim ** -0.5``.
        ``softcap``
            scores become ``softcap * tanh(score / softcap)``, after the scale and before masks.
        ``mask``
            broadcastable to [batch, q_heads, q_len, kv_len]: bool, True where the key is visible;
            or floating, added to the scores (-inf hides a key).
        ``key_valid`` bool [batch, kv_len]
            False for padding, on either side; padding holds arbitrary finite numbers. Positions
            still count slots.
        ``key_lengths`` int64 [batch]
            a preallocated cache: only the first ``key_lengths[b]`` slots were written, the others
            are uninitialised memory (NaN included). The last query is at the last *written* slot.
        ``q_segments``, ``k_segments`` int64 [batch, length]
            packed documents: a query sees keys of its own segment only.
        ``cu_seqlens_q``, ``cu_seqlens_k`` int64 [documents + 1]
            packed documents as cumulative lengths, batch 1; positions are those in the document.
        ``q_positions`` [batch, q_len], ``k_positions`` [batch, kv_len] int64
            positions outright, in any order (a ring cache); a negative key position is a slot that
            was never written. Causal masks and windows compare positions.
        ``sinks`` [q_heads]
            one more logit a head in the softmax denominator, without a value.
        ``return_lse``
            also return the log of the softmax denominator (the sink included) as float32
            [batch, q_heads, q_len], -inf for a row that sees nothing.

        Sources: "Attention is all you need" (arXiv 1706.03762); flash-attention's documentation for
        the alignment, windows and log-sum-exp; gpt-oss for sinks; Gemma 2 (arXiv 2408.00118) for
        the soft cap.
        """


class Rotary(Protocol):
    """Rotary position embedding of queries or keys."""

    def rotary(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        theta: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
        scaling: Mapping[str, Any] | None = None,
        layers: Mapping[str, Mapping[str, Any] | None] | None = None,
        layer_type: str | None = None,
    ) -> Tensor:
        """Rotate each pair of channels of ``x`` by ``position * frequency``; same shape and dtype.

        ``x`` is [batch, heads, tokens, head_dim], ``positions`` int64 [batch, tokens], in any order.

        ``theta``
            pair p of P turns by ``theta ** (-p / P)`` radians a position.
        ``layout``
            ``"half"``: channel p pairs with p + P (Llama, GPT-NeoX);
            ``"interleaved"``: 2p with 2p + 1, written back in place (GPT-J);
            ``"interleaved-to-half"``: the same pairs, written back as halves (DeepSeek);
            ``"half-truncated"``: pairs as "half", turning the other way, P / 2 frequencies from 1
            to 1 / theta evenly spaced in the exponent, the other pairs not at all (modded-nanogpt).
            The first three take (a, b) to (a cos − b sin, b cos + a sin).
        ``rotary_dim``
            only the first channels are rotated, as if they were the whole head; default all.
        ``scaling``
            a table in Hugging Face's spelling: ``rope_type`` of ``linear``, ``dynamic``, ``yarn``,
            ``llama3`` or ``longrope`` with that rule's keys. Every rule but linear reads
            ``original_max_position_embeddings``; dynamic and longrope depend on the largest
            position of this call, and on no other call.
        ``layers``, ``layer_type``
            one table of the options above for each type of layer (None: no rotation), and the type
            of this layer; the other options are then not given.

        Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753),
        transformers ``modeling_rope_utils``.
        """


class RotaryModule(Protocol):
    """Rotary embedding as the module that a model holds."""

    def rotary_module(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
        scaling: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """A module with ``forward(x, positions) -> rotated x``; options as in :class:`Rotary`.

        The suite casts it (``module.to(torch.bfloat16)``) and constructs it on the meta device; in
        that case it calls ``module.to_empty(device=...)`` and then ``module.reset_parameters()``,
        the two steps of torch's own sharded training. Tables survive both.
        """


class CachedAttention(Protocol):
    """One layer's self-attention with rotary embedding and a key/value cache."""

    def cached_attention(
        self,
        *,
        rotary: Mapping[str, Any],
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        sinks: Tensor | None = None,
    ) -> Callable[..., Tensor]:
        """A new, empty cache as a callable ``step(q, k, v, key_valid=None) -> out``.

        Each step takes the next T tokens, not yet rotated: ``q`` [batch, q_heads, T, head_dim],
        ``k`` and ``v`` [batch, kv_heads, T, ...], and returns [batch, q_heads, T, value_dim].
        ``key_valid`` bool [batch, T] is False for padding tokens, whose output is unspecified.

        A token's position is the number of real tokens before it in its row, whatever the cache
        has evicted. Attention is causal; ``rotary`` are the options of :class:`Rotary`, ``window``,
        ``scale`` and ``sinks`` those of :class:`Attention`. With a YaRN ``mscale_all_dim`` the
        score scale is multiplied by ``(0.1 · mscale_all_dim · ln factor + 1)²`` (DeepSeek). Scaling
        rules that depend on the length of a call (dynamic, longrope) are not asked for: keys that
        are in the cache already have been rotated by another table.
        """
