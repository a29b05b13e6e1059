"""transformers' attention functions behind its own mask builders: eager, SDPA and FlexAttention.

What transformers has no notion of (cache lengths for each row, positions outright, sinks outside of
gpt-oss, soft caps outside of Gemma 2) is not offered; nothing is repaired on its way in or out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, LlamaConfig, MistralConfig, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from conformance.implementations.transformers_cached import TransformersCached
from conformance.implementations.transformers_rotary import TransformersRotary
from reference_impl.attention import Window


class _TransformersAttention(TransformersRotary, TransformersCached):
    """One attention function of transformers, called as a decoder layer calls it."""

    kind: ClassVar[str]
    """The name of the function, ``attn_implementation`` of a model."""

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window: Window | None,
        scale: float | None,
        mask: Tensor | None,
        key_valid: Tensor | None,
        q_segments: Tensor | None,
        k_segments: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """The output [batch, q_heads, q_len, value_dim]."""
        if cu_seqlens_q is not None:
            q_segments = segments(cu_seqlens_q, q.shape[2])
            k_segments = segments(cu_seqlens_k, k.shape[2])
        causal, window = settled(causal, window)
        limited = key_valid is not None or q_segments is not None or window is not None or causal
        if mask is not None and not limited:
            attention_mask = self.given_mask(mask, q, k)
        else:
            attention_mask = self.made_mask(
                q, k, causal, window, key_valid, q_segments, k_segments, mask
            )
        module = SimpleNamespace(
            num_key_value_groups=q.shape[1] // k.shape[1],
            head_dim=q.shape[-1],
            is_causal=causal,
            training=False,
            sinks=sinks,
        )
        more = {} if softcap is None else {"softcap": softcap}
        more |= {} if sinks is None else {"s_aux": sinks}
        out_BQHE, _ = self.function(softcap, sinks)(
            module,
            q,
            k,
            v,
            attention_mask,
            scaling=q.shape[-1] ** -0.5 if scale is None else scale,
            dropout=0.0,
            **more,
        )
        return out_BQHE.transpose(1, 2)

    def function(self, softcap: float | None, sinks: Tensor | None) -> Callable:
        """The attention function that a model with these features calls."""
        return ALL_ATTENTION_FUNCTIONS[self.kind]

    def given_mask(self, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """A caller's own mask as the 4D mask that this function takes: boolean or to be added."""
        sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        mask = mask[(None,) * (4 - mask.ndim)].expand(sizes[0], -1, *sizes[2:])
        if mask.dtype == torch.bool and self.kind == "eager":
            zero = torch.zeros((), dtype=q.dtype, device=q.device)
            return torch.where(mask, zero, torch.finfo(q.dtype).min)
        if mask.dtype == torch.bool and self.kind == "flex_attention":
            mask = mask.expand(sizes)
            lookup = lambda b, h, query, key: mask[b, h, query, key]
            return create_block_mask(lookup, *sizes, device=q.device)
        return mask

    def made_mask(
        self,
        q: Tensor,
        k: Tensor,
        causal: bool,
        window: Window | None,
        key_valid: Tensor | None,
        q_segments: Tensor | None,
        k_segments: Tensor | None,
        mask: Tensor | None,
    ) -> Any:
        """The mask that a model makes for this call, as this function takes it."""
        q_len, k_len = q.shape[2], k.shape[2]
        embeds, key_embeds = (x[:, 0, :, :1].detach() for x in (q, k))
        config = self.config(window)
        options: dict[str, Any] = {"attention_mask": key_valid}
        if mask is not None:
            options["and_mask_function"] = and_mask(mask, q, k_len - q_len if causal else 0)
        if not causal:
            if q_segments is not None:
                raise NotImplementedError("transformers packs documents under causal masks alone")
            if window is not None and q_len != k_len:
                raise NotImplementedError("a bidirectional window needs as many queries as keys")
            build = masking_utils.create_bidirectional_mask
            if window is not None:
                build = masking_utils.create_bidirectional_sliding_window_mask
            options["encoder_hidden_states"] = key_embeds
            return build(config, inputs_embeds=embeds, **options)
        build = masking_utils.create_causal_mask
        if window is not None:
            build = masking_utils.create_sliding_window_causal_mask
        if q_segments is not None:
            position_ids = packed_positions(q_segments, k_segments)
            if key_valid is not None or mask is not None:
                raise NotImplementedError("transformers packs documents without any other mask")
            options |= {"past_key_values": None, "position_ids": position_ids}
            return build(config, inputs_embeds=embeds, **options)
        if q_len > k_len:
            raise NotImplementedError("a decoder has no more queries than keys")
        cache = None
        if q_len < k_len:
            cache = DynamicCache()
            past = k[:, :, : k_len - q_len].detach()
            cache.update(past, past, 0)
        return build(config, inputs_embeds=embeds, past_key_values=cache, **options)

    def config(self, window: Window | None) -> Any:
        """A small model's configuration."""
        if window is None:
            return LlamaConfig(attn_implementation=self.kind)
        # Mistral counts the query itself; a bidirectional window counts the tokens on each side.
        size = window[0] + 1 if window[1] is None else window[0]
        return MistralConfig(attn_implementation=self.kind, sliding_window=size)


def and_mask(mask: Tensor, q: Tensor, first: int) -> Callable:
    """A boolean mask as the function that a mask builder combines with its own rules.

    ``first`` is the position of the first query.
    """
    if mask.dtype != torch.bool:
        raise NotImplementedError("an additive 4D mask is the whole mask in transformers")
    if mask.ndim == 4 and mask.shape[1] != 1:
        raise NotImplementedError("transformers combines masks that all heads share")
    mask = mask.expand(q.shape[0], 1, q.shape[2], -1)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[b, 0, query - first, key]

    return visible


def settled(causal: bool, window: Window | None) -> tuple[bool, Window | None]:
    """The same rule as transformers has it: causal with a left side, or both sides alike."""
    left, right = (None, None) if window is None else window
    if right == 0:
        causal, right = True, None
    if causal:
        right = None
    if left is None and right is None:
        return causal, None
    if left is None or not (causal or left == right):
        raise NotImplementedError("windows are causal or the same on both sides in transformers")
    return causal, (left, right)


def segments(cu_seqlens: Tensor, length: int) -> Tensor:
    """The document [1, length] that each token is of."""
    if int(cu_seqlens[-1]) != length:
        raise NotImplementedError("transformers packs documents without a tail")
    return torch.bucketize(
        torch.arange(length, device=cu_seqlens.device), cu_seqlens[1:-1], right=True
    )[None]


def packed_positions(q_segments: Tensor, k_segments: Tensor) -> Tensor:
    """Position ids that start again in every document: how transformers is told of packing."""
    if q_segments.shape != k_segments.shape or not torch.equal(q_segments, k_segments):
        raise NotImplementedError("transformers packs documents in self-attention alone")
    token = torch.arange(q_segments.shape[1], device=q_segments.device)
    starts = torch.ones_like(q_segments, dtype=torch.bool)
    starts[:, 1:] = q_segments[:, 1:] != q_segments[:, :-1]
    return token - torch.where(starts, token, 0).cummax(dim=-1).values


class TransformersEager(_TransformersAttention):
    """Eager attention: Llama's, Gemma 2's for a soft cap, gpt-oss's for sinks.

    Native: everything that is computed, and the masks of ``transformers.masking_utils``. Glue:
    options become a model's configuration, position ids and cache; a boolean 4D mask becomes 0 and
    the lowest number of the dtype, as in the library's own masks.
    """

    kind = "eager"

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
        q_segments: Tensor | None = None,
        k_segments: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.Attention`."""
        options = {name: value for name, value in locals().items() if name not in _NOT_OPTIONS}
        return self.run(q, k, v, **options)

    def function(self, softcap: float | None, sinks: Tensor | None) -> Callable:
        """The eager function of the model with these features."""
        if softcap is not None and sinks is not None:
            raise NotImplementedError("no model in transformers has both a soft cap and sinks")
        if sinks is not None:
            return modeling_gpt_oss.eager_attention_forward
        if softcap is not None:
            return modeling_gemma2.eager_attention_forward
        return modeling_llama.eager_attention_forward


class TransformersSDPA(_TransformersAttention):
    """``sdpa_attention_forward``, with the masks of ``transformers.masking_utils``.

    Native: everything that is computed. Glue: options become a model's configuration, position ids
    and cache.
    """

    kind = "sdpa"

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        window: Window | None = None,
        scale: float | None = None,
        mask: Tensor | None = None,
        key_valid: Tensor | None = None,
        q_segments: Tensor | None = None,
        k_segments: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.Attention`."""
        options = {name: value for name, value in locals().items() if name not in _NOT_OPTIONS}
        return self.run(q, k, v, **options)


class TransformersFlex(_TransformersAttention):
    """``flex_attention_forward``, with the block masks of ``transformers.masking_utils``.

    Native: everything that is computed, the sinks (CUDA only) included. Glue: options
    become a model's configuration, position ids and cache; a boolean 4D mask becomes a BlockMask.
    transformers always compiles FlexAttention; on the CPU this adapter has torch run it uncompiled,
    for inductor would build a new kernel for almost every case.
    """

    kind = "flex_attention"

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
        q_segments: Tensor | None = None,
        k_segments: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.Attention`."""
        options = {name: value for name, value in locals().items() if name not in _NOT_OPTIONS}
        if q.device.type == "cuda":
            return self.run(q, k, v, **options)
        if sinks is not None:
            raise NotImplementedError("transformers has sinks in FlexAttention on CUDA alone")
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled
            return self.run(q, k, v, **options)


_NOT_OPTIONS = ("self", "q", "k", "v")
