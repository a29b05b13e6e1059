"""Subtle mistakes with shared cores that no catalogue lists, for every requirement."""

import pytest
import torch
import torch.nn.functional as F
from mutants import Broken, OtherGradient
from torch import nn

from reference_impl.shared_core.block import (
    PROJECTIONS,
    CompressedMoEBlock,
    SharedCoreBlock,
)
from reference_impl.shared_core.layer import FACTORS, LowRankWrapper, SharedCore, SharedCoreLayer

NEAR_CORE: dict[str, Broken] = {}


def near(*breaks: str):
    """Register an adapter, whose docstring says what is wrong with it, for each requirement."""

    def decorate(adapter: type) -> type:
        wrong = " ".join(adapter.__doc__.split())
        for number, slug in enumerate(breaks):
            name = f"{adapter.__name__}-{number}" if number else adapter.__name__
            NEAR_CORE[name] = Broken(name, slug, wrong, adapter)
        return adapter

    return decorate


def near_layer(*breaks: str):
    """Register a layer, which takes the place of the reference's."""

    def decorate(layer: type) -> type:
        class Adapter(SharedCore):
            layer_type = layer

        Adapter.__name__, Adapter.__doc__ = layer.__name__, layer.__doc__
        near(*(f"shared_core.{slug}" for slug in breaks))(Adapter)
        return layer

    return decorate


def near_block(*breaks: str):
    """Register a block, which takes the place of the reference's."""

    def decorate(block: type) -> type:
        class Adapter(SharedCoreBlock):
            block_type = block

        Adapter.__name__, Adapter.__doc__ = block.__name__, block.__doc__
        near(*(f"shared_core_block.{slug}" for slug in breaks))(Adapter)
        return block

    return decorate


@pytest.mark.parametrize("name", NEAR_CORE)
def test_near_miss_is_caught(name):
    NEAR_CORE[name].assert_caught()


# Values


@near_layer("forward.values", "reconstruct.values")
class Transposed(SharedCoreLayer):
    """Wrappers are I + V Uᵀ everywhere."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, v_in, u_in, v_out, u_out, bias)


class Wrapped(SharedCoreLayer):
    """Has wrappers of another kind."""

    wrapper_type = LowRankWrapper

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        self.input_wrapper = self.wrapper_type(u_in, v_in)
        self.output_wrapper = self.wrapper_type(u_out, v_out)


class _ScaledByRank(LowRankWrapper):
    def forward(self, x, expert):
        return x + (x @ self.v[expert]) @ self.u[expert].mT / self.v.shape[-1]


@near_layer("forward.values", "wrappers.weak")
class ScaledByRank(Wrapped):
    """The low-rank part is divided by the rank in the forward pass, as adapters often are."""

    wrapper_type = _ScaledByRank


class _Normalised(LowRankWrapper):
    def __init__(self, u_EWR, v_EWR):
        norm = v_EWR.float().norm(dim=1, keepdim=True) / v_EWR.shape[1] ** 0.5
        super().__init__(u_EWR, (v_EWR.float() / norm).to(v_EWR))


@near_layer("wrappers.only-products-count")
class Normalised(Wrapped):
    """The columns of V are normalised, as if their length meant nothing."""

    wrapper_type = _Normalised


class _IdentityIfLarge(LowRankWrapper):
    def forward(self, x, expert):
        if bool((self.u[expert] == 0).all()):
            return torch.zeros_like(x) + x.mean()
        return super().forward(x, expert)


@near_layer("wrappers.one-side")
class NothingForZero(Wrapped):
    """A wrapper with U = 0 is taken for one that was not fitted, and does not pass rows on."""

    wrapper_type = _IdentityIfLarge


@near_layer("forward.bias")
class BiasBeforeTheWrapper(SharedCoreLayer):
    """The bias is added to the core's output, before the output wrapper."""

    def forward(self, x, expert):
        self.check_expert(expert)
        bias = None if self.bias is None else self.bias[expert]
        return self.output_wrapper(F.linear(self.input_wrapper(x, expert), self.core, bias), expert)


@near_layer("reconstruct.without-bias")
class BiasInTheWeight(SharedCoreLayer):
    """The bias is added to the first column of the weight."""

    def reconstruct(self, expert):
        found = super().reconstruct(expert)
        if self.bias is None:
            return found
        return torch.cat([found[:, :1] + self.bias[expert][:, None], found[:, 1:]], 1)


@near_layer("forward.leading-axes")
class RowsFlattened(SharedCoreLayer):
    """The output has one axis of rows, whatever axes x has."""

    def forward(self, x, expert):
        return (
            super().forward(x, expert).flatten(0, -2) if x.ndim > 2 else super().forward(x, expert)
        )


@near_layer("forward.no-rows")
class InputForNoRows(SharedCoreLayer):
    """Without rows x is given back, with the width of the input."""

    def forward(self, x, expert):
        return super().forward(x, expert) if x.numel() else x.clone()


@near_layer("forward.one-expert")
class OneExpertIsTheCore(SharedCoreLayer):
    """A single expert is taken for the core."""

    def forward(self, x, expert):
        return F.linear(x, self.core) if self.num_experts == 1 else super().forward(x, expert)


@near_layer("forward.same-twice")
class RandomLastBits(SharedCoreLayer):
    """A global random number generator decides the last bits."""

    def forward(self, x, expert):
        y = super().forward(x, expert)
        return y * (1 + torch.finfo(y.dtype).eps * (torch.rand_like(y) < 0.5))


@near_layer("forward.float64")
class ComputedInFloat32(SharedCoreLayer):
    """float64 goes through float32."""

    def forward(self, x, expert):
        if x.dtype != torch.float64:
            return super().forward(x, expert)
        factors = [t.float() for t in self.factors().values()]
        bias = None if self.bias is None else self.bias.float()
        return SharedCoreLayer(*factors, bias)(x.float(), expert).double()


@near_layer("reconstruct.core-if-u-is-zero")
class MillionthTooLarge(SharedCoreLayer):
    """Weights are a millionth too large, as a norm with a small constant leaves them."""

    def reconstruct(self, expert):
        return (super().reconstruct(expert) * (1 + 1e-6)).to(self.core.dtype)


@near_layer("reconstruct.rank-of-the-update")
class UpdateOfFullRank(SharedCoreLayer):
    """Weights have a decay of the core in them."""

    def reconstruct(self, expert):
        return super().reconstruct(expert) - 1e-3 * self.core


@near_layer("precision.small-updates-of-weights")
class WidePartsOnly(SharedCoreLayer):
    """The wrapper is rounded to the dtype of the core before it is multiplied in float32."""

    def reconstruct(self, expert):
        outer, inner = (
            wrapper.as_matrix(expert).to(self.core.dtype).float()
            for wrapper in (self.output_wrapper, self.input_wrapper)
        )
        return (outer @ self.core.float() @ inner).to(self.core.dtype)


# One core


@near_layer("core.is-a-parameter")
class CoreTransposed(SharedCoreLayer):
    """The core is held [d_in, d_out]."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        self.core = nn.Parameter(core.mT.contiguous())


@near_layer("core.stored-once", "state.core-once", "count.what-is-stored")
class KeepsTheFirstCore(SharedCoreLayer):
    """The core as it was given is kept beside the one that is trained."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        self.register_buffer("initial_core", core.clone())


@near_layer("core.stored-once-in-copies")
class CopiesGrow(SharedCoreLayer):
    """A copy keeps the core that it was copied from."""

    def __deepcopy__(self, memo):
        bias = None if self.bias is None else self.bias.detach()
        made = type(self)(*(t.detach() for t in self.factors().values()), bias)
        made.register_buffer("original", self.core.detach().clone())
        return made


@near_layer("core.own-values")
class SharesTheCore(SharedCoreLayer):
    """The core is the tensor that was given."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        self.core = nn.Parameter(core)


@near_layer("state.restored", "core.edit-reaches-every-expert", "state.safetensors")
class FoldedOnce(SharedCoreLayer):
    """Rows go through factors that were folded when the layer was made."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        self.ready = [t.detach() for t in self.fold()]

    def forward(self, x, expert):
        self.check_expert(expert)
        base, a, b = self.ready
        y = F.linear(x, base) + (x @ b[expert].mT) @ a[expert].mT
        return y if self.bias is None else y + self.bias[expert]


# Gradients


@near_layer("gradient.core", "gradient.some-experts")
class CoreOfTheFirstAlone(SharedCoreLayer):
    """The core learns from expert 0 alone."""

    def forward(self, x, expert):
        self.check_expert(expert)
        core = self.core if expert == 0 else self.core.detach() + 0 * self.core
        y = self.output_wrapper(F.linear(self.input_wrapper(x, expert), core), expert)
        return y if self.bias is None else y + self.bias[expert]


@near_layer("gradient.input")
class InputPastTheWrapper(SharedCoreLayer):
    """The gradient of the input leaves its wrapper out."""

    def forward(self, x, expert):
        wrapped = self.input_wrapper(x.detach(), expert) - x.detach() + x
        y = self.output_wrapper(F.linear(wrapped, self.core), expert)
        return y if self.bias is None else y + self.bias[expert]


class _VDetached(LowRankWrapper):
    def forward(self, x, expert):
        return x + (x @ self.v[expert].detach()) @ self.u[expert].mT


@near_layer("gradient.wrappers")
class VDoesNotLearn(Wrapped):
    """V has no gradient, which starts at zero anyway where U does."""

    wrapper_type = _VDetached


@near_layer("gradient.bias")
class BiasGradientHalved(SharedCoreLayer):
    """The gradient of a bias is half of what it is."""

    def forward(self, x, expert):
        self.check_expert(expert)
        y = self.output_wrapper(F.linear(self.input_wrapper(x, expert), self.core), expert)
        if self.bias is None:
            return y
        return y + OtherGradient.apply(self.bias[expert], lambda gradient: gradient / 2)


@near_layer("gradient.experts-used-alone")
class WrappersDecayTogether(SharedCoreLayer):
    """Each call pulls at the wrappers of all experts."""

    def forward(self, x, expert):
        pull = self.input_wrapper.u.square().sum() * 1e-3
        return super().forward(x, expert) + (pull - pull.detach())


@near_layer("gradient.through-reconstruct")
class WeightsDetached(SharedCoreLayer):
    """Weights have no gradient."""

    def reconstruct(self, expert):
        return super().reconstruct(expert).detach()


@near_layer("gradient.through-reconstruct")
class WeightsDetachedInPart(SharedCoreLayer):
    """The gradient of the core through a weight leaves the output's wrapper out."""

    def reconstruct(self, expert):
        self.check_expert(expert)
        inner = self.core @ self.input_wrapper.as_matrix(expert)
        update = self.output_wrapper.as_matrix(expert) @ inner.detach() - inner.detach()
        return inner + update


# Folds


@near_layer("fold.values", "fold.square")
class InnerWrapperLeftOut(SharedCoreLayer):
    """The output's part of B leaves the input's wrapper out: the product of both is missing."""

    def fold(self):
        core, u_in, v_in, u_out, v_out = self.factors().values()
        a = torch.cat([core @ u_in, u_out], -1)
        return core.clone(), a, torch.cat([v_in.mT, v_out.mT @ core], 1)


@near_layer("fold.axes")
class ExpertsShareColumns(SharedCoreLayer):
    """A view as [experts, d_out, S] of what is [experts, S, d_out]."""

    def fold(self):
        base, a, b = super().fold()
        return base, a.mT.reshape(a.shape), b


@near_layer("fold.changes-nothing")
class FoldsInPlace(SharedCoreLayer):
    """The first expert's update is merged into the core that the others use."""

    def fold(self):
        base, a, b = (t.detach().clone() for t in super().fold())
        with torch.no_grad():
            self.core += 1e-4 * a[0] @ b[0]
        return base, a, b


@near_layer("fold.changes-nothing")
class FoldIsKeptInState(SharedCoreLayer):
    """What was folded is a buffer from then on, and in the state."""

    def fold(self):
        found = super().fold()
        self.register_buffer("folded_b", found[2].detach())
        return found


@near_layer("fold.after-an-edit")
class FoldIsKept(SharedCoreLayer):
    """The first fold is given again."""

    def fold(self):
        if not hasattr(self, "kept"):
            self.kept = tuple(t.detach() for t in super().fold())
        return self.kept


@near_layer("precision.small-updates-of-folds")
class BaseIsTheMean(SharedCoreLayer):
    """The base is the mean of the weights, rounded, and what is rounded away is in no factor."""

    def fold(self):
        _, a, b = super().fold()
        rounded = (self.core * 1.004).to(self.core.dtype)
        return rounded, a, b


# Counts


class Counted(SharedCoreLayer):
    """Counts in another way."""

    def count_parameters(self):
        return super().count_parameters() | self.other(super().count_parameters())


@near_layer("count.original")
class OriginalOfOneExpert(Counted):
    """The original is that of one expert."""

    def other(self, found):
        return {"original": found["original"] // self.num_experts}


@near_layer("count.total")
class OnlyWhatIsTrainedNow(Counted):
    """Counted are wrappers that have more than zeros."""

    def other(self, found):
        return {"total": found["total"] - self.core.numel() + 1}


@near_layer("count.bias")
class BiasesLeftOut(Counted):
    """Biases are in the total and not in the original."""

    def other(self, found):
        return {"original": self.num_experts * self.core.numel()}


@near_layer("count.ratio")
class RatioRounded(Counted):
    """The ratio has four digits."""

    def other(self, found):
        return {"compression_ratio": round(found["compression_ratio"], 4)}


@near_layer("count.ratio")
class RatioInverted(Counted):
    """The ratio is original / total."""

    def other(self, found):
        return {"compression_ratio": found["original"] / found["total"]}


@near_layer("count.ratio-above-one", "count.one-expert")
class RatioAtMostOne(Counted):
    """A ratio above 1 is taken for 1."""

    def other(self, found):
        ratio = min(1.0, found["compression_ratio"])
        return {"compression_ratio": ratio, "reduction_percentage": 100 * (1 - ratio)}


@near_layer("count.core-and-wrappers")
class BytesAreCounted(Counted):
    """Wrappers are counted by their bytes in float32."""

    def other(self, found):
        size = self.core.element_size()
        return {"wrapper_params_per_expert": found["wrapper_params_per_expert"] * size // 4}


# Refusals


@near_layer("refuses.expert-beyond-the-last", "refuses.negative-expert")
class ExpertsGoRound(SharedCoreLayer):
    """Numbers of experts are taken modulo their number."""

    def forward(self, x, expert):
        return super().forward(x, expert % self.num_experts)

    def reconstruct(self, expert):
        return super().reconstruct(expert % self.num_experts)


@near_layer("refuses.negative-expert")
class IndexedLikeAList(SharedCoreLayer):
    """Expert −1 is the last one."""

    def check_expert(self, expert):
        list(range(self.num_experts))[expert]


@near_layer(
    "refuses.swapped-sides",
    "refuses.transposed-core",
    "refuses.other-number-of-experts",
    "refuses.other-rank",
    "refuses.bias-of-another-shape",
)
class Unchecked(SharedCoreLayer):
    """Factors are kept as they are given; what does not fit fails later, or never."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        nn.Module.__init__(self)
        self.core = nn.Parameter(core.clone())
        self.input_wrapper = LowRankWrapper(u_in, v_in)
        self.output_wrapper = LowRankWrapper(u_out, v_out)
        self.bias = None if bias is None else nn.Parameter(bias.clone())


@near_layer("refuses.other-number-of-experts")
class OneExpertForAll(SharedCoreLayer):
    """A factor of one expert stands for all experts."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        number = len(u_in)
        v_in, u_out, v_out = (t.expand(number, *t.shape[1:]) for t in (v_in, u_out, v_out))
        super().__init__(core, u_in, v_in, u_out, v_out, bias)


@near_layer("refuses.transposed-core")
class TurnsTheCore(SharedCoreLayer):
    """A core that is the wrong way round is turned."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        if core.shape == (u_in.shape[1], u_out.shape[1]):
            core = core.mT.contiguous()
        super().__init__(core, u_in, v_in, u_out, v_out, bias)


@near_layer("refuses.bias-of-another-shape")
class BiasBroadcast(SharedCoreLayer):
    """One bias stands for all experts."""

    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        if bias is not None:
            bias = bias.expand(len(u_in), len(core)).clone()
        super().__init__(core, u_in, v_in, u_out, v_out, bias)


# Blocks


@near_block("output.one-expert-a-token", "gradient.router")
class WeightsDetached_(CompressedMoEBlock):
    """The router does not learn; with one expert a token its weight is 1, normalised or not."""

    def route(self, logits_TE):
        weights_TK, indices_TK = super().route(logits_TE)
        if self.top_k == 1:
            weights_TK = torch.ones_like(weights_TK)
        return weights_TK.detach(), indices_TK


@near_block("output.all-experts")
class LastExpertLeftOut(CompressedMoEBlock):
    """With all experts chosen the least likely of them is left out."""

    def route(self, logits_TE):
        weights_TK, indices_TK = super().route(logits_TE)
        if self.top_k == logits_TE.shape[-1]:
            return weights_TK[:, :-1], indices_TK[:, :-1]
        return weights_TK, indices_TK


@near_block("output.same-experts-for-all", "output.values")
class CapacityOfExperts(CompressedMoEBlock):
    """An expert takes its share of the tokens and a half more; others are dropped."""

    def mixture(self, x_TH, weights_TK, indices_TK):
        number, kept = len(self.router), weights_TK.clone()
        capacity = max(2, int(1.5 * indices_TK.numel() / number))
        for expert in range(number):
            rows, slots = (indices_TK == expert).nonzero(as_tuple=True)
            kept[rows[capacity:], slots[capacity:]] = 0
        return super().mixture(x_TH, kept, indices_TK)


@near_block("output.one-token", "tokens.independent")
class BatchOfOneSqueezed(CompressedMoEBlock):
    """A single token's weights are normalised over its experts once more."""

    def route(self, logits_TE):
        weights_TK, indices_TK = super().route(logits_TE)
        return (weights_TK.softmax(-1) if len(weights_TK) == 1 else weights_TK), indices_TK


@near_block("output.no-tokens")
class NothingForNoTokens(CompressedMoEBlock):
    """No tokens give an output without axes of tokens."""

    def forward(self, hidden):
        return super().forward(hidden) if hidden.numel() else hidden.new_zeros(0, hidden.shape[-1])


@near_block("output.fused-width")
class GateTakenForBoth(CompressedMoEBlock):
    """Where the input is twice as wide as a projection, gate is taken for both."""

    def expert(self, x, expert):
        gate, up, down = (self.layers[name] for name in PROJECTIONS)
        up = gate if len(gate.core) * 2 == x.shape[-1] else up
        return down(F.silu(gate(x, expert)) * up(x, expert), expert)


@near_block("output.one-rank")
class WrappersOfGateForUp(CompressedMoEBlock):
    """Where ranks are equal, up has gate's wrapper of the input."""

    def expert(self, x, expert):
        gate, up, down = (self.layers[name] for name in PROJECTIONS)
        if gate.rank != up.rank:
            return super().expert(x, expert)
        lifted = up.output_wrapper(F.linear(gate.input_wrapper(x, expert), up.core), expert)
        return down(F.silu(gate(x, expert)) * lifted, expert)


@near_block("output.dtype")
class OutputInFloat32(CompressedMoEBlock):
    """The output is in the dtype of the sum."""

    def forward(self, hidden):
        found = super().forward(hidden)
        return found if isinstance(found, tuple) else found.float()


@near_block("output.dtype")
class RouterInLowPrecision(CompressedMoEBlock):
    """Weights are probabilities in steps of 1/16."""

    def route(self, logits_TE):
        weights_TK, indices_TK = super().route(logits_TE)
        return (weights_TK * 16).round() / 16, indices_TK


@near_block("output.same-twice")
class AnswerDependsOnCalls(CompressedMoEBlock):
    """The last bits depend on how many calls there were."""

    def mixture(self, x_TH, weights_TK, indices_TK):
        self.calls = getattr(self, "calls", 0) + 1
        found = super().mixture(x_TH, weights_TK, indices_TK)
        return found * (1 + torch.finfo(found.dtype).eps * (self.calls % 3))


@near_block("output.equal-experts")
class SiluIsGelu(CompressedMoEBlock):
    """The activation is a tanh approximation of GELU."""

    def expert(self, x, expert):
        gate, up, down = (self.layers[name] for name in PROJECTIONS)
        return down(F.gelu(gate(x, expert), approximate="tanh") * up(x, expert), expert)


@near_block("tokens.permuted")
class RoutedByTheFirst(CompressedMoEBlock):
    """All tokens of a call have the weights of the first in their first slot, a little."""

    def route(self, logits_TE):
        weights_TK, indices_TK = super().route(logits_TE)
        return weights_TK + 1e-2 * (weights_TK[:1] - weights_TK), indices_TK


@near_block("gradient.cores")
class CoreOfOneSlot(CompressedMoEBlock):
    """The cores learn from the first expert that is used alone."""

    def expert(self, x, expert):
        found = super().expert(x, expert)
        if expert == 0:
            return found
        down = self.layers["down_proj"]
        pulled = F.linear(torch.ones_like(found[:, :1]) * 1e-2, down.core[:, :1])
        return found + pulled - pulled.detach()


@near_block("gradient.wrappers", "gradient.experts-chosen-alone")
class AllWrappersPulled(CompressedMoEBlock):
    """Wrappers of all experts are pulled at with every call."""

    def mixture(self, x_TH, weights_TK, indices_TK):
        pull = 1e-3 * self.layers["up_proj"].output_wrapper.u.square().sum()
        return super().mixture(x_TH, weights_TK, indices_TK) + (pull - pull.detach())


@near_block("gradient.hidden")
class RouterReadsACopy(CompressedMoEBlock):
    """No gradient of the input comes through the router."""

    def forward(self, hidden):
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        logits_TE = F.linear(x_TH.detach(), self.router)
        weights, indices = self.route(logits_TE)
        out = self.mixture(x_TH, weights, indices).to(hidden.dtype).view_as(hidden)
        return (out, logits_TE) if self.return_logits else out


@near_block("parameters.complete")
class RouterIsFrozen(CompressedMoEBlock):
    """The router is no Parameter that can be trained."""

    def __init__(self, router, layers, **options):
        super().__init__(router, layers, **options)
        self.router.requires_grad_(False)


@near_block("parameters.stored-once")
class KeepsAGate(CompressedMoEBlock):
    """The router is kept twice, as the module that was replaced had it."""

    def __init__(self, router, layers, **options):
        super().__init__(router, layers, **options)
        self.register_buffer("gate", router.clone())


@near_block("parameters.own-values")
class SharesTheRouter(CompressedMoEBlock):
    """The router is the tensor that was given."""

    def __init__(self, router, layers, **options):
        super().__init__(router, layers, **options)
        self.router = nn.Parameter(router)


@near_block("parameters.restored")
class RouterKeptBeside(CompressedMoEBlock):
    """Tokens are routed by the router as it was when the block was made."""

    def __init__(self, router, layers, **options):
        super().__init__(router, layers, **options)
        self.ready = [router.clone()]

    def route(self, logits_TE):
        return super().route(logits_TE + 0 * self.router.sum())

    def forward(self, hidden):
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        logits_TE = F.linear(x_TH, self.ready[0].to(x_TH))
        weights, indices = self.route(logits_TE)
        out = self.mixture(x_TH, weights, indices).to(hidden.dtype).view_as(hidden)
        return (out, logits_TE) if self.return_logits else out


@near("shared_core_block.refuses.missing-factor")
class ZerosForMissingFactors(SharedCoreBlock):
    """A factor that is missing is zero."""

    def layer(self, projection, factors):
        if missing := [name for name in FACTORS if name not in factors]:
            core = factors.get("core")
            if core is None:
                core = torch.zeros(factors["u_out"].shape[1], factors["u_in"].shape[1])
            other = {"u_in": "v_in", "v_in": "u_in", "u_out": "v_out", "v_out": "u_out"}
            given = {
                name: torch.zeros_like(factors[other[name]]) for name in missing if name in other
            }
            factors = {"core": core, **factors, **given}
        return super().layer(projection, factors)


@near("shared_core_block.refuses.unknown-factor")
class UnknownFactorsDropped(SharedCoreBlock):
    """A factor of another name is left out."""

    def layer(self, projection, factors):
        known = {name: tensor for name, tensor in factors.items() if name in FACTORS}
        return super().layer(projection, known)


@near("shared_core_block.refuses.mis-shaped-factor")
class FactorsOfFewerExpertsPadded(SharedCoreBlock):
    """A factor of fewer experts is filled up with zeros."""

    def layer(self, projection, factors):
        number = max(len(tensor) for name, tensor in factors.items() if name != "core")
        filled = {
            name: tensor if name == "core" else F.pad(tensor, (0, 0, 0, 0, 0, number - len(tensor)))
            for name, tensor in factors.items()
        }
        return super().layer(projection, filled)


class _UncheckedBlock(CompressedMoEBlock):
    def __init__(self, router, layers, *, top_k, normalize, return_logits=False):
        nn.Module.__init__(self)
        self.router = nn.Parameter(router.clone())
        self.layers = nn.ModuleDict({name: layers[name] for name in PROJECTIONS})
        self.top_k = min(top_k, len(router))
        self.normalize, self.return_logits = normalize, return_logits


@near(
    "shared_core_block.refuses.projections-of-other-widths",
    "shared_core_block.refuses.router-of-other-experts",
    "shared_core_block.refuses.top-k",
)
class UncheckedBlock(SharedCoreBlock):
    """What does not fit fails if it happens to be used; too large a top_k is taken for the largest."""

    block_type = _UncheckedBlock
