"""Subtle mistakes in mixture-of-experts blocks that no catalogue lists, for every requirement."""

import pytest
import torch
from mutants import Broken, OtherGradient

from reference_impl.moe.block import MoEBlock

NEAR_MOE_BLOCK: dict[str, Broken] = {}


def near(breaks: str):
    """Register an adapter, whose docstring says what is wrong with it."""

    def decorate(adapter: type) -> type:
        wrong, slug = " ".join(adapter.__doc__.split()), f"moe_block.{breaks}"
        NEAR_MOE_BLOCK[adapter.__name__] = Broken(adapter.__name__, slug, wrong, adapter)
        return adapter

    return decorate


@pytest.mark.parametrize("name", NEAR_MOE_BLOCK)
def test_near_miss_is_caught(name):
    NEAR_MOE_BLOCK[name].assert_caught()


class OtherProjections(MoEBlock):
    """The projections go through ``gate_up`` and ``down``."""

    def gate_up(self, gate_up_EJH):
        return gate_up_EJH

    def down(self, down_EHI):
        return down_EHI

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        gate_up, down = self.gate_up(gate_up_proj), self.down(down_proj)
        return super().experts(hidden, indices, weights, gate_up, down, **options)


class After(MoEBlock):
    """The output goes through ``after``."""

    def moe_block(self, hidden, *weights, return_logits=False, **options):
        out, logits = super().moe_block(hidden, *weights, return_logits=True, **options)
        out = self.after(out, hidden)
        return (out, logits) if return_logits else out


# The mixture


@near("output.probabilities")
class WeightOfTheBestForAll(MoEBlock):
    """Every slot has the weight of the best expert."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = super().expert_weights(scores_TE, indices_TK, normalize)
        return weights_TK.amax(-1, keepdim=True).expand_as(weights_TK)


@near("output.probabilities")
class GateIsGelu(MoEBlock):
    """The activation is the tanh approximation of GELU."""

    def experts(self, *arguments, **options):
        return super().experts(*arguments, activation="gelu_tanh")


@near("output.normalised")
class WeightOnInput(MoEBlock):
    """Weights are on the input of experts, which are not linear."""

    def experts(self, *arguments, **options):
        return super().experts(*arguments, weight_on_input=True)


@near("output.sigmoid")
class SigmoidOverSoftmax(MoEBlock):
    """Sigmoid is a softmax."""

    def expert_scores(self, logits, score):
        return super().expert_scores(logits, "softmax")


@near("output.bias")
class BiasOnTheLogits(MoEBlock):
    """The bias is added to the logits, weights and all."""

    def moe_router(self, logits, *, selection_bias=None, **options):
        if selection_bias is not None:
            logits = logits + selection_bias
        return super().moe_router(logits, **options)


@near("output.groups")
class OneGroupLess(MoEBlock):
    """One group less is kept, where there is one left."""

    def allowed_experts(self, ranked_TE, groups, *, biased):
        if groups is not None and groups[1] > 1:
            groups = (groups[0], groups[1] - 1)
        return super().allowed_experts(ranked_TE, groups, biased=biased)


@near("output.scaling")
class FactorForgotten(MoEBlock):
    """The factor is not handed to the router."""

    def moe_router(self, logits, *, scaling_factor=1.0, **options):
        return super().moe_router(logits, **options)


@near("shared.added")
class SharedHalved(MoEBlock):
    """Routed and shared experts are averaged as far as the shared one goes."""

    def shared_expert(self, *arguments):
        return super().shared_expert(*arguments) / 2


@near("shared.added")
class SharedOfTheOutput(MoEBlock):
    """The shared expert takes the token doubled, as after a residual connection."""

    def shared_expert(self, x_TH, *weights):
        return super().shared_expert(2 * x_TH, *weights)


@near("shared.gated")
class GateIsSilu(MoEBlock):
    """The shared expert is multiplied by the gate's SiLU."""

    def shared_expert(self, x_TH, gate_up_proj, down_proj, shared_gate):
        out_TH = super().shared_expert(x_TH, gate_up_proj, down_proj, None)
        return (
            out_TH
            if shared_gate is None
            else torch.nn.functional.silu(x_TH @ shared_gate.T) * out_TH
        )


@near("shared.gated")
class GateOnTheInput(MoEBlock):
    """The gate multiplies what goes into the shared expert."""

    def shared_expert(self, x_TH, gate_up_proj, down_proj, shared_gate):
        if shared_gate is not None:
            x_TH = torch.sigmoid(x_TH @ shared_gate.T) * x_TH
        return super().shared_expert(x_TH, gate_up_proj, down_proj, None)


@near("shared.not-scaled")
class FactorOnEverything(MoEBlock):
    """The factor is on the sum of routed and shared experts."""

    def moe_block(self, hidden, *weights, scaling_factor=1.0, return_logits=False, **options):
        out, logits = super().moe_block(hidden, *weights, return_logits=True, **options)
        out = out * scaling_factor
        return (out, logits) if return_logits else out


@near("options.any-combination")
class NoFactorWithAShared(MoEBlock):
    """With a gated shared expert and groups the factor is forgotten."""

    def moe_block(self, *arguments, scaling_factor=1.0, **options):
        if options.get("shared_gate") is not None and options.get("groups"):
            scaling_factor = 1.0
        return super().moe_block(*arguments, scaling_factor=scaling_factor, **options)


# Sizes


@near("sizes.square-gate-up")
class SquareGateUpTransposed(OtherProjections):
    """A gate and up projection that is square is taken for the other layout."""

    def gate_up(self, gate_up_EJH):
        square = gate_up_EJH.shape[1] == gate_up_EJH.shape[2]
        return gate_up_EJH.mT if square else gate_up_EJH


@near("sizes.square-down")
class SquareDownTransposed(OtherProjections):
    """A down projection that is square is taken for the other layout."""

    def down(self, down_EHI):
        return down_EHI.mT if down_EHI.shape[1] == down_EHI.shape[2] else down_EHI


@near("sizes.square-router")
class SquareRouterTransposed(MoEBlock):
    """A router that is square is taken for [hidden, experts]."""

    def moe_block(self, hidden, router, *projections, **options):
        router = router.T if router.shape[0] == router.shape[1] else router
        return super().moe_block(hidden, router, *projections, **options)


# Experts


@near("experts.twelve-and-more")
class SortedAsStrings(OtherProjections):
    """Experts are stacked in the order of their names: 0, 1, 10, 11, 2."""

    def gate_up(self, gate_up_EJH):
        return gate_up_EJH[sorted(range(len(gate_up_EJH)), key=str)]

    def down(self, down_EHI):
        return down_EHI[sorted(range(len(down_EHI)), key=str)]


@near("experts.permuted")
class FirstExpertIsShared(OtherProjections):
    """Every expert's down projection has a little of the first one's."""

    def down(self, down_EHI):
        return down_EHI + 0.01 * down_EHI[:1]


@near("experts.router-permuted")
class RouterSorted(MoEBlock):
    """The rows of the router are put into the order of their first numbers."""

    def moe_block(self, hidden, router, *projections, **options):
        return super().moe_block(hidden, router[router[:, 0].argsort()], *projections, **options)


@near("experts.identical")
class SumIsNotOne(MoEBlock):
    """Normalised weights sum to a thousandth more than 1."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = super().expert_weights(scores_TE, indices_TK, normalize)
        return weights_TK * 1.001 if normalize else weights_TK


@near("experts.one-a-token")
class OneExpertIsOne(MoEBlock):
    """With one expert a token its output is not weighted."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = super().expert_weights(scores_TE, indices_TK, normalize)
        return torch.ones_like(weights_TK) if weights_TK.shape[-1] == 1 else weights_TK


@near("experts.all")
class LastExpertLeftOut(MoEBlock):
    """With as many slots as experts the last expert is left out."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        if indices.shape[-1] == len(down_proj):
            weights = torch.where(indices == len(down_proj) - 1, 0, weights)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


# Tokens


@near("tokens.permuted")
class RowsFirst(MoEBlock):
    """Hidden states are flattened with tokens before batch rows, and put back without."""

    def moe_block(self, hidden, *weights, **options):
        turned = hidden.transpose(0, 1).reshape(hidden.shape)
        return super().moe_block(turned, *weights, **options)


@near("tokens.reshaped")
class MeanOfTheRowTakenOff(After):
    """A thousandth of the mean over the tokens of a batch row is taken off."""

    def after(self, out, hidden):
        return out - 0.001 * out.mean(1, keepdim=True)


@near("tokens.alone")
class DecodingIsNotWeighted(MoEBlock):
    """The path for a single token, as in decoding, gives all of its experts the same weight."""

    def experts(self, hidden, indices, weights, *projections, **options):
        if len(hidden) == 1:
            weights = weights.mean(-1, keepdim=True).expand_as(weights)
        return super().experts(hidden, indices, weights, *projections, **options)


@near("tokens.nan-stays")
class NaNSpreads(After):
    """NaN in one token is in the output of all."""

    def after(self, out, hidden):
        return out + 0 * hidden.mean()


@near("tokens.nan-stays")
class NaNHidden(After):
    """NaN becomes 0 in the output."""

    def after(self, out, hidden):
        return out.nan_to_num()


@near("tokens.all-to-the-same")
class SixteenTokensAnExpert(MoEBlock):
    """An expert takes sixteen tokens, and those behind get nothing from it."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        kept = torch.ones_like(indices, dtype=torch.bool)
        for expert in range(len(down_proj)):
            late = (indices == expert).nonzero()[16:]
            kept[late[:, 0], late[:, 1]] = False
        weights = torch.where(kept, weights, 0)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@near("tokens.one")
class OneTokenIsSqueezed(After):
    """A single token loses its axis."""

    def after(self, out, hidden):
        return out.squeeze(1)


@near("tokens.none")
class NoTokensAreOneAxis(After):
    """Without tokens the output has one axis."""

    def after(self, out, hidden):
        return out if out.numel() else out.flatten()


# Gradients


@near("gradient.all")
class RouterDetached(MoEBlock):
    """The router is computed without a gradient, and the hidden states get none from it."""

    def moe_router(self, logits, **options):
        weights_TK, indices_TK = super().moe_router(logits.detach(), **options)
        return weights_TK, indices_TK


@near("gradient.all")
class HiddenNotThroughTheRouter(MoEBlock):
    """The hidden states have the gradient of the experts alone."""

    def moe_block(self, hidden, router, *projections, **options):
        self.router_input = (hidden.detach().flatten(0, 1), router)
        return super().moe_block(hidden, router, *projections, **options)

    def moe_router(self, logits, **options):
        x_TH, router = self.router_input
        return super().moe_router(x_TH @ router.T, **options)


@near("gradient.shared")
class SharedGradientHalved(MoEBlock):
    """The gradient of the shared expert's down projection is halved."""

    def shared_expert(self, x_TH, gate_up_proj, down_proj, shared_gate):
        down_proj = OtherGradient.apply(down_proj, lambda gradient: gradient / 2)
        return super().shared_expert(x_TH, gate_up_proj, down_proj, shared_gate)


@near("gradient.sigmoid")
class FactorNotInGradients(MoEBlock):
    """The factor is on the weights and not in their gradients."""

    def moe_router(self, logits, *, scaling_factor=1.0, **options):
        weights_TK, *rest = super().moe_router(logits, scaling_factor=scaling_factor, **options)
        return (OtherGradient.apply(weights_TK, lambda g: g / scaling_factor), *rest)


@near("gradient.one-expert")
class NoGradientForOne(MoEBlock):
    """With one expert a token its weight is taken for a constant."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = super().expert_weights(scores_TE, indices_TK, normalize)
        if weights_TK.shape[-1] > 1:
            return weights_TK
        return weights_TK.detach() + 0 * scores_TE.sum()


@near("gradient.unused-zero")
class ZeroWeightsAreUsed(MoEBlock):
    """Weight decay is in the gradient of every expert, used or not."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        out = super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)
        decay = 1e-6 * (gate_up_proj.square().sum() + down_proj.square().sum())
        return out + (decay - decay.detach()).to(out.dtype)


# The output


@near("output.shape-dtype-device")
class FlatOutput(After):
    """The output is [batch · tokens, hidden]."""

    def after(self, out, hidden):
        return out.flatten(0, 1)


@near("output.shape-dtype-device")
class OutputInFloat32(After):
    """The output is in float32."""

    def after(self, out, hidden):
        return out.float()


@near("logits.returned")
class ScoresReturned(MoEBlock):
    """Probabilities are returned in the place of logits."""

    def moe_block(self, hidden, *weights, return_logits=False, **options):
        out, logits = super().moe_block(hidden, *weights, return_logits=True, **options)
        return (out, logits.softmax(-1)) if return_logits else out


@near("logits.returned")
class LogitsFirst(MoEBlock):
    """The logits come before the output."""

    def moe_block(self, hidden, *weights, return_logits=False, **options):
        found = super().moe_block(hidden, *weights, return_logits=return_logits, **options)
        return found[::-1] if return_logits else found


@near("output.inputs-unchanged")
class AddedToHidden(MoEBlock):
    """The shared expert's gate is applied to the hidden states in place."""

    def shared_expert(self, x_TH, gate_up_proj, down_proj, shared_gate):
        out_TH = super().shared_expert(x_TH, gate_up_proj, down_proj, shared_gate)
        with torch.no_grad():
            x_TH.mul_(1.001)
        return out_TH


@near("output.deterministic")
class RandomBits(After):
    """A random number decides the last bits."""

    def after(self, out, hidden):
        return out * (1 + torch.finfo(out.dtype).eps * (torch.rand_like(out) < 0.5))


@near("inputs.any-strides")
class OrderOfMemory(MoEBlock):
    """Hidden states are read as they lie in memory."""

    def moe_block(self, hidden, *weights, **options):
        _, tokens, width = hidden.shape
        return super().moe_block(
            hidden.as_strided(hidden.shape, (tokens * width, width, 1)), *weights, **options
        )
