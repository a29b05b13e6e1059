"""Qwen2 by transformers itself: its loader, its model, its caches, its generation.

On several ranks by its own tensor parallelism, ``tp_plan="auto"``, which runs under gloo on CPUs where
accelerate is installed.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache


def ranks() -> int:
    """The number of ranks of the group that exists."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Seen:
    """A cache of transformers with the mask of all its tokens."""

    cache: DynamicCache
    valid: Tensor


class TransformersLM:
    """A model of ``AutoModelForCausalLM``.

    Glue: the caller's cache is copied before it is gone on from, and position ids count the real
    tokens, as ``generate`` has it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def forward(
        self,
        ids: Tensor,
        *,
        cache: Seen | None = None,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Seen]:
        """Logits and the cache, as in the contract."""
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        whole = valid if cache is None else torch.cat([cache.valid, valid], dim=1)
        if positions is None:
            positions = (whole.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        past = DynamicCache() if cache is None else copy.deepcopy(cache.cache)
        out = self.model(
            input_ids=ids,
            attention_mask=whole.long(),
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
        )
        return out.logits, Seen(out.past_key_values, whole)

    def cached(self, cache: Seen) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer."""
        return [(layer.keys, layer.values) for layer in cache.cache.layers]

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        eos: Any = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Prompts and what follows, by ``generate``, with nothing but what the contract asks for."""
        options: dict[str, Any] = {"do_sample": do_sample, "max_new_tokens": max_new_tokens}
        if do_sample:
            options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        if eos is not None:
            options["eos_token_id"] = eos
        valid = torch.ones_like(ids) if valid is None else valid.long()
        return self.model.generate(ids, attention_mask=valid, pad_token_id=0, **options)


def decline_replicas(directory: str) -> None:
    """Decline more ranks than key/value heads, which tp_plan splits below one head."""
    heads = AutoConfig.from_pretrained(directory, local_files_only=True).num_key_value_heads
    if heads < ranks() and ranks() % heads == 0:
        problem = f"tp_plan does not replicate {heads} key/value heads on {ranks()} ranks"
        raise NotImplementedError(problem)


class TransformersQwen2:
    """Language models by ``AutoModelForCausalLM.from_pretrained``, with eager attention."""

    def causal_lm(
        self, directory: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> TransformersLM:
        """See :class:`conformance.contracts.CausalLM`."""
        options: dict[str, Any] = {
            "dtype": dtype or "auto",
            "attn_implementation": "eager",
            "local_files_only": True,
        }
        if ranks() > 1:
            if importlib.util.find_spec("accelerate") is None:
                raise NotImplementedError(
                    "several ranks: transformers needs accelerate for tp_plan"
                )
            decline_replicas(directory)
            os.environ.update(
                RANK=str(dist.get_rank()),
                LOCAL_RANK=str(dist.get_rank()),
                WORLD_SIZE=str(dist.get_world_size()),
            )
            options["tp_plan"] = "auto"
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # that tp_plan is to be given in another way from 5.18 on
            model = AutoModelForCausalLM.from_pretrained(directory, **options)
        return TransformersLM(model.to(device) if ranks() == 1 else model)
