"""The model of a directory on the ranks of a process: loading, calling and generating in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference_impl.qwen2.generation import generate
from reference_impl.qwen2.loading import load_model
from reference_impl.qwen2.model import KVCache, Qwen2
from reference_impl.ranks import current_ranks


class LoadedLM:
    """A model with what is done with it."""

    def __init__(self, model: Qwen2) -> None:
        self.model = model

    def forward(self, ids: Tensor, **options: Any) -> tuple[Tensor, KVCache]:
        """Logits and the cache; see :meth:`reference_impl.qwen2.model.Qwen2.forward`."""
        return self.model(ids, **options)

    def cached(self, cache: KVCache) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, G, S, D] of each block."""
        return list(cache.layers)

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        """Prompts and what follows; see :func:`reference_impl.qwen2.generation.generate`."""
        return generate(self.model, ids, **options)


class CausalLM:
    """Opens directories; every rank of the group calls it."""

    model_class: type[Qwen2] = Qwen2

    def causal_lm(
        self, directory: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> LoadedLM:
        """The model of a directory; see :func:`reference_impl.qwen2.loading.load_model`."""
        model = load_model(
            directory,
            ranks=current_ranks(),
            dtype=dtype,
            device=device,
            model_class=self.model_class,
        )
        return LoadedLM(model)
