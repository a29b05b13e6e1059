"""torch's ``scaled_dot_product_attention``: the default dispatch, and each backend on its own."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from reference_impl.attention import Attention, Window, visible_keys


class TorchSDPA:
    """``torch.nn.functional.scaled_dot_product_attention``, the kernel chosen by torch.

    Native: the softmax, grouped heads, the scale, boolean and additive masks, causal masks with the
    default alignment (``is_causal``) and aligned to the last key (``causal_lower_right``). Glue:
    windows, padding, cache lengths, packed documents and positions become an explicit mask; cache
    slots that hold nothing are zeroed, for a weight of 0 does not silence a NaN.
    """

    backend: ClassVar[SDPBackend | None] = None
    on_cpu: ClassVar[bool] = True

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
        key_lengths: Tensor | None = None,
        q_segments: Tensor | None = None,
        k_segments: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.Attention`."""
        self.need_cuda(q)
        limits = {
            "window": window,
            "key_valid": key_valid,
            "key_lengths": key_lengths,
            "q_segments": q_segments,
            "k_segments": k_segments,
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "q_positions": q_positions,
            "k_positions": k_positions,
        }
        limited = any(value is not None for value in limits.values())
        q_len, k_len = q.shape[2], k.shape[2]
        if limited or (causal and (mask is not None or q_len > k_len)):
            visible = visible_keys(q_len, k_len, causal=causal, device=q.device, **limits)
            mask = visible if mask is None else restricted(mask, visible)
        elif causal and q_len < k_len:
            # is_causal would align the first query with the first key.
            mask = causal_lower_right(q_len, k_len)
        is_causal = causal and mask is None
        used = Attention().used_slots(k, key_lengths=key_lengths, k_positions=k_positions)
        k, v = (Attention().clear_unused_slots(x, used) for x in (k, v))
        with self.only_this_backend():
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )

    def need_cuda(self, q: Tensor) -> None:
        """Decline the CPU where this backend has no kernel for it."""
        if not self.on_cpu and q.device.type != "cuda":
            raise NotImplementedError("needs CUDA")

    def only_this_backend(self):
        """torch's own choice restricted to this backend; a case that it refuses is declined."""
        return nullcontext() if self.backend is None else _Only(self.backend)


class _Only:
    """``sdpa_kernel`` for one backend, whose "No available kernel" declines the case."""

    def __init__(self, backend: SDPBackend) -> None:
        self.contexts = (warnings.catch_warnings(), sdpa_kernel(backend))

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()
        warnings.simplefilter("ignore")  # torch warns of each reason why a kernel does not fit

    def __exit__(self, kind, error, traceback) -> None:
        for context in reversed(self.contexts):
            context.__exit__(kind, error, traceback)
        if (
            kind is not None
            and issubclass(kind, RuntimeError)
            and "No available kernel" in str(error)
        ):
            raise NotImplementedError(str(error)) from error


def restricted(mask: Tensor, visible: Tensor) -> Tensor:
    """The mask, boolean or additive, with every key hidden that is not visible."""
    if mask.dtype == torch.bool:
        return mask & visible
    return torch.where(visible, mask, -torch.inf)


class TorchSDPAMath(TorchSDPA):
    """The same, by the unfused kernel alone."""

    backend = SDPBackend.MATH


class TorchSDPAFlash(TorchSDPA):
    """The same, by the flash kernel of the CPU or of CUDA alone."""

    backend = SDPBackend.FLASH_ATTENTION


class TorchSDPAEfficient(TorchSDPA):
    """The same, by the memory-efficient kernel alone; CUDA only."""

    backend = SDPBackend.EFFICIENT_ATTENTION
    on_cpu = False


class TorchSDPACudnn(TorchSDPA):
    """The same, by cuDNN's kernel alone; CUDA only."""

    backend = SDPBackend.CUDNN_ATTENTION
    on_cpu = False
