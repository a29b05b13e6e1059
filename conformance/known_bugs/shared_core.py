"""Documented bugs of the contract ``shared_core``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from conformance.known_bugs import known_bug
from reference_impl.shared_core.layer import LowRankWrapper, SharedCore, SharedCoreLayer

# Folds


class _FoldsIntoItself(SharedCoreLayer):
    """Keeps the folded base where the core was, so that the second fold begins from the first."""

    def fold(self):
        base, a, b = super().fold()
        self.merged = getattr(self, "merged", torch.zeros_like(b)) + b.detach()
        return base, a, self.merged


@known_bug(
    "comp-merge-not-idempotent",
    contract="shared_core",
    breaks="shared_core.fold.twice",
)
class FoldsTwice(SharedCore):
    """Folding again adds the low-rank part once more."""

    layer_type = _FoldsIntoItself


class _FoldsNothing(SharedCoreLayer):
    def fold(self):
        base, a, b = super().fold()
        matched = [name for name in self.state_dict() if name.startswith("module.input_wrapper")]
        return base, a if matched else torch.zeros_like(a), b


@known_bug(
    "comp-merge-not-idempotent.no-match",
    contract="shared_core",
    breaks="shared_core.fold.values",
)
class FoldsNothing(SharedCore):
    """No name matches those that the fold looks for, and what is folded is the core alone."""

    layer_type = _FoldsNothing


class _FoldsInItsDtype(SharedCoreLayer):
    def fold(self):
        base, a, b = super().fold()
        update = torch.stack([self.reconstruct(e) for e in range(self.num_experts)]) - self.core
        u, s, vh = torch.linalg.svd(update.float(), full_matrices=False)
        size = a.shape[-1]
        return base, (u[..., :size] * s[:, None, :size]).to(a), vh[:, :size].to(b)


@known_bug(
    "comp-merge-into-quantised-base",
    contract="shared_core",
    breaks="shared_core.precision.small-updates-of-folds",
)
class FoldsRoundedWeights(SharedCore):
    """The low-rank part is what is left of an update that was first merged into a 16-bit core."""

    layer_type = _FoldsInItsDtype


class _RankBeforeExpert(SharedCoreLayer):
    def fold(self):
        base, a_EOS, b = super().fold()
        experts, d_out, size = a_EOS.shape
        packed = a_EOS.permute(1, 2, 0).reshape(d_out, size * experts)
        return base, packed.view(d_out, experts, size).transpose(0, 1), b


@known_bug(
    "comp-lora-expert-axis-packing",
    contract="shared_core",
    breaks="shared_core.fold.axes",
)
class RankBeforeExpert(SharedCore):
    """A is packed with the expert as the fastest axis, and unpacked with the rank as the fastest."""

    layer_type = _RankBeforeExpert


# Counts


class _PackedCount(SharedCoreLayer):
    def count_parameters(self):
        found = super().count_parameters()
        half = self.core.element_size() < 4
        core = self.core.numel() // (2 if half else 1)
        total = core + found["total_wrapper"]
        ratio = total / found["original"]
        return {
            **found,
            "core": core,
            "total": total,
            "compression_ratio": ratio,
            "reduction_percentage": 100 * (1 - ratio),
        }


@known_bug(
    "comp-param-count-packed-or-active",
    contract="shared_core",
    breaks="shared_core.count.core-and-wrappers",
)
class CountsWords(SharedCore):
    """Counts words of four bytes and not parameters: a core in 16 bits has half as many."""

    layer_type = _PackedCount


class _CountedFromState(SharedCoreLayer):
    def count_parameters(self):
        found = super().count_parameters()
        total = self.num_experts * (found["core"] + found["wrapper_params_per_expert"])
        return {**found, "total": total, "compression_ratio": total / found["original"]}


@known_bug(
    "core-counted-per-expert",
    contract="shared_core",
    breaks="shared_core.count.total",
)
class CoreCountedPerExpert(SharedCore):
    """The core is counted for every expert that holds it."""

    layer_type = _CountedFromState


class _HalfOfTheWrappers(SharedCoreLayer):
    def count_parameters(self):
        found = super().count_parameters()
        d_out, d_in = self.core.shape
        return {**found, "wrapper_params_per_expert": self.rank * (d_in + d_out)}


@known_bug(
    "core-counted-per-expert.half-wrappers",
    contract="shared_core",
    breaks="shared_core.count.core-and-wrappers",
)
class OneFactorCounted(SharedCore):
    """Wrappers are counted as rank · (d_in + d_out): one factor of the two."""

    layer_type = _HalfOfTheWrappers


# The identity, and the two sides


class _InItsDtype(LowRankWrapper):
    def as_matrix(self, expert):
        u, v = self.u[expert], self.v[expert]
        return torch.eye(len(u), dtype=u.dtype, device=u.device) + u @ v.mT


class _ReconstructsInItsDtype(SharedCoreLayer):
    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        self.input_wrapper = _InItsDtype(u_in, v_in)
        self.output_wrapper = _InItsDtype(u_out, v_out)


@known_bug(
    "comp-residual-identity-low-precision",
    contract="shared_core",
    breaks="shared_core.precision.small-updates-of-weights",
)
class IdentityInLowPrecision(SharedCore):
    """I + U Vᵀ is formed in the dtype of the factors, where small updates vanish beside 1."""

    layer_type = _ReconstructsInItsDtype


class _NoIdentityOfInput(SharedCoreLayer):
    def reconstruct(self, expert):
        wrapper = self.input_wrapper
        inner = wrapper.u[expert] @ wrapper.v[expert].mT
        return self.output_wrapper.as_matrix(expert).to(self.core) @ self.core @ inner


@known_bug(
    "comp-residual-identity-low-precision.dropped-in-weights",
    contract="shared_core",
    breaks="shared_core.reconstruct.values",
)
class NoIdentityInWeights(SharedCore):
    """The weight leaves the identity of the input wrapper out, which the forward pass has."""

    layer_type = _NoIdentityOfInput


class _NoIdentityOfOutput(SharedCoreLayer):
    def forward(self, x, expert):
        self.check_expert(expert)
        y, wrapper = F.linear(self.input_wrapper(x, expert), self.core), self.output_wrapper
        y = (y @ wrapper.v[expert]) @ wrapper.u[expert].mT
        return y if self.bias is None else y + self.bias[expert]


@known_bug(
    "comp-residual-identity-low-precision.dropped-in-forward",
    contract="shared_core",
    breaks="shared_core.forward.values",
)
class NoIdentityInForward(SharedCore):
    """The forward pass leaves the identity of the output wrapper out."""

    layer_type = _NoIdentityOfOutput


class _FactorsSwapped(LowRankWrapper):
    def forward(self, x, expert):
        return x + (x @ self.u[expert]) @ self.v[expert].mT


class _SwappedInForward(SharedCoreLayer):
    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        self.input_wrapper = _FactorsSwapped(u_in, v_in)
        self.output_wrapper = _FactorsSwapped(u_out, v_out)


@known_bug(
    "comp-residual-identity-low-precision.factors-swapped",
    contract="shared_core",
    breaks="shared_core.forward.values",
)
class FactorsSwapped(SharedCore):
    """The forward pass has V Uᵀ where the weight has U Vᵀ; shapes agree."""

    layer_type = _SwappedInForward


class _TransposedInWeights(SharedCoreLayer):
    def reconstruct(self, expert):
        self.check_expert(expert)
        outer, inner = self.output_wrapper.as_matrix(expert), self.input_wrapper.as_matrix(expert)
        return (outer.mT @ self.core.to(outer.dtype) @ inner.mT).to(self.core.dtype)


@known_bug(
    "comp-residual-identity-low-precision.transposed-in-weights",
    contract="shared_core",
    breaks="shared_core.reconstruct.values",
)
class TransposedInWeights(SharedCore):
    """The weight has V Uᵀ where the forward pass has U Vᵀ."""

    layer_type = _TransposedInWeights


class _Exchanged(SharedCoreLayer):
    """Exchanges the wrappers where shapes let it."""

    def forward(self, x, expert):
        d_out, d_in = self.core.shape
        if d_in != d_out:
            return super().forward(x, expert)
        self.check_expert(expert)
        y = self.input_wrapper(F.linear(self.output_wrapper(x, expert), self.core), expert)
        return y if self.bias is None else y + self.bias[expert]


@known_bug(
    "comp-residual-identity-low-precision.exchanged",
    contract="shared_core",
    breaks="shared_core.forward.square",
)
class WrappersExchanged(SharedCore):
    """The input's wrapper is behind the core and the output's before it, where shapes allow it."""

    layer_type = _Exchanged


# One core


class _CoreInBuffers(SharedCoreLayer):
    """Every expert has the core as a buffer of its own, which is the Parameter until it is moved."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        self.experts = nn.ModuleList(nn.Module() for _ in range(self.num_experts))
        for expert in self.experts:
            expert.register_buffer("core", self.core)

    def forward(self, x, expert):
        self.check_expert(expert)
        core = self.experts[expert].core
        y = self.output_wrapper(F.linear(self.input_wrapper(x, expert), core), expert)
        return y if self.bias is None else y + self.bias[expert]


@known_bug(
    "core-shared-as-buffer",
    contract="shared_core",
    breaks="shared_core.core.stored-once-after-to",
)
class CoreInBuffers(SharedCore):
    """The core is a buffer of every expert, and ``.to`` makes each of these a tensor of its own."""

    layer_type = _CoreInBuffers


class _CoreInHiddenBuffers(_CoreInBuffers):
    """The same, with buffers that are left out of the state."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        for expert in self.experts:
            expert.register_buffer("core", self.core, persistent=False)


@known_bug(
    "core-shared-as-buffer.not-in-state",
    contract="shared_core",
    breaks="shared_core.core.edit-after-to",
)
class CoreInHiddenBuffers(SharedCore):
    """As buffers that the state leaves out: after ``.to``, experts no longer follow the Parameter."""

    layer_type = _CoreInHiddenBuffers


class _CorePerExpert(SharedCoreLayer):
    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        copies = [core.detach().clone() for _ in range(self.num_experts - 1)]
        self.cores = nn.ParameterList([self.core, *map(nn.Parameter, copies)])

    def forward(self, x, expert):
        self.check_expert(expert)
        y = F.linear(self.input_wrapper(x, expert), self.cores[expert])
        y = self.output_wrapper(y, expert)
        return y if self.bias is None else y + self.bias[expert]


@known_bug(
    "core-shared-as-buffer.copies",
    contract="shared_core",
    breaks="shared_core.core.edit-reaches-every-expert",
)
class CorePerExpert(SharedCore):
    """Every expert has a copy of the core, which is trained apart from the others."""

    layer_type = _CorePerExpert
