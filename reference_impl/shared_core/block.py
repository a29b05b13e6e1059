"""A mixture-of-experts block whose three projections are shared-core layers, as written and folded.

Axes are T tokens, K slots of a token, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference_impl.moe.routing import MoERouter
from reference_impl.shared_core.layer import FACTORS, SharedCoreLayer

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class CompressedMoEBlock(nn.Module):
    """Takes the place of a block of a transformers model, and returns what that block returns.

    The router's weight and the three layers are its parameters; ``return_logits`` is for blocks that
    return (output, logits), as those of earlier transformers.
    """

    def __init__(
        self,
        router: Tensor,
        layers: Mapping[str, SharedCoreLayer],
        *,
        top_k: int,
        normalize: bool,
        return_logits: bool = False,
    ) -> None:
        super().__init__()
        self.router = nn.Parameter(router.detach().clone())
        self.layers = nn.ModuleDict({name: layers[name] for name in PROJECTIONS})
        self.top_k = top_k
        self.normalize = normalize
        self.return_logits = return_logits
        check_block(self.router, self.layers, top_k)

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """hidden [batch, tokens, hidden] to the same shape, or to (that, logits [T, experts])."""
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        logits_TE = F.linear(x_TH, self.router)
        weights_TK, indices_TK = self.route(logits_TE)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        out_TH = self.mixture(x_TH, weights_TK.to(wide), indices_TK).to(hidden.dtype)
        out = out_TH.view_as(hidden)
        return (out, logits_TE) if self.return_logits else out

    def route(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts [T, K]."""
        return MoERouter().moe_router(logits_TE, top_k=self.top_k, normalize=self.normalize)

    def mixture(self, x_TH: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """The weighted sum of each token's experts, in the dtype of the weights."""
        out_TH = weights_TK.new_zeros(x_TH.shape)
        for expert in indices_TK.unique().tolist():
            tokens, slots = (indices_TK == expert).nonzero(as_tuple=True)
            rows = self.expert(x_TH[tokens], expert).to(out_TH.dtype)
            out_TH = out_TH.index_add(0, tokens, rows * weights_TK[tokens, slots, None])
        return out_TH

    def expert(self, x: Tensor, expert: int) -> Tensor:
        """Rows through one expert: down(silu(gate x) ⊙ up x)."""
        gate, up, down = (self.layers[name] for name in PROJECTIONS)
        return down(F.silu(gate(x, expert)) * up(x, expert), expert)


class FoldedMoEBlock(CompressedMoEBlock):
    """The same function with each core applied once a token instead of once a pair.

    With W_e = C + A_e B_e the cores of gate and up need the token alone, and that of down the weighted
    sum of a token's activations. Folded at each call, so that the factors stay trainable.
    """

    def mixture(self, x_TH: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """See :meth:`CompressedMoEBlock.mixture`."""
        (gate, a_gate, b_gate), (up, a_up, b_up), (down, a_down, b_down) = (
            self.layers[name].fold() for name in PROJECTIONS
        )
        gate_TI, up_TI = F.linear(x_TH, gate), F.linear(x_TH, up)
        sum_TI = weights_TK.new_zeros(gate_TI.shape)
        out_TH = weights_TK.new_zeros(x_TH.shape)
        for expert in indices_TK.unique().tolist():
            tokens, slots = (indices_TK == expert).nonzero(as_tuple=True)
            x, weights = x_TH[tokens], weights_TK[tokens, slots, None]
            gated = F.silu(gate_TI[tokens] + low_rank(x, a_gate[expert], b_gate[expert]))
            h = gated * (up_TI[tokens] + low_rank(x, a_up[expert], b_up[expert]))
            sum_TI = sum_TI.index_add(0, tokens, h * weights)
            rows = low_rank(h, a_down[expert], b_down[expert]) * weights
            out_TH = out_TH.index_add(0, tokens, rows)
        return out_TH + F.linear(sum_TI.to(down.dtype), down)


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows x through A B, without forming it."""
    return (x @ b.mT) @ a.mT


class SharedCoreBlock:
    """The contract ``shared_core_block``."""

    block_type = CompressedMoEBlock
    layer_type = SharedCoreLayer

    def shared_core_block(
        self,
        router: Tensor,
        gate_proj: Mapping[str, Tensor],
        up_proj: Mapping[str, Tensor],
        down_proj: Mapping[str, Tensor],
        *,
        top_k: int,
        normalize: bool = False,
        return_logits: bool = False,
    ) -> CompressedMoEBlock:
        """See :class:`conformance.contracts.SharedCoreBlock`."""
        given = dict(zip(PROJECTIONS, (gate_proj, up_proj, down_proj)))
        layers = {name: self.layer(name, factors) for name, factors in given.items()}
        return self.block_type(
            router, layers, top_k=top_k, normalize=normalize, return_logits=return_logits
        )

    def layer(self, projection: str, factors: Mapping[str, Tensor]) -> SharedCoreLayer:
        """The layer of a projection; ValueError naming what is missing, unknown or mis-shaped."""
        wrong = set(factors) ^ set(FACTORS)
        if wrong:
            names = ", ".join(sorted(wrong))
            raise ValueError(f"{projection}: {names} missing or unknown; expected {FACTORS}")
        try:
            return self.layer_type(*(factors[name] for name in FACTORS))
        except ValueError as error:
            raise ValueError(f"{projection}: {error}") from error


def check_block(router: Tensor, layers: Mapping[str, SharedCoreLayer], top_k: int) -> None:
    """Raise ValueError for projections that do not fit each other, the router or ``top_k``."""
    experts, hidden = router.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to {experts}")
    intermediate = len(layers["gate_proj"].core)
    shapes = {name: (intermediate, hidden) for name in PROJECTIONS}
    shapes["down_proj"] = (hidden, intermediate)
    for name, layer in layers.items():
        if layer.core.shape != shapes[name]:
            found = list(layer.core.shape)
            raise ValueError(f"{name}: the core has shape {found}, expected {list(shapes[name])}")
        if layer.num_experts != experts:
            found = f"{layer.num_experts} experts, the router has {experts}"
            raise ValueError(f"{name}: {found}")
