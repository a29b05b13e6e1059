"""The block: logits, routing, experts, and an expert that every token goes to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reference_impl.moe.experts import Experts
from reference_impl.moe.routing import MoERouter


class MoEBlock(MoERouter, Experts):
    """A mixture-of-experts block over the router and the experts of this package."""

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
        shared_gate: Tensor | None = None,
        return_logits: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See :class:`conformance.contracts.MoEBlock`."""
        x_TH = hidden.flatten(0, 1)
        logits_TE = F.linear(x_TH, router)
        weights, indices = self.moe_router(
            logits_TE,
            top_k=top_k,
            score=score,
            normalize=normalize,
            selection_bias=selection_bias,
            groups=groups,
            scaling_factor=scaling_factor,
        )
        out_TH = self.experts(x_TH, indices, weights.to(x_TH.dtype), gate_up_proj, down_proj)
        if shared is not None:
            out_TH = out_TH + self.shared_expert(x_TH, *shared, shared_gate)
        out = out_TH.view_as(hidden)
        return (out, logits_TE) if return_logits else out

    def shared_expert(
        self, x_TH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, shared_gate: Tensor | None
    ) -> Tensor:
        """What every token gets, [T, H]."""
        gate, up = F.linear(x_TH, gate_up_proj).chunk(2, dim=-1)
        out_TH = F.linear(F.silu(gate) * up, down_proj)
        if shared_gate is None:
            return out_TH
        return torch.sigmoid(F.linear(x_TH, shared_gate)) * out_TH
