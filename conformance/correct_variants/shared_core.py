"""Other right ways to offer the contract ``shared_core``."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from conformance.correct_variants import correct_variant
from reference_impl.shared_core.layer import SharedCore, SharedCoreLayer


class _Folded(SharedCoreLayer):
    """Rows go through the folded factors, and weights are base + A B."""

    def forward(self, x, expert):
        self.check_expert(expert)
        base, a, b = self.fold()
        y = F.linear(x, base) + (x @ b[expert].mT) @ a[expert].mT
        return y if self.bias is None else y + self.bias[expert]

    def reconstruct(self, expert):
        self.check_expert(expert)
        wide = torch.promote_types(self.core.dtype, torch.float32)
        core, u_in, v_in, u_out, v_out = (x.to(wide) for x in self.factors().values())
        inner = core + core @ u_in[expert] @ v_in[expert].mT
        return (inner + u_out[expert] @ (v_out[expert].mT @ inner)).to(self.core.dtype)


@correct_variant("core-folded", contract="shared_core")
class Folded(SharedCore):
    """Rows go through the fold; weights are made of sums, and no identity is formed."""

    layer_type = _Folded


class _Dense(SharedCoreLayer):
    """Rows go through the dense weight of their expert."""

    def forward(self, x, expert):
        return F.linear(
            x, self.reconstruct(expert), None if self.bias is None else self.bias[expert]
        )


@correct_variant("core-dense", contract="shared_core")
class Dense(SharedCore):
    """Each call makes the dense weight, rounds it to the dtype of the core, and applies it."""

    layer_type = _Dense


class _InFloat32(SharedCoreLayer):
    """Computes in float32 whatever the dtype is, and rounds once."""

    def forward(self, x, expert):
        self.check_expert(expert)
        wide = torch.promote_types(x.dtype, torch.float32)
        core, u_in, v_in, u_out, v_out = (t.to(wide) for t in self.factors().values())
        y = x.to(wide)
        y = torch.addmm(
            y.reshape(-1, y.shape[-1]), y.reshape(-1, y.shape[-1]) @ v_in[expert], u_in[expert].T
        )
        y = y @ core.T
        y = torch.addmm(y, y @ v_out[expert], u_out[expert].T)
        y = y if self.bias is None else y + self.bias[expert].to(wide)
        return y.view(*x.shape[:-1], -1 if x.numel() else y.shape[-1]).to(x.dtype)


@correct_variant("core-in-float32", contract="shared_core")
class InFloat32(SharedCore):
    """Computes in float32 and rounds once, with fused multiply-adds of matrices."""

    layer_type = _InFloat32


class _Expert(nn.Module):
    """The wrappers of one expert, as modules of their own with other layouts."""

    def __init__(self, u_in, v_in, u_out, v_out, bias):
        super().__init__()
        self.u_in, self.u_out = nn.Parameter(u_in), nn.Parameter(u_out)
        self.v_in, self.v_out = (
            nn.Parameter(v_in.mT.contiguous()),
            nn.Parameter(v_out.mT.contiguous()),
        )
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x, core):
        x = x + F.linear(F.linear(x, self.v_in), self.u_in)
        y = F.linear(x, core)
        y = y + F.linear(F.linear(y, self.v_out), self.u_out)
        return y if self.bias is None else y + self.bias


class _Modules(nn.Module):
    """A list of experts; the core is passed to each."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__()
        SharedCoreLayer(core, u_in, v_in, u_out, v_out, bias)  # refuses what does not fit
        self.core = nn.Parameter(core.clone())
        biases = [None] * len(u_in) if bias is None else list(bias.clone())
        parts = zip(*(list(t.clone()) for t in (u_in, v_in, u_out, v_out)), biases)
        self.experts = nn.ModuleList(_Expert(*part) for part in parts)

    def expert(self, number):
        if number < 0:
            raise IndexError(number)
        return self.experts[number]

    def forward(self, x, expert):
        return self.expert(expert)(x, self.core)

    def reconstruct(self, expert):
        chosen, wide = self.expert(expert), torch.promote_types(self.core.dtype, torch.float32)
        parts = (chosen.u_in, chosen.v_in, chosen.u_out, chosen.v_out)
        u_in, v_in, u_out, v_out = (t.to(wide) for t in parts)
        inner = torch.eye(len(u_in), dtype=wide).addmm(u_in, v_in)
        outer = torch.eye(len(u_out), dtype=wide).addmm(u_out, v_out)
        return torch.linalg.multi_dot([outer, self.core.to(wide), inner]).to(self.core.dtype)


@correct_variant("core-modules", contract="shared_core")
class Modules(SharedCore):
    """A module an expert, V transposed; neither folds nor counts."""

    layer_type = _Modules


class _OneBuffer(SharedCoreLayer):
    """Counts with numpy; folds by expert, with another order of the columns."""

    def fold(self):
        base, a, b = super().fold()
        order = list(range(self.rank, 2 * self.rank)) + list(range(self.rank))
        return [base, -a[..., order], -b[:, order]]

    def count_parameters(self):
        found = super().count_parameters()
        ratio = np.float64(found["total"]) / np.float64(found["original"])
        integers = {name: np.int64(found[name]) for name in found if isinstance(found[name], int)}
        more = {
            "compression_ratio": ratio,
            "reduction_percentage": (1 - ratio) * 100,
            "rank": self.rank,
        }
        return MappingProxyType(integers | more)


@correct_variant("core-other-fold", contract="shared_core")
class OtherFold(SharedCore):
    """Folds to other factors of the same product, in a list; counts are numpy's numbers."""

    layer_type = _OneBuffer


class _SumOfTerms(SharedCoreLayer):
    """Multiplies out into four terms, and adds them."""

    def forward(self, x, expert):
        self.check_expert(expert)
        c, u_in, v_in, u_out, v_out = self.factors().values()
        u_in, v_in, u_out, v_out = (t[expert] for t in (u_in, v_in, u_out, v_out))
        plain, inner = x @ c.mT, (x @ v_in) @ (c @ u_in).mT
        y = plain + inner + ((plain @ v_out) + (inner @ v_out)) @ u_out.mT
        return y if self.bias is None else self.bias[expert] + y


@correct_variant("core-sum-of-terms", contract="shared_core")
class SumOfTerms(SharedCore):
    """The product is multiplied out, and its terms are added."""

    layer_type = _SumOfTerms


class _OneStack(nn.Module):
    """U and V of a side in one Parameter, experts the last axis."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__()
        SharedCoreLayer(core, u_in, v_in, u_out, v_out, bias)  # refuses what does not fit
        self.core = nn.Parameter(core.clone())
        self.inner = nn.Parameter(torch.stack([u_in, v_in]).movedim(1, -1).contiguous())
        self.outer = nn.Parameter(torch.stack([u_out, v_out]).movedim(1, -1).contiguous())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone()))

    def layer(self):
        sides = (side.movedim(-1, 1).unbind(0) for side in (self.inner, self.outer))
        (u_in, v_in), (u_out, v_out) = sides
        return u_in, v_in, u_out, v_out

    def check(self, expert):
        if expert not in range(self.inner.shape[-1]):
            raise ValueError(f"there is no expert {expert}")

    def forward(self, x, expert):
        self.check(expert)
        u_in, v_in, u_out, v_out = (t[expert] for t in self.layer())
        y = (x + x @ v_in @ u_in.mT) @ self.core.mT
        y = y + y @ v_out @ u_out.mT
        return y if self.bias is None else y + self.bias[expert]

    def reconstruct(self, expert):
        self.check(expert)
        u_in, v_in, u_out, v_out = (t[expert].double() for t in self.layer())
        inner = torch.eye(len(u_in), dtype=torch.float64) + u_in @ v_in.mT
        outer = torch.eye(len(u_out), dtype=torch.float64) + u_out @ v_out.mT
        return (outer @ (self.core.double() @ inner)).to(self.core.dtype)

    def fold(self):
        u_in, v_in, u_out, v_out = (t.double() for t in self.layer())
        core = self.core.double()
        a = torch.cat([core @ u_in, u_out], -1)
        b = torch.cat([v_in.mT, v_out.mT @ (core + core @ u_in @ v_in.mT)], 1)
        return tuple(t.to(self.core.dtype) for t in (core, a, b))


@correct_variant("core-one-stack", contract="shared_core")
class OneStack(SharedCore):
    """Two Parameters for all wrappers, experts on their last axis; weights in float64."""

    layer_type = _OneStack
