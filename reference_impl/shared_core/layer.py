"""One projection of all experts: a shared core between low-rank wrappers, and the same folded.

Axes are E experts, O d_out, D d_in, R rank, S twice the rank. Source: the form of
LawrenceRLiu/MoE_Factorize_Compress; the fold is linear algebra (see :meth:`SharedCoreLayer.fold`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FACTORS = ("core", "u_in", "v_in", "u_out", "v_out")
"""The names of the factors of a projection, in the order in which they are given."""


class LowRankWrapper(nn.Module):
    """The square matrices I + U_e V_eᵀ of all experts, which are never formed to be applied."""

    def __init__(self, u_EWR: Tensor, v_EWR: Tensor) -> None:
        super().__init__()
        self.u = nn.Parameter(u_EWR.detach().clone())
        self.v = nn.Parameter(v_EWR.detach().clone())

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Rows x [..., width] through the matrix of one expert: x + (x V) Uᵀ."""
        return x + (x @ self.v[expert]) @ self.u[expert].mT

    def as_matrix(self, expert: int) -> Tensor:
        """I + U Vᵀ [width, width], in float32 at least: 16 bits would drop small U Vᵀ beside I."""
        wide = torch.promote_types(self.u.dtype, torch.float32)
        u_WR, v_WR = self.u[expert].to(wide), self.v[expert].to(wide)
        return torch.eye(len(u_WR), dtype=wide, device=u_WR.device) + u_WR @ v_WR.mT


class SharedCoreLayer(nn.Module):
    """See :class:`conformance.contracts.SharedCoreLayer`.

    The core is one Parameter and is passed to every expert, so that ``.to`` cannot make copies of it.
    """

    def __init__(
        self,
        core: Tensor,
        u_in: Tensor,
        v_in: Tensor,
        u_out: Tensor,
        v_out: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_factors(core, u_in, v_in, u_out, v_out, bias)
        self.core = nn.Parameter(core.detach().clone())
        self.input_wrapper = LowRankWrapper(u_in, v_in)
        self.output_wrapper = LowRankWrapper(u_out, v_out)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def num_experts(self) -> int:
        """How many experts share the core."""
        return len(self.input_wrapper.u)

    @property
    def rank(self) -> int:
        """The rank of a wrapper."""
        return self.input_wrapper.u.shape[-1]

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Rows x [..., d_in] through one expert, [..., d_out]."""
        self.check_expert(expert)
        y = self.output_wrapper(F.linear(self.input_wrapper(x, expert), self.core), expert)
        return y if self.bias is None else y + self.bias[expert]

    def reconstruct(self, expert: int) -> Tensor:
        """The weight [d_out, d_in] of one expert, in the dtype of the core."""
        self.check_expert(expert)
        outer, inner = self.output_wrapper.as_matrix(expert), self.input_wrapper.as_matrix(expert)
        return (outer @ self.core.to(outer.dtype) @ inner).to(self.core.dtype)

    def fold(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_e = C + A_e B_e exactly: A = [C U_in | U_out], B = [V_inᵀ ; V_outᵀ C (I + U_in V_inᵀ)].

        Expanding the product shows it: C + C U_in V_inᵀ + U_out V_outᵀ C (I + U_in V_inᵀ). So C x is
        computed once a token, whatever the number of its experts.
        """
        wide = torch.promote_types(self.core.dtype, torch.float32)
        core, u_in, v_in, u_out, v_out = (x.to(wide) for x in self.factors().values())
        a_EOS = torch.cat([core @ u_in, u_out], dim=-1)
        vc_ERD = v_out.mT @ core
        b_ESD = torch.cat([v_in.mT, vc_ERD + (vc_ERD @ u_in) @ v_in.mT], dim=1)
        return tuple(x.to(self.core.dtype) for x in (core, a_EOS, b_ESD))

    def factors(self) -> dict[str, Tensor]:
        """The factors themselves, by the names of ``FACTORS``."""
        wrappers = (self.input_wrapper, self.output_wrapper)
        return dict(zip(FACTORS, (self.core, *(x for w in wrappers for x in (w.u, w.v)))))

    def count_parameters(self) -> dict[str, Any]:
        """See :meth:`conformance.contracts.SharedCoreLayer.count_parameters`."""
        d_out, d_in = self.core.shape
        biases = d_out if self.bias is not None else 0
        of_an_expert = 2 * self.rank * (d_in + d_out) + biases
        total = d_in * d_out + self.num_experts * of_an_expert
        original = self.num_experts * (d_in * d_out + biases)
        return {
            "core": d_in * d_out,
            "wrapper_params_per_expert": of_an_expert,
            "total_wrapper": self.num_experts * of_an_expert,
            "total": total,
            "original": original,
            "compression_ratio": total / original,
            "reduction_percentage": 100 * (1 - total / original),
        }

    def check_expert(self, expert: int) -> None:
        """Raise IndexError for an expert that there is not; -1 is none, either."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} of {self.num_experts}")


class SharedCore:
    """The contract ``shared_core``."""

    layer_type = SharedCoreLayer

    def shared_core(
        self,
        core: Tensor,
        u_in: Tensor,
        v_in: Tensor,
        u_out: Tensor,
        v_out: Tensor,
        *,
        bias: Tensor | None = None,
    ) -> SharedCoreLayer:
        """See :class:`conformance.contracts.SharedCore`."""
        return self.layer_type(core, u_in, v_in, u_out, v_out, bias)


def check_factors(
    core: Tensor,
    u_in: Tensor,
    v_in: Tensor,
    u_out: Tensor,
    v_out: Tensor,
    bias: Tensor | None = None,
) -> None:
    """Raise ValueError, naming the factor, for shapes that do not belong together."""
    if core.ndim != 2 or u_in.ndim != 3:
        found = f"{list(core.shape)} and {list(u_in.shape)}"
        raise ValueError(f"core and u_in have shapes {found}, expected 2 and 3 axes")
    d_out, d_in = core.shape
    experts, _, rank = u_in.shape
    if not experts or not rank:
        raise ValueError(f"u_in has shape {list(u_in.shape)}: there is no expert, or no rank")
    expected = {
        "u_in": (u_in, (experts, d_in, rank)),
        "v_in": (v_in, (experts, d_in, rank)),
        "u_out": (u_out, (experts, d_out, rank)),
        "v_out": (v_out, (experts, d_out, rank)),
    }
    if bias is not None:
        expected["bias"] = (bias, (experts, d_out))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
