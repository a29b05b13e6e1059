"""Routers and mixture-of-experts blocks of transformers: Qwen3-MoE, Qwen2-MoE, Mixtral, DeepSeek-V3.

Modules are made without memory and called with the caller's tensors for their parameters. Glue: a
router multiplies hidden states by its weight; given logits, it gets them for hidden states and the
identity for its weight, which is exact but for infinite logits. What a model cannot be configured to
do is not offered, or declined; nothing is repaired on its way in or out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DeepseekV3Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe

Routed = tuple[Tensor, ...]


def call_with(module_type: type, config: Any, tensors: Mapping[str, Tensor], hidden: Tensor) -> Any:
    """What a module gives with these parameters and buffers, which are all that it has."""
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module: nn.Module = module_type(config).eval()
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if own.keys() != tensors.keys():
        raise NotImplementedError(f"{module_type.__name__} has {sorted(own)}")
    return functional_call(module, dict(tensors), (hidden,), strict=True)


def identity(logits: Tensor) -> Tensor:
    """The weight of a router that gives its hidden states for logits."""
    if bool(logits.isinf().any()):
        raise NotImplementedError("logits are the product of finite numbers: -inf times 0 is NaN")
    return torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)


def sizes(router: Tensor, down_proj: Tensor, top_k: int) -> dict[str, int]:
    """The sizes of a block as configurations call them, but for the number of experts."""
    return {
        "hidden_size": router.shape[1],
        "moe_intermediate_size": down_proj.shape[-1],
        "num_experts_per_tok": top_k,
    }


def routed_weights(router: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> dict[str, Tensor]:
    """What every block has, by the names of its parameters."""
    return {
        "gate.weight": router,
        "experts.gate_up_proj": gate_up_proj,
        "experts.down_proj": down_proj,
    }


def shared_weights(
    name: str, hidden: Tensor, shared: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """The parameters of a shared expert; of width 0 where there is none."""
    width = hidden.shape[-1]
    gate_up, down = shared or (hidden.new_zeros(0, width), hidden.new_zeros(width, 0))
    gate, up = gate_up.chunk(2) if len(gate_up) else (gate_up, gate_up)
    return {
        f"{name}.gate_proj.weight": gate,
        f"{name}.up_proj.weight": up,
        f"{name}.down_proj.weight": down,
    }


class TransformersQwen3MoE:
    """``Qwen3MoeTopKRouter``, ``load_balancing_loss_func`` and ``Qwen3MoeSparseMoeBlock``."""

    def moe_router(
        self,
        logits: Tensor,
        *,
        top_k: int,
        normalize: bool = False,
        return_balancing_loss: bool = False,
    ) -> Routed:
        """See :class:`conformance.contracts.MoERouter`."""
        experts = logits.shape[-1]
        config = Qwen3MoeConfig(
            hidden_size=experts,
            num_experts=experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=normalize,
        )
        router = modeling_qwen3_moe.Qwen3MoeTopKRouter
        _, weights, indices = call_with(router, config, {"weight": identity(logits)}, logits)
        if not return_balancing_loss:
            return weights, indices
        loss = modeling_qwen3_moe.load_balancing_loss_func((logits,), experts, top_k)
        return weights, indices, loss

    def moe_block(
        self,
        hidden: Tensor,
        router: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        top_k: int,
        normalize: bool = False,
    ) -> Tensor:
        """See :class:`conformance.contracts.MoEBlock`."""
        config = Qwen3MoeConfig(
            num_experts=len(router), norm_topk_prob=normalize, **sizes(router, down_proj, top_k)
        )
        block = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock
        return call_with(block, config, routed_weights(router, gate_up_proj, down_proj), hidden)


class TransformersQwen2MoE:
    """``Qwen2MoeTopKRouter`` and ``Qwen2MoeSparseMoeBlock``, whose shared expert has a gate."""

    def moe_router(self, logits: Tensor, *, top_k: int, normalize: bool = False) -> Routed:
        """See :class:`conformance.contracts.MoERouter`."""
        experts = logits.shape[-1]
        config = Qwen2MoeConfig(
            hidden_size=experts,
            num_experts=experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=normalize,
        )
        router = modeling_qwen2_moe.Qwen2MoeTopKRouter
        return call_with(router, config, {"weight": identity(logits)}, logits)[1:]

    def moe_block(
        self,
        hidden: Tensor,
        router: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        top_k: int,
        normalize: bool = False,
        shared: tuple[Tensor, Tensor] | None = None,
        shared_gate: Tensor | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.MoEBlock`."""
        if shared is not None and shared_gate is None:
            raise NotImplementedError("the shared expert of Qwen2-MoE has a gate")
        gate = hidden.new_zeros(1, hidden.shape[-1]) if shared_gate is None else shared_gate
        tensors = routed_weights(router, gate_up_proj, down_proj)
        tensors |= shared_weights("shared_expert", hidden, shared)
        tensors["shared_expert_gate.weight"] = gate
        config = Qwen2MoeConfig(
            num_experts=len(router), norm_topk_prob=normalize, **sizes(router, down_proj, top_k)
        )
        return call_with(modeling_qwen2_moe.Qwen2MoeSparseMoeBlock, config, tensors, hidden)


class TransformersMixtral:
    """``MixtralTopKRouter``, ``load_balancing_loss_func`` and ``MixtralSparseMoeBlock``."""

    def config(self, experts: int, hidden: int, intermediate: int, top_k: int) -> MixtralConfig:
        """A configuration of these sizes."""
        return MixtralConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_local_experts=experts,
            num_experts_per_tok=top_k,
        )

    def moe_router(
        self,
        logits: Tensor,
        *,
        top_k: int,
        normalize: bool = False,
        return_balancing_loss: bool = False,
    ) -> Routed:
        """See :class:`conformance.contracts.MoERouter`."""
        if not normalize:
            raise NotImplementedError("Mixtral always normalises")
        experts = logits.shape[-1]
        config = self.config(experts, experts, 1, top_k)
        router = modeling_mixtral.MixtralTopKRouter
        _, weights, indices = call_with(router, config, {"weight": identity(logits)}, logits)
        if not return_balancing_loss:
            return weights, indices
        loss = modeling_mixtral.load_balancing_loss_func((logits,), experts, top_k)
        return weights, indices, loss

    def moe_block(
        self,
        hidden: Tensor,
        router: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        top_k: int,
        normalize: bool = False,
    ) -> Tensor:
        """See :class:`conformance.contracts.MoEBlock`."""
        if not normalize:
            raise NotImplementedError("Mixtral always normalises")
        config = self.config(len(router), hidden.shape[-1], down_proj.shape[-1], top_k)
        tensors = routed_weights(router, gate_up_proj, down_proj)
        return call_with(modeling_mixtral.MixtralSparseMoeBlock, config, tensors, hidden)


class TransformersDeepseekV3:
    """``DeepseekV3TopkRouter`` and ``DeepseekV3MoE``: sigmoid scores, a bias, groups, a factor."""

    def config(
        self,
        experts: int,
        top_k: int,
        score: str,
        normalize: bool,
        selection_bias: Tensor | None,
        groups: tuple[int, int] | None,
        scaling_factor: float,
        **sizes: int,
    ) -> DeepseekV3Config:
        """The configuration for these options, where there is one."""
        if score == "softmax":
            raise NotImplementedError("DeepSeek-V3 has sigmoid scores")
        if score != "sigmoid":
            raise ValueError(f"there is no score {score!r}")
        if groups is not None and selection_bias is None:
            raise NotImplementedError("in DeepSeek-V3 a group is always as good as its best two")
        if selection_bias is not None and selection_bias.shape != (experts,):
            raise ValueError("loading the buffer e_score_correction_bias compares shapes")
        number, kept = groups or (1, 1)
        return DeepseekV3Config(
            n_routed_experts=experts,
            num_experts_per_tok=top_k,
            n_group=number,
            topk_group=kept,
            norm_topk_prob=normalize,
            routed_scaling_factor=scaling_factor,
            **sizes,
        )

    def moe_router(
        self,
        logits: Tensor,
        *,
        top_k: int,
        score: str = "softmax",
        normalize: bool = False,
        selection_bias: Tensor | None = None,
        groups: tuple[int, int] | None = None,
        scaling_factor: float = 1.0,
    ) -> Routed:
        """See :class:`conformance.contracts.MoERouter`."""
        experts = logits.shape[-1]
        config = self.config(
            experts,
            top_k,
            score,
            normalize,
            selection_bias,
            groups,
            scaling_factor,
            hidden_size=experts,
        )
        tensors = {
            "weight": identity(logits),
            "e_score_correction_bias": correction(selection_bias, experts, logits.device),
        }
        router = modeling_deepseek_v3.DeepseekV3TopkRouter
        return call_with(router, config, tensors, logits)[1:]

    def moe_block(
        self,
        hidden: Tensor,
        router: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        top_k: int,
        score: str = "softmax",
        normalize: bool = False,
        selection_bias: Tensor | None = None,
        groups: tuple[int, int] | None = None,
        scaling_factor: float = 1.0,
        shared: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.MoEBlock`."""
        config = self.config(
            len(router),
            top_k,
            score,
            normalize,
            selection_bias,
            groups,
            scaling_factor,
            hidden_size=hidden.shape[-1],
            moe_intermediate_size=down_proj.shape[-1],
        )
        tensors = routed_weights(router, gate_up_proj, down_proj)
        bias = correction(selection_bias, len(router), router.device)
        tensors["gate.e_score_correction_bias"] = bias
        tensors |= shared_weights("shared_experts", hidden, shared)
        return call_with(modeling_deepseek_v3.DeepseekV3MoE, config, tensors, hidden)


def correction(selection_bias: Tensor | None, experts: int, device: torch.device) -> Tensor:
    """The bias as the router keeps it: float32, zeros without one."""
    return torch.zeros(experts, device=device) if selection_bias is None else selection_bias
