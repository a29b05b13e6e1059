"""transformers' experts: Qwen3-MoE's by each of three implementations, and Llama 4's.

What these experts do not have (interleaved weights, for one) is not offered; nothing is repaired on
its way in or out.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import Llama4TextConfig, Qwen3MoeConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
"""Names of activations as configurations have them."""


def with_tensors(module: nn.Module, **tensors: Tensor) -> nn.Module:
    """The module with these tensors for its parameters: gradients reach what was given."""
    for name, tensor in tensors.items():
        delattr(module, name)
        setattr(module, name, tensor)
    return module


class _TransformersExperts:
    """``Qwen3MoeExperts`` by one ``experts_implementation``.

    Native: everything that is computed. Glue: options become a configuration; where a slot has no
    expert, the module is marked as one of an expert-parallel model, as transformers marks it.
    """

    kind: ClassVar[str]
    """The name of the implementation."""

    def run(
        self,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        activation: str,
        transposed: bool = False,
    ) -> Tensor:
        """The output [tokens, hidden]."""
        number = len(down_proj)
        config = Qwen3MoeConfig(
            num_experts=number,
            hidden_size=down_proj.shape[2 if transposed else 1],
            moe_intermediate_size=down_proj.shape[1 if transposed else 2],
            hidden_act=ACTIVATIONS[activation],
        )
        config._experts_implementation = self.kind
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        with_tensors(module, gate_up_proj=gate_up_proj, down_proj=down_proj)
        module.is_transposed = transposed
        if bool((indices == number).any()):
            if not hasattr(module, "_is_expert_parallel"):
                raise NotImplementedError("this transformers has no slots without an expert")
            module._is_expert_parallel = True
        return module(hidden, indices, weights)


class TransformersEagerExperts(_TransformersExperts):
    """One expert after another."""

    kind = "eager"

    def experts(
        self,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        activation: str = "silu",
    ) -> Tensor:
        """See :class:`conformance.contracts.Experts`."""
        return self.run(hidden, indices, weights, gate_up_proj, down_proj, activation)


class TransformersBatchedExperts(_TransformersExperts):
    """A copy of its expert's weights for each slot, in one batched product."""

    kind = "batched_mm"

    def experts(
        self,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        transposed: bool = False,
        activation: str = "silu",
    ) -> Tensor:
        """See :class:`conformance.contracts.Experts`."""
        given = (hidden, indices, weights, gate_up_proj, down_proj)
        return self.run(*given, activation, transposed)


class TransformersGroupedExperts(TransformersBatchedExperts):
    """Slots sorted by expert, in grouped products."""

    kind = "grouped_mm"


class TransformersLlama4Experts:
    """``Llama4TextExperts``: every expert on every token, with weights on the input.

    Native: the experts. Glue: what ``Llama4TextMoe`` does around them, which holds a token's weights
    by expert: one slot of an expert at most, and zeros for all others.
    """

    def experts(
        self,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        transposed: bool = False,
        activation: str = "silu",
        weight_on_input: bool = False,
    ) -> Tensor:
        """See :class:`conformance.contracts.Experts`."""
        if not (transposed and weight_on_input):
            raise NotImplementedError("Llama 4 has transposed weights, and weights on the input")
        number, intermediate, width = down_proj.shape
        ordered = indices.sort(-1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()) or bool((indices == number).any()):
            raise NotImplementedError("Llama 4 has an expert once for a token, and no sentinels")
        config = Llama4TextConfig(
            num_local_experts=number,
            hidden_size=width,
            intermediate_size=intermediate,
            hidden_act=ACTIVATIONS[activation],
        )
        with torch.device("meta"):
            module = Llama4TextExperts(config)
        with_tensors(module, gate_up_proj=gate_up_proj, down_proj=down_proj)
        scores = weights.new_zeros(len(hidden), number).scatter(1, indices, weights)
        routed_in = hidden.repeat(number, 1) * scores.transpose(0, 1).reshape(-1, 1)
        routed_out = module(routed_in.to(hidden.dtype))
        return routed_out.reshape(number, -1, width).sum(dim=0)
