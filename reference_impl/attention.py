"""Scaled dot-product attention: which keys a query sees, and what it makes of them.

Axes in tensor names::

    B batch    H query heads    G key/value heads (H is a multiple of G)
    Q queries  K keys           D width of queries and keys    E width of values

Every step is a method of :class:`Attention`, so that a planted bug replaces one of them.
:func:`attention` is the same thing as a function.
"""

from __future__ import annotations

import torch
from torch import Tensor

Window = tuple[int | None, int | None]


class Attention:
    """The steps of attention in the order in which they happen."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        window: Window | None = None,
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
        """Attention of ``q`` [B, H, Q, D] over ``k`` [B, G, K, D] and ``v`` [B, G, K, E].

        The meaning of every option is the contract :class:`conformance.contracts.Attention`;
        :func:`visible_keys` says exactly which keys a query sees. Returns [B, H, Q, E] in the dtype
        of ``q``, and with ``return_lse`` also the log of each row's softmax denominator [B, H, Q]
        in float32 (float64 for float64 inputs), ``-inf`` for a row that sees nothing.

        float16 and bfloat16 inputs are computed in float32 and rounded once at the end.
        Raises ValueError for shapes that do not fit.
        """
        check_shapes(q, k, v)
        compute_dtype = torch.promote_types(q.dtype, torch.float32)
        visible_BHQK = self.visible(
            q,
            k,
            causal=causal,
            window=window,
            mask=mask if mask is not None and mask.dtype == torch.bool else None,
            key_valid=key_valid,
            key_lengths=key_lengths,
            q_segments=q_segments,
            k_segments=k_segments,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            q_positions=q_positions,
            k_positions=k_positions,
        )
        used_BK = self.used_slots(k, key_lengths=key_lengths, k_positions=k_positions)
        k, v = self.clear_unused_slots(k, used_BK), self.clear_unused_slots(v, used_BK)
        k_BHKD = self.expand_kv_heads(k, q.shape[1]).to(compute_dtype)
        v_BHKE = self.expand_kv_heads(v, q.shape[1]).to(compute_dtype)
        scores_BHQK = self.scores(q.to(compute_dtype), k_BHKD, self.score_scale(q, scale))
        scores_BHQK = self.cap(scores_BHQK, softcap)
        if mask is not None and mask.dtype != torch.bool:
            scores_BHQK = self.add_bias(scores_BHQK, mask.to(compute_dtype))
        weights_BHQK, lse_BHQ = self.softmax(scores_BHQK, visible_BHQK, sinks)
        out_BHQE = self.combine(weights_BHQK, v_BHKE).to(q.dtype)
        return (out_BHQE, lse_BHQ) if return_lse else out_BHQE

    def visible(self, q: Tensor, k: Tensor, **options) -> Tensor:
        """Which keys each query sees, bool, broadcastable to [B, H, Q, K]."""
        return visible_keys(q.shape[2], k.shape[2], device=q.device, **options)

    def used_slots(
        self, k: Tensor, *, key_lengths: Tensor | None, k_positions: Tensor | None
    ) -> Tensor | None:
        """Which cache slots hold a key at all, bool [B, K]; None when every slot does."""
        used = None
        if key_lengths is not None:
            used = torch.arange(k.shape[2], device=k.device) < key_lengths[:, None]
        if k_positions is not None:
            used = k_positions >= 0 if used is None else used & (k_positions >= 0)
        return used

    def clear_unused_slots(self, x: Tensor, used_BK: Tensor | None) -> Tensor:
        """Zeros in slots that nothing was written to: a weight of 0 does not silence a NaN."""
        return x if used_BK is None else torch.where(used_BK[:, None, :, None], x, 0)

    def expand_kv_heads(self, x_BGKD: Tensor, heads: int) -> Tensor:
        """[B, G, K, D] to [B, H, K, D]: query head h reads key/value head h // (H // G)."""
        return x_BGKD.repeat_interleave(heads // x_BGKD.shape[1], dim=1)

    def score_scale(self, q: Tensor, scale: float | None) -> float:
        """The factor on every score: the caller's, or the inverse square root of the key width."""
        return q.shape[-1] ** -0.5 if scale is None else scale

    def scores(self, q_BHQD: Tensor, k_BHKD: Tensor, scale: float) -> Tensor:
        """Scaled dot products [B, H, Q, K]; the queries are scaled, so that nothing overflows."""
        return (q_BHQD * scale) @ k_BHKD.transpose(-1, -2)

    def cap(self, scores_BHQK: Tensor, softcap: float | None) -> Tensor:
        """Scores squeezed smoothly into (-softcap, softcap), before any mask is applied."""
        return scores_BHQK if softcap is None else softcap * torch.tanh(scores_BHQK / softcap)

    def add_bias(self, scores_BHQK: Tensor, bias: Tensor) -> Tensor:
        """The additive mask; 0 keeps a key, -inf hides it, anything else shifts its score."""
        return scores_BHQK + bias

    def softmax(
        self, scores_BHQK: Tensor, visible_BHQK: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weights [B, H, Q, K] and log-sum-exp [B, H, Q] over the visible keys and the sink.

        A sink is one more logit a head in the denominator, without a value. A row that sees no key
        has weights 0.
        """
        scores_BHQK = scores_BHQK.masked_fill(~visible_BHQK, -torch.inf)
        peak = scores_BHQK.amax(dim=-1, keepdim=True)
        if sinks is not None:
            sinks_1H11 = sinks.to(scores_BHQK.dtype)[None, :, None, None]
            peak = torch.maximum(peak, sinks_1H11)
        # Constant for the gradient: the softmax does not depend on it. Finite in an empty row.
        peak = torch.where(torch.isneginf(peak), 0, peak).detach()
        exponentials = torch.exp(scores_BHQK - peak)
        total = exponentials.sum(dim=-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks_1H11 - peak)
        empty = total == 0
        weights_BHQK = exponentials / torch.where(empty, 1, total)
        log_total = torch.log(torch.where(empty, 1, total))
        lse_BHQ = torch.where(empty, -torch.inf, log_total + peak).squeeze(-1)
        return weights_BHQK, lse_BHQ

    def combine(self, weights_BHQK: Tensor, v_BHKE: Tensor) -> Tensor:
        """The weighted sum of the values [B, H, Q, E]."""
        return weights_BHQK @ v_BHKE


def attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
    """:meth:`Attention.attention` as a function."""
    return Attention().attention(q, k, v, **options)


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError, naming the shapes, unless q, k and v fit together."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention needs four axes [batch, heads, length, width], found {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"batch, key length or key width do not fit: {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads are not a multiple of key/value heads: {shapes}")


def visible_keys(
    q_len: int,
    k_len: int,
    *,
    causal: bool = False,
    window: Window | None = None,
    mask: Tensor | None = None,
    key_valid: Tensor | None = None,
    key_lengths: Tensor | None = None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which keys each query sees, as bool broadcastable to [B, H, Q, K]; True means visible.

    A key is visible when every option given allows it. Causal masks and windows compare positions:

    * by default key slot j is at position j, and the last query is at the position of the last key
      (of the last *used* slot where ``key_lengths`` is given), so query i of Q is at
      ``last - Q + 1 + i``;
    * ``cu_seqlens_q`` and ``cu_seqlens_k`` [documents + 1] apply the same rule in each document,
      and a query sees keys of its own document only;
    * ``q_positions`` [B, Q] and ``k_positions`` [B, K] state the positions outright; a negative key
      position marks a slot that holds nothing.

    ``causal`` allows positions up to the query's own. ``window=(left, right)`` allows positions
    from ``query - left`` to ``query + right``, both included; None on a side leaves it open (the
    convention of flash-attention; a "sliding window of W tokens" is ``left = W - 1``).
    """
    if cu_seqlens_q is not None:
        q_segments, q_positions, k_segments, k_positions = unpack_documents(
            cu_seqlens_q, cu_seqlens_k, q_len, k_len
        )
    k_at = torch.arange(k_len, device=device)[None] if k_positions is None else k_positions
    q_at = last_positions(q_len, k_len, key_lengths, device) if q_positions is None else q_positions
    q_at, k_at = q_at[:, None, :, None], k_at[:, None, None, :]

    visible = (k_at >= 0).expand(-1, -1, q_len, -1)
    if causal:
        visible = visible & (k_at <= q_at)
    if window is not None:
        left, right = window
        if left is not None:
            visible = visible & (k_at >= q_at - left)
        if right is not None:
            visible = visible & (k_at <= q_at + right)
    if key_lengths is not None:
        slot = torch.arange(k_len, device=device)
        visible = visible & (slot < key_lengths[:, None])[:, None, None, :]
    if key_valid is not None:
        visible = visible & key_valid[:, None, None, :]
    if q_segments is not None:
        visible = visible & (q_segments[:, None, :, None] == k_segments[:, None, None, :])
    if mask is not None:
        visible = visible & mask
    return visible


def last_positions(
    q_len: int, k_len: int, key_lengths: Tensor | None, device: torch.device | str
) -> Tensor:
    """Positions [1 or B, Q] of queries that are the tail of their keys."""
    end = torch.tensor([k_len], device=device) if key_lengths is None else key_lengths
    return end[:, None] - q_len + torch.arange(q_len, device=device)


def unpack_documents(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q_len: int, k_len: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segments and positions, each [1, length], of queries and keys from cumulative lengths.

    Within a document keys count from 0 and the last query is at the position of the last key.
    Tokens behind the last document belong to segment -1 (queries) or -2 (keys), so to none.
    """
    q_segments = torch.full((q_len,), -1, device=cu_seqlens_q.device)
    k_segments = torch.full((k_len,), -2, device=cu_seqlens_q.device)
    q_positions, k_positions = torch.zeros_like(q_segments), torch.zeros_like(k_segments)
    bounds = zip(cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist())
    for document, ((q_begin, q_end), (k_begin, k_end)) in enumerate(bounds):
        q_count, k_count = q_end - q_begin, k_end - k_begin
        q_segments[q_begin:q_end] = document
        k_segments[k_begin:k_end] = document
        q_positions[q_begin:q_end] = torch.arange(k_count - q_count, k_count)
        k_positions[k_begin:k_end] = torch.arange(k_count)
    return q_segments[None], q_positions[None], k_segments[None], k_positions[None]


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """One attention result from two over disjoint sets of keys.

    ``out`` [B, H, Q, E] with ``lse`` [B, H, Q]; a part whose ``lse`` is ``-inf`` saw no key and
    changes nothing, whatever its ``out`` holds. Source: the rescaling step of flash-attention
    (arXiv 2205.14135, algorithm 1).
    """
    peak = torch.maximum(lse_a, lse_b)
    # As in the softmax: constant for the gradient, finite where neither part saw a key.
    peak = torch.where(torch.isneginf(peak), 0, peak).detach()
    share_a, share_b = torch.exp(lse_a - peak), torch.exp(lse_b - peak)
    total = share_a + share_b
    empty = total == 0
    lse = torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1, total)) + peak)
    merged = torch.zeros_like(out_a, dtype=lse.dtype)
    for out_part, share in ((out_a, share_a), (out_b, share_b)):
        weight = (share / torch.where(empty, 1, total))[..., None]
        merged = merged + torch.where(weight > 0, weight * out_part.to(lse.dtype), 0)
    return merged.to(out_a.dtype), lse
