"""torch's FlexAttention, uncompiled and compiled."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from reference_impl.attention import Attention, Window, unpack_documents

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class TorchFlex:
    """``torch.nn.attention.flex_attention``, uncompiled.

    Native: every visibility rule as a ``mask_mod``, soft cap and additive masks as a ``score_mod``,
    grouped heads, the scale and the log-sum-exp. Glue: sinks rescale the output by the log-sum-exp,
    and cache slots that hold nothing are zeroed, for a weight of 0 does not silence a NaN.

    Uncompiled, torch applies the mask function alone and ignores the block sparsity of a BlockMask.
    """

    @cached_property
    def kernel(self) -> Callable:
        """The function that computes."""
        return flex.flex_attention

    def stance(self) -> AbstractContextManager:
        """Whether torch may compile; without this it would trace every new shape all the same."""
        return torch.compiler.set_stance("force_eager")

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
        """See :class:`conformance.contracts.Attention`."""
        used = Attention().used_slots(k, key_lengths=key_lengths, k_positions=k_positions)
        k, v = (Attention().clear_unused_slots(x, used) for x in (k, v))
        if cu_seqlens_q is not None:
            q_segments, q_positions, k_segments, k_positions = unpack_documents(
                cu_seqlens_q, cu_seqlens_k, q.shape[2], k.shape[2]
            )
        bias = None
        if mask is not None:
            mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            if mask.dtype != torch.bool:
                bias, mask = mask, None
        rules = mask_mods(
            causal=causal,
            window=window,
            mask=mask,
            keys=used if key_valid is None else key_valid if used is None else key_valid & used,
            q_segments=q_segments,
            k_segments=k_segments,
            q_at=query_positions(q, k, q_positions, key_lengths),
            k_at=k_positions,
        )
        block_mask = None
        if rules:
            heads = None if mask is None else q.shape[1]
            sizes = (q.shape[0], heads, q.shape[2], k.shape[2])
            block_mask = flex.create_block_mask(flex.and_masks(*rules), *sizes, device=q.device)
        need_lse = return_lse or sinks is not None
        with warnings.catch_warnings(), self.stance():
            warnings.simplefilter("ignore")  # that it is not compiled
            result = self.kernel(
                q,
                k,
                v,
                score_mod=score_mod(softcap, bias),
                block_mask=block_mask,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
                **(lse_request() if need_lse else {}),
            )
        if not need_lse:
            return result
        out, lse = result[0], getattr(result[1], "lse", result[1])
        if sinks is not None:
            sink = sinks.to(lse.dtype)[None, :, None]
            out = (out * torch.sigmoid(lse - sink)[..., None]).to(q.dtype)
            lse = torch.logaddexp(lse, sink)
        return (out, lse) if return_lse else out


class TorchFlexCompiled(TorchFlex):
    """The same, compiled by inductor: one kernel, which skips the blocks that a mask empties."""

    @cached_property
    def kernel(self) -> Callable:
        """The function that computes, compiled for each shape."""
        return torch.compile(flex.flex_attention, dynamic=False)

    def stance(self) -> AbstractContextManager:
        """torch compiles."""
        return nullcontext()


def query_positions(
    q: Tensor, k: Tensor, q_positions: Tensor | None, key_lengths: Tensor | None
) -> Tensor:
    """Positions [batch, q_len]: as given, or such that the last query is at the last key."""
    if q_positions is not None:
        return q_positions.expand(q.shape[0], -1)
    end = torch.full((q.shape[0],), k.shape[2], device=q.device)
    end = end if key_lengths is None else key_lengths
    return end[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)


def mask_mods(
    *,
    causal: bool,
    window: Window | None,
    mask: Tensor | None,
    keys: Tensor | None,
    q_segments: Tensor | None,
    k_segments: Tensor | None,
    q_at: Tensor,
    k_at: Tensor | None,
) -> list[MaskMod]:
    """One mask function for each rule that is asked for."""

    def distance(b: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return q_at[b, query] - (key if k_at is None else k_at[b, key])

    rules: list[MaskMod] = []
    left, right = (None, None) if window is None else window
    if causal:
        rules.append(lambda b, h, query, key: distance(b, query, key) >= 0)
    if left is not None:
        rules.append(lambda b, h, query, key: distance(b, query, key) <= left)
    if right is not None:
        rules.append(lambda b, h, query, key: distance(b, query, key) >= -right)
    if keys is not None:
        rules.append(lambda b, h, query, key: keys[b, key])
    if q_segments is not None:
        rules.append(lambda b, h, query, key: q_segments[b, query] == k_segments[b, key])
    if mask is not None:
        rules.append(lambda b, h, query, key: mask[b, h, query, key])
    return rules


def score_mod(softcap: float | None, bias: Tensor | None) -> Callable | None:
    """The soft cap, then the additive mask."""
    if softcap is None and bias is None:
        return None

    def modified(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias[b, h, query, key]

    return modified


def lse_request() -> dict[str, Any]:
    """How this version of torch is asked for the log-sum-exp."""
    if "return_aux" in inspect.signature(flex.flex_attention).parameters:
        return {"return_aux": flex.AuxRequest(lse=True)}
    return {"return_lse": True}
