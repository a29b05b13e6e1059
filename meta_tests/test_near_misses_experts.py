"""Subtle mistakes in experts that no catalogue lists, for every requirement of the contract."""

import pytest
import torch
import torch.nn.functional as F
from mutants import Broken

from reference_impl.moe.experts import ACTIVATIONS, BatchedExperts, Experts, GroupedExperts

NEAR_EXPERTS: dict[str, Broken] = {}


def near(breaks: str):
    """Register an adapter, whose docstring says what is wrong with it."""

    def decorate(adapter: type) -> type:
        wrong, slug = " ".join(adapter.__doc__.split()), f"experts.{breaks}"
        NEAR_EXPERTS[adapter.__name__] = Broken(adapter.__name__, slug, wrong, adapter)
        return adapter

    return decorate


@pytest.mark.parametrize("name", NEAR_EXPERTS)
def test_near_miss_is_caught(name):
    NEAR_EXPERTS[name].assert_caught()


def gradient_only(value, gradient_of):
    """``value`` in the forward pass, with the gradient of another tensor."""
    return value.detach() + gradient_of - gradient_of.detach()


class Prepares(Experts):
    """Changes what the reference is called with."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        given = self.prepared(hidden, indices, weights, gate_up_proj, down_proj)
        return super().experts(*given, **options)


class Finishes(Experts):
    """Changes what the reference gives."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        out = super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)
        return self.finished(out, hidden, indices, weights, down_proj)


class OtherActivation(Experts):
    """Has an activation of its own."""

    name = "silu"

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        if activation is ACTIVATIONS[self.name]:
            activation = self.activate
        return super().through_experts(x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation)


# What is computed


@near("forward.values")
class HardSilu(OtherActivation):
    """SiLU has a piecewise linear sigmoid."""

    def activate(self, x):
        return F.hardswish(x)


@near("forward.bits")
class StoredIn16Bits(Experts):
    """What experts give is stored in bfloat16 before it is weighted."""

    def through_experts(self, x_PH, *rest):
        return super().through_experts(x_PH, *rest).bfloat16().to(x_PH.dtype)


@near("activation.on-the-gate")
class LimitedGate(OtherActivation):
    """The gate is clamped at 7, as in gpt-oss."""

    def activate(self, x):
        return F.silu(x.clamp(max=7))


@near("activation.on-the-gate")
class SquaredGate(OtherActivation):
    """The sigmoid has a slope of 1.702, as in gpt-oss."""

    def activate(self, x):
        return x * torch.sigmoid(1.702 * x)


@near("activation.saturated")
class ExponentialsOverflow(OtherActivation):
    """SiLU is x eˣ / (1 + eˣ), which is infinity over infinity."""

    def activate(self, x):
        return x * x.exp() / (1 + x.exp())


@near("activation.gelu")
class GeluBySigmoid(OtherActivation):
    """GELU is x σ(1.702 x)."""

    name = "gelu"

    def activate(self, x):
        return x * torch.sigmoid(1.702 * x)


@near("activation.gelu-tanh")
class GeluWithoutTheCube(OtherActivation):
    """The cubic term has another factor."""

    name = "gelu_tanh"

    def activate(self, x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044 * x**3)))


@near("activation.relu")
class LeakyRelu(OtherActivation):
    """A hundredth passes below zero."""

    name = "relu"

    def activate(self, x):
        return F.leaky_relu(x)


# How the weights lie


@near("layout.concatenated")
class HalvesOfTheWholeBatch(Experts):
    """Gate and up are halves of the experts' rows one behind the other."""

    def gate_and_up(self, gate_up_proj, layout):
        if layout != "concatenated":
            return super().gate_and_up(gate_up_proj, layout)
        gate, up = gate_up_proj.flatten(0, 1).chunk(2)
        return gate.unflatten(0, (len(gate_up_proj), -1)), up.unflatten(0, (len(gate_up_proj), -1))


@near("layout.interleaved")
class InterleavedInPairs(Experts):
    """Interleaved rows are g₀, g₁, u₀, u₁ …"""

    def gate_and_up(self, gate_up_proj, layout):
        if layout != "interleaved":
            return super().gate_and_up(gate_up_proj, layout)
        pairs = gate_up_proj.unflatten(1, (-1, 2, 2))
        return pairs[:, :, 0].flatten(1, 2), pairs[:, :, 1].flatten(1, 2)


@near("layout.transposed")
class TransposedAreConcatenated(Experts):
    """Transposed weights are read as concatenated, whatever the layout."""

    def experts(self, *tensors, layout="concatenated", transposed=False, **options):
        if transposed and layout == "interleaved":
            layout = "concatenated"
        return super().experts(*tensors, layout=layout, transposed=transposed, **options)


@near("layout.transposed")
class ReshapedNotTransposed(Experts):
    """Transposed weights are given the shape that is wanted, in the order of memory."""

    def experts(self, hidden, indices, weights, gate_up, down, *, transposed=False, **options):
        if transposed:
            gate_up = gate_up.reshape(gate_up.mT.shape)
            down = down.reshape(down.mT.shape)
        return super().experts(hidden, indices, weights, gate_up, down, **options)


class TransposedIfSquare(Experts):
    """A projection that is square is taken for transposed exactly if it is not said to be."""

    half = False

    def experts(self, hidden, indices, weights, gate_up, down, *, transposed=False, **options):
        if transposed:
            gate_up, down = gate_up.mT, down.mT
        if self.half and gate_up.shape[1] == gate_up.shape[2] and transposed:
            gate_up = gate_up.mT
        if not self.half and down.shape[1] == down.shape[2] and transposed:
            down = down.mT
        return super().experts(hidden, indices, weights, gate_up, down, **options)


@near("layout.square-transposed")
class SquareIsTransposedTwice(TransposedIfSquare):
    """A square down projection is transposed twice."""


@near("layout.half-square-transposed")
class HalfSquareIsTransposedTwice(TransposedIfSquare):
    """A square projection of gate and up is transposed twice."""

    half = True


@near("layout.half-square")
class SquareIsInterleaved(Experts):
    """Square projections of gate and up are taken for interleaved."""

    def gate_and_up(self, gate_up_proj, layout):
        if gate_up_proj.shape[1] == gate_up_proj.shape[2]:
            layout = "interleaved"
        return super().gate_and_up(gate_up_proj, layout)


@near("layout.square")
class LastSquareByColumns(Experts):
    """A square down projection is read by columns for the last expert alone."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        if down_EHI.shape[1] == down_EHI.shape[2]:
            down_EHI = torch.cat([down_EHI[:-1], down_EHI[-1:].mT])
        return super().through_experts(x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation)


@near("layout.any-width")
class TailIsLost(Experts):
    """Inner values beyond a multiple of 4 are not computed."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        kept = gate_EIH.shape[1] // 4 * 4
        parts = (gate_EIH[:, :kept], up_EIH[:, :kept], down_EHI[..., :kept])
        return super().through_experts(x_PH, experts_P, *parts, activation)


@near("layout.any-width-gradients")
class TailHasNoGradient(Experts):
    """The backward pass leaves out inputs beyond a multiple of 4."""

    def through_experts(self, x_PH, *rest):
        kept = x_PH.shape[1] // 4 * 4
        x_PH = torch.cat([x_PH[:, :kept], x_PH[:, kept:].detach()], 1)
        return super().through_experts(x_PH, *rest)


@near("layout.strided")
class OrderOfMemory(Prepares):
    """Down projections are read as if their memory were contiguous."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if down_proj.untyped_storage().nbytes() > down_proj.nbytes:
            strides = down_proj.mT.contiguous().mT.new_empty(down_proj.shape).stride()
            down_proj = down_proj.as_strided(down_proj.shape, strides)
        return hidden, indices, weights, gate_up_proj, down_proj


# Weights of slots


@near("weights.on-the-output")
class AbsoluteWeights(Experts):
    """Negative weights lose their sign."""

    def weighted(self, x_PH, weights_P1):
        return super().weighted(x_PH, weights_P1.abs())


@near("weights.on-the-output")
class AtMostOne(Experts):
    """Weights are clamped at 1."""

    def weighted(self, x_PH, weights_P1):
        return super().weighted(x_PH, weights_P1.clamp(max=1))


@near("weights.on-the-input")
class WeightOnTheGateAlone(Experts):
    """Weights on the input are those of the gate, and up has the input without them."""

    def experts(self, hidden, indices, weights, gate_up, down, weight_on_input=False, **options):
        given = (hidden, indices, weights, gate_up, down)
        if not weight_on_input or not indices.numel():
            return super().experts(*given, weight_on_input=weight_on_input, **options)
        # up(x) = up(w x) / w, and down is linear
        return (
            super()
            .experts(
                hidden.repeat_interleave(indices.shape[1], 0),
                indices.reshape(-1, 1),
                weights.reshape(-1, 1),
                gate_up,
                down,
                weight_on_input=True,
                **options,
            )
            .div(weights.reshape(-1, 1))
            .unflatten(0, indices.shape)
            .sum(1)
            .to(hidden.dtype)
        )


@near("weights.on-the-input-gradients")
class HalfTheGradientOfInputWeights(Experts):
    """Weights on the input have half of their gradient."""

    def experts(self, hidden, indices, weights, gate_up, down, weight_on_input=False, **options):
        if weight_on_input:
            weights = gradient_only(weights, weights / 2)
        given = (hidden, indices, weights, gate_up, down)
        return super().experts(*given, weight_on_input=weight_on_input, **options)


@near("weights.scale")
class Normalised(Experts):
    """Weights are divided by the largest where it is above 2."""

    def weighted(self, x_PH, weights_P1):
        return super().weighted(x_PH, weights_P1 / weights_P1.detach().amax().clamp(min=2) * 2)


@near("weights.zero")
class ZeroWeightsAreSkipped(Prepares):
    """Slots of weight 0 are not computed, and so have no gradient."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if indices.shape == weights.shape:
            indices = torch.where(weights == 0, len(down_proj), indices)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("weights.wide")
class PromotedByWeights(Finishes):
    """The output has the dtype of the product with float32 weights."""

    def finished(self, out, hidden, indices, weights, down_proj):
        return out.to(torch.promote_types(out.dtype, weights.dtype))


@near("weights.wide-gradients")
class HalfTheGradientOfWideWeights(Prepares):
    """Half of the gradient is lost where float32 weights are converted."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if weights.dtype != hidden.dtype:
            weights = gradient_only(weights, weights / 2)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("weights.equal-experts")
class MeanOverSlots(Finishes):
    """The output is the mean over slots, for weights that sum to 1."""

    def finished(self, out, hidden, indices, weights, down_proj):
        sums = weights.sum(-1) if indices.numel() else torch.zeros(1)
        return out / 2 if bool((sums == 1).all()) and indices.shape[1] > 1 else out


# Slots


@near("slots.one")
class TopOneHasWeightOne(Prepares):
    """A single slot has weight 1."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if weights.ndim == 2 and weights.shape[1] == 1:
            weights = weights / weights.detach()
        return hidden, indices, weights, gate_up_proj, down_proj


@near("slots.sum")
class TwoSlotsAtMost(Prepares):
    """A third slot and those behind it are not read."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if indices.shape == weights.shape and indices.shape[1] < 5:
            indices, weights = indices[:, :2], weights[:, :2]
        return hidden, indices, weights, gate_up_proj, down_proj


@near("slots.every-expert")
class EveryExpertInOrder(Prepares):
    """With as many slots as experts, slot k is taken for expert k."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if indices.shape[1:] == down_proj.shape[:1]:
            indices = torch.arange(len(down_proj)).expand_as(indices)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("slots.repeated")
class RepeatedHaveTheFirstWeight(Prepares):
    """All slots of one expert have the weight of the first of them."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if indices.shape == weights.shape and indices.ndim == 2 and indices.numel():
            first = (indices[:, :, None] == indices[:, None, :]).int().argmax(-1)
            weights = weights.gather(1, first)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("slots.repeated-gradients")
class RepeatedWeightsShareAGradient(Prepares):
    """Weights of several slots of one expert have one gradient: that of the first is lost."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if indices.shape == weights.shape and indices.ndim == 2 and indices.shape[1] > 1:
            again = indices[:, :1] == indices[:, -1:]
            first = torch.where(again, weights[:, :1].detach(), weights[:, :1])
            weights = torch.cat([first, weights[:, 1:]], 1)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("slots.order")
class SortedIndices(Prepares):
    """A token's experts are sorted, and its weights stay where they were."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        return hidden, indices.sort(-1).values, weights, gate_up_proj, down_proj


@near("slots.many")
class ManySlotsIn16Bits(Experts):
    """The sum over slots is kept in the dtype of hidden, eight slots at a time."""

    def sum_slots(self, out_PH, tokens_P, hidden):
        slots = len(tokens_P) // max(len(hidden), 1)
        if slots < 64:
            return super().sum_slots(out_PH, tokens_P, hidden)
        out_TKH = out_PH.unflatten(0, (len(hidden), slots))
        out_TH = torch.zeros_like(hidden)
        for first in range(slots):
            out_TH = out_TH + out_TKH[:, first].to(hidden.dtype)
        return out_TH


# Experts


@near("index.tagged")
class NumbersModuloThirtyTwo(Prepares):
    """The number of an expert is kept in five bits."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        indices = torch.where(indices == len(down_proj), indices, indices % 32)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("index.more-than-ten")
class TensSwapped(Experts):
    """The down projections of experts 10 and 11 are swapped."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        if len(down_EHI) > 11:
            order = list(range(len(down_EHI)))
            order[10:12] = 11, 10
            down_EHI = down_EHI[order]
        return super().through_experts(x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation)


@near("index.renamed")
class FirstExpertIsPadding(Prepares):
    """Index 0 is taken for padding."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if len(down_proj) > 1:
            indices = torch.where(indices == 0, len(down_proj), indices)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("index.one-expert")
class OneExpertHasWeightOne(Prepares):
    """With a single expert weights are not read."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if len(down_proj) == 1:
            weights = weights / weights.detach()
        return hidden, indices, weights, gate_up_proj, down_proj


# Tokens


class Capacity(Prepares):
    """Every expert takes a number of tokens, and drops those that come later."""

    share = 1.25

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        number = len(down_proj)
        if indices.numel() and bool((indices >= 0).all()):
            most = int(self.share * indices.numel() / number) + 1
            chosen = F.one_hot(indices.flatten(), int(indices.max()) + 1)
            place = (chosen.cumsum(0) * chosen).sum(-1).view_as(indices)
            indices = torch.where(place > most, number, indices)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("tokens.order")
class DropsBeyondCapacity(Capacity):
    """Experts have a capacity of 1.25 times their share; later tokens are dropped."""


@near("tokens.split")
class DropsBeyondALargerCapacity(Capacity):
    """Experts have a capacity of 1.5 times their share."""

    share = 1.5


@near("tokens.many")
class BlocksOf64(Finishes):
    """Tokens are computed 64 at a time, and what is left over beyond 256 is not."""

    def finished(self, out, hidden, indices, weights, down_proj):
        kept = max(len(hidden) // 64 * 64, 64)
        return torch.cat([out[:kept], torch.zeros_like(out[kept:])])


@near("tokens.one")
class OneTokenLosesItsAxis(Finishes):
    """The output of one token has no axis of tokens."""

    def finished(self, out, hidden, indices, weights, down_proj):
        return out[0] if len(out) == 1 else out


@near("tokens.one")
class OneTokenLosesASlot(Experts):
    """One token takes a path of its own, on which the last slot is lost."""

    def sum_slots(self, out_PH, tokens_P, hidden):
        if len(hidden) == 1 and len(tokens_P) > 1:
            return super().sum_slots(out_PH[:-1], tokens_P[:-1], hidden)
        return super().sum_slots(out_PH, tokens_P, hidden)


@near("tokens.none")
class NoTokensGiveOne(Finishes):
    """Without tokens a row of zeros is given."""

    def finished(self, out, hidden, indices, weights, down_proj):
        return out if len(out) else out.new_zeros(1, hidden.shape[1])


@near("tokens.nan-stays")
class DispatchedByProducts(Experts):
    """Tokens are sent to experts by a product with zeros and ones."""

    def through_experts(self, x_PH, experts_P, *weights):
        places = torch.eye(len(x_PH), dtype=x_PH.dtype)
        return super().through_experts(places @ x_PH, experts_P, *weights)


# Experts without tokens


@near("empty.gradients")
class IdleExpertsDecay(Experts):
    """The gradient of an idle expert is a little of its weights."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        out_PH = super().through_experts(x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation)
        idle = [e for e in range(len(down_EHI)) if e not in experts_P]
        loss = 1e-6 * down_EHI[idle].square().sum()
        return out_PH + loss - loss.detach()


@near("empty.all-on-one")
class OneGroupIsNotWeighted(Experts):
    """Where all tokens go to one expert, their weights have no gradient."""

    def experts(self, hidden, indices, weights, *projections, **options):
        if indices.numel() and bool((indices == indices.flatten()[0]).all()):
            weights = gradient_only(weights, 0 * weights)
        return super().experts(hidden, indices, weights, *projections, **options)


@near("empty.nan-stays")
class SumsOverAllExperts(Experts):
    """Every token goes through every expert, and what was not chosen is multiplied by 0."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        h_EPI = activation(x_PH @ gate_EIH.mT) * (x_PH @ up_EIH.mT)
        chosen_EP = F.one_hot(experts_P, len(down_EHI)).T.to(x_PH.dtype)
        return (h_EPI @ down_EHI.mT * chosen_EP[..., None]).sum(0)


@near("empty.connected")
class OnlyWeightsAreConnected(Experts):
    """Without any token, the projections are not part of the computation."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        if not len(x_PH):
            return torch.zeros_like(x_PH)
        return super().through_experts(x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation)


# Slots without an expert


@near("sentinel.adds-nothing")
class RenormalisedOverExperts(Prepares):
    """The weights of a token's other slots make up for those without an expert."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        real = indices < len(down_proj)
        if indices.shape == weights.shape and not bool(real.all()):
            slots = real.sum(-1, keepdim=True).clamp(min=1)
            weights = weights * (indices.shape[1] / slots).to(weights.dtype)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("sentinel.whole-token")
class DroppedTokensPassThrough(Finishes):
    """A token without any expert is given back as it came."""

    def finished(self, out, hidden, indices, weights, down_proj):
        lost = (indices == len(down_proj)).all(-1, keepdim=True)
        return torch.where(lost & (hidden == hidden), hidden, out)


@near("sentinel.last-expert")
class LastExpertBesideSentinels(Prepares):
    """Where any slot has no expert, the last expert is not run."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        number = len(down_proj)
        if bool((indices == number).any()):
            indices = torch.where(indices == number - 1, number, indices)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("sentinel.gradients")
class WeightsOfSentinelsHaveGradients(Finishes):
    """The weight of a slot without an expert has the gradient of the first expert's slot."""

    def finished(self, out, hidden, indices, weights, down_proj):
        lost = torch.where(indices == len(down_proj), weights.nan_to_num(0, 0, 0), 0)
        total = lost.sum(-1, keepdim=True)
        return out + (total - total.detach()).to(out.dtype)


@near("sentinel.any-weight")
class LargestWeightIsRead(Experts):
    """Weights are scaled by the largest of all slots, and back."""

    def experts(self, hidden, indices, weights, *projections, **options):
        out = super().experts(hidden, indices, weights, *projections, **options)
        largest = weights.detach().abs().amax() if weights.numel() else torch.ones(())
        return out * (largest / largest).to(out.dtype)


@near("sentinel.any-weight-gradients")
class NaNInTheWeightGradient(Finishes):
    """The gradient of the weight of a slot without an expert is 0 times that weight."""

    def finished(self, out, hidden, indices, weights, down_proj):
        lost = indices == len(down_proj)
        term = torch.where(lost, 0 * weights * weights.detach(), 0).sum(-1, keepdim=True)
        return out + (gradient_only(torch.zeros_like(term), term)).nan_to_num(0).to(out.dtype)


@near("sentinel.any-token")
class TokenTimesZero(Finishes):
    """A token's own values are added with a factor of 0."""

    def finished(self, out, hidden, indices, weights, down_proj):
        return out + 0 * hidden


@near("sentinel.any-token-gradients")
class NaNInTheTokensGradient(Experts):
    """Weights have a gradient that is 0 times their token."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        out = super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)
        if indices.shape != weights.shape:
            return out
        lost = (indices == len(down_proj)).all(-1, keepdim=True)
        term = hidden.detach() * weights.sum(-1, keepdim=True).to(hidden.dtype) * 0
        return torch.where(lost, gradient_only(torch.zeros_like(out), term).nan_to_num(0), out)


@near("sentinel.every-slot")
class NoExpertsGiveTheInput(Finishes):
    """Where no token has an expert, tokens are given back."""

    def finished(self, out, hidden, indices, weights, down_proj):
        none = indices.numel() and bool((indices == len(down_proj)).all())
        return hidden.clone() if none else out


# Gradients


@near("gradient.of-inputs")
class LastSlotIsConstant(Prepares):
    """Weights of the last slot have no gradient."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if weights.ndim == 2 and weights.shape[1] > 1:
            weights = torch.cat([weights[:, :-1], weights[:, -1:].detach()], 1)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("gradient.of-inputs")
class LessGradientOfHidden(Experts):
    """A hundredth of the gradient of hidden is lost."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        out_PH = super().through_experts(x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation)
        through_up = super().through_experts(
            x_PH, experts_P, gate_EIH.detach(), up_EIH.detach(), down_EHI.detach(), activation
        )
        return out_PH - 0.01 * (through_up - through_up.detach())


@near("gradient.of-projections")
class SigmoidForItsDerivative(OtherActivation):
    """The derivative of SiLU is taken for the sigmoid."""

    def activate(self, x):
        return gradient_only(F.silu(x), x * torch.sigmoid(x).detach())


@near("gradient.of-one")
class FrozenHiddenFreezesAll(Experts):
    """Without a gradient of hidden, the backward pass of the down projection is skipped."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        if not hidden.requires_grad:
            down_proj = gradient_only(down_proj, 0 * down_proj)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@near("gradient.of-layouts")
class GradientIsConcatenated(Experts):
    """The gradient of interleaved weights is concatenated."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        if options.get("layout") == "interleaved" and gate_up_proj.requires_grad:
            axis = 2 if options.get("transposed") else 1
            gate_up_proj = gate_up_proj.clone()
            gate_up_proj.register_hook(
                lambda g: g.unflatten(axis, (-1, 2)).transpose(axis, axis + 1).reshape(g.shape)
            )
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@near("gradient.of-activations")
class GeluHasTheTanhGradient(OtherActivation):
    """The derivative of GELU is that of its approximation by the sigmoid."""

    name = "gelu"

    def activate(self, x):
        return gradient_only(F.gelu(x), x * torch.sigmoid(1.702 * x))


# Outputs


@near("output.dtype")
class OutputInFloat32(Finishes):
    """The output is in float32."""

    def finished(self, out, hidden, indices, weights, down_proj):
        return out.float()


@near("output.dtype")
class BatchAxis(Finishes):
    """The output has an axis for the batch."""

    def finished(self, out, hidden, indices, weights, down_proj):
        return out[None]


@near("output.deterministic")
class RandomLastBits(Finishes):
    """A global random number generator decides the last bits."""

    def finished(self, out, hidden, indices, weights, down_proj):
        return out * (1 + torch.finfo(out.dtype).eps * (torch.rand_like(out) < 0.3))


@near("output.deterministic")
class FirstCallDiffers(Experts):
    """The first of four calls has other last bits."""

    def __init__(self):
        self.calls = 0

    def experts(self, hidden, *rest, **options):
        self.calls += 1
        tiny = torch.finfo(hidden.dtype).eps
        return super().experts(hidden * (1 + tiny * (self.calls % 4 == 1)), *rest, **options)


@near("output.own-memory")
class ReusesTheOutput(Experts):
    """Outputs of one shape share their memory."""

    def __init__(self):
        self.kept = {}

    def experts(self, hidden, *rest, **options):
        out = super().experts(hidden, *rest, **options)
        if out.requires_grad:
            return out
        key = out.shape, out.dtype
        self.kept[key] = self.kept.get(key, torch.empty_like(out)).copy_(out)
        return self.kept[key]


@near("output.inputs-unchanged")
class ClampsInPlace(Experts):
    """Indices are clamped in place after use."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        out = super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)
        indices.clamp_(max=len(down_proj) - 1)
        return out


@near("output.inputs-unchanged")
class SortsInPlace(Experts):
    """Indices are sorted in place with the weights."""

    def experts(self, hidden, indices, weights, *projections, **options):
        out = super().experts(hidden, indices, weights, *projections, **options)
        indices.copy_(indices.sort(-1).values)
        return out


# What is refused


@near("refuses.negative-index")
class NegativeIsZero(Prepares):
    """Indices below 0 are clamped to the first expert."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        return hidden, indices.clamp(min=0), weights, gate_up_proj, down_proj


@near("refuses.index-beyond")
class WrapsAround(Prepares):
    """Indices beyond the sentinel wrap around."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        return hidden, indices % (len(down_proj) + 1), weights, gate_up_proj, down_proj


@near("refuses.fewer-weights")
class WeightsAreBroadcast(Prepares):
    """Weights are broadcast to the slots, or cut to the tokens that have some."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if weights.ndim < 2 or weights.shape[1] != indices.shape[1]:
            weights = weights.expand(indices.shape)
        return hidden, indices, weights, gate_up_proj, down_proj


@near("refuses.other-tokens")
class ShortestCounts(Finishes):
    """Tokens without indices are left out, indices without tokens too."""

    def experts(self, hidden, indices, weights, *projections, **options):
        most = min(len(hidden), len(indices))
        out = Experts.experts(
            self, hidden[:most], indices[:most], weights[:most], *projections, **options
        )
        return F.pad(out, (0, 0, 0, len(hidden) - most)) if most < len(hidden) else out


@near("refuses.other-hidden")
class HiddenIsFitted(Prepares):
    """Projections are cut to the width of hidden."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        if hidden.shape[1] + 1 in (gate_up_proj.shape[2], down_proj.shape[1]):
            width = hidden.shape[1]
            gate_up_proj, down_proj = gate_up_proj[:, :, :width], down_proj[:, :width]
        return hidden, indices, weights, gate_up_proj, down_proj


@near("refuses.odd-rows")
class RowsAreFitted(Prepares):
    """Down projections are cut to the rows that gate and up have."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        rows = gate_up_proj.shape[1]
        if gate_up_proj.shape[2] == hidden.shape[1] and rows < 2 * down_proj.shape[2]:
            gate_up_proj, down_proj = gate_up_proj[:, : rows // 2 * 2], down_proj[..., : rows // 2]
        return hidden, indices, weights, gate_up_proj, down_proj


@near("refuses.other-experts")
class MoreExpertsThanNeeded(Prepares):
    """Projections of more experts than there are down projections are left alone."""

    def prepared(self, hidden, indices, weights, gate_up_proj, down_proj):
        return hidden, indices, weights, gate_up_proj[: len(down_proj)], down_proj


@near("refuses.layout")
class OtherLayoutsAreConcatenated(Experts):
    """Whatever is not interleaved is concatenated."""

    def experts(self, *tensors, layout="concatenated", **options):
        layout = "interleaved" if layout == "interleaved" else "concatenated"
        return super().experts(*tensors, layout=layout, **options)


@near("refuses.activation")
class OtherActivationsAreSilu(Experts):
    """An activation that is not known is SiLU."""

    def experts(self, *tensors, activation="silu", **options):
        activation = activation if activation in ACTIVATIONS else "silu"
        return super().experts(*tensors, activation=activation, **options)


# Forms other than the loop


@near("tokens.many")
class GroupsEndOneEarly(GroupedExperts):
    """The last row of the last group is not computed."""

    def through_experts(self, x_PH, experts_P, *weights):
        out_PH = super().through_experts(x_PH, experts_P, *weights)
        last = experts_P.argsort(stable=True)[-1:]
        return out_PH.index_fill(0, last, 0) if len(x_PH) > 100 else out_PH


@near("index.more-than-ten")
class CopiesOfTheFirstTen(BatchedExperts):
    """Down projections are gathered from the first sixteen experts."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        down_EHI = torch.cat([down_EHI[:11], down_EHI[10:-1]]) if len(down_EHI) > 11 else down_EHI
        return super().through_experts(x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation)


def test_every_requirement_has_a_near_miss():
    from conformance.harness.requirement import all_requirements

    slugs = {
        slug
        for slug, record in all_requirements().items()
        if record.contract == "experts" and not record.gpu  # those are in test_near_misses_large
    }
    assert {broken.breaks for broken in NEAR_EXPERTS.values()} == slugs
