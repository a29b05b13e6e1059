"""Documented bugs of the contract ``experts``."""

from __future__ import annotations

import torch

from conformance.known_bugs import known_bug
from reference_impl.moe.experts import BatchedExperts, Experts, GroupedExperts

# Where the weight goes


@known_bug(
    "moe-weight-on-input-vs-output",
    contract="experts",
    breaks="experts.weights.on-the-output",
)
class WeightOnInput(Experts):
    """Weights are always on the input of the experts, which are not linear."""

    def experts(self, *tensors, weight_on_input=False, **options):
        return super().experts(*tensors, weight_on_input=True, **options)


@known_bug(
    "moe-weight-on-input-vs-output.always-output",
    contract="experts",
    breaks="experts.weights.on-the-input",
)
class WeightOnOutput(Experts):
    """Weights are on the output, also where a model has them on the input."""

    def experts(self, *tensors, weight_on_input=False, **options):
        return super().experts(*tensors, **options)


@known_bug(
    "moe-weight-on-input-vs-output.twice",
    contract="experts",
    breaks="experts.weights.on-the-input",
)
class WeightTwice(Experts):
    """Weights on the input are on the output as well."""

    def experts(self, hidden, indices, weights, *projections, weight_on_input=False, **options):
        if not weight_on_input:
            return super().experts(hidden, indices, weights, *projections, **options)
        out_TH = torch.zeros_like(hidden)
        for slot in range(indices.shape[1]):
            one = (hidden, indices[:, slot, None], weights[:, slot, None])
            out = super().experts(*one, *projections, weight_on_input=True, **options)
            real = indices[:, slot, None] < len(projections[1])
            out_TH = out_TH + torch.where(real, out * weights[:, slot, None], 0).to(hidden.dtype)
        return out_TH


@known_bug(
    "moe-weight-on-input-vs-output.never",
    contract="experts",
    breaks="experts.weights.on-the-output",
)
class WeightNever(Experts):
    """Weights choose experts, and are not multiplied."""

    def weighted(self, x_PH, weights_P1):
        return super().weighted(x_PH, weights_P1 / weights_P1.detach())


# Layouts


def guessed(tensor, shape):
    """The tensor with its last axes exchanged only if it does not have this shape as it is."""
    return tensor if tuple(tensor.shape[1:]) == shape else tensor.mT


class _GuessesLayout(Experts):
    """Takes transposed weights apart by their shapes."""

    guesses_gate_up = guesses_down = True

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, *, transposed=False, **o):
        if transposed:
            width, intermediate = hidden.shape[1], down_proj.shape[1]
            gate_up_proj = (
                guessed(gate_up_proj, (2 * intermediate, width))
                if self.guesses_gate_up
                else gate_up_proj.mT
            )
            down_proj = (
                guessed(down_proj, (width, intermediate)) if self.guesses_down else down_proj.mT
            )
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **o)


@known_bug(
    "moe-fused-expert-transpose-by-shape",
    contract="experts",
    breaks="experts.layout.half-square-transposed",
)
class GuessesGateUp(_GuessesLayout):
    """Gate and up are transposed only if their shape is not what it should be: not if square."""

    guesses_down = False


@known_bug(
    "moe-fused-expert-transpose-by-shape.down",
    contract="experts",
    breaks="experts.layout.square-transposed",
)
class GuessesDown(_GuessesLayout):
    """Down is transposed only if its shape is not what it should be: not if square."""

    guesses_gate_up = False


@known_bug(
    "moe-fused-expert-transpose-by-shape.square",
    contract="experts",
    breaks="experts.layout.square",
)
class TakesSquareForTransposed(Experts):
    """A square down projection is taken for one that is stored the other way."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        if down_proj.shape[1] == down_proj.shape[2]:
            down_proj = down_proj.mT
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@known_bug(
    "moe-fused-expert-transpose-by-shape.half-square",
    contract="experts",
    breaks="experts.layout.half-square",
)
class TakesHalfSquareForTransposed(Experts):
    """Square gate and up projections are taken for ones that are stored the other way."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        if gate_up_proj.shape[1] == gate_up_proj.shape[2]:
            gate_up_proj = gate_up_proj.mT
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@known_bug(
    "moe-fused-expert-transpose-by-shape.twice",
    contract="experts",
    breaks="experts.layout.half-square-transposed",
)
class TransposedTwice(Experts):
    """A loop over gate and up transposes what both are parts of, and so up twice, where it fits."""

    def gate_and_up(self, gate_up_proj, layout):
        gate_EIH, up_EIH = super().gate_and_up(gate_up_proj, layout)
        if gate_up_proj.shape[1] == gate_up_proj.shape[2]:
            _, up_EIH = super().gate_and_up(gate_up_proj.mT, layout)
        return gate_EIH, up_EIH


@known_bug(
    "moe-gate-up-order-or-interleave",
    contract="experts",
    breaks="experts.layout.concatenated",
)
class UpFirst(Experts):
    """The first half of the rows is taken for up, the second for the gate."""

    def gate_and_up(self, gate_up_proj, layout):
        gate_EIH, up_EIH = super().gate_and_up(gate_up_proj, layout)
        return (up_EIH, gate_EIH) if layout == "concatenated" else (gate_EIH, up_EIH)


@known_bug(
    "moe-gate-up-order-or-interleave.up-first-interleaved",
    contract="experts",
    breaks="experts.layout.interleaved",
)
class UpFirstInterleaved(Experts):
    """Interleaved rows are taken for u₀, g₀, u₁, g₁ …"""

    def gate_and_up(self, gate_up_proj, layout):
        gate_EIH, up_EIH = super().gate_and_up(gate_up_proj, layout)
        return (up_EIH, gate_EIH) if layout == "interleaved" else (gate_EIH, up_EIH)


@known_bug(
    "moe-gate-up-order-or-interleave.as-concatenated",
    contract="experts",
    breaks="experts.layout.interleaved",
)
class ReadsInterleavedAsConcatenated(Experts):
    """Interleaved rows are read as two halves."""

    def gate_and_up(self, gate_up_proj, layout):
        return super().gate_and_up(gate_up_proj, "concatenated")


@known_bug(
    "moe-gate-up-order-or-interleave.as-interleaved",
    contract="experts",
    breaks="experts.layout.concatenated",
)
class ReadsConcatenatedAsInterleaved(Experts):
    """Concatenated rows are read as gate and up in turn."""

    def gate_and_up(self, gate_up_proj, layout):
        return super().gate_and_up(gate_up_proj, "interleaved")


# Which expert


def lexicographic(number):
    """Numbers of experts in the order of their names: 0, 1, 10, 11, 2 …"""
    return sorted(range(number), key=str)


@known_bug(
    "moe-expert-index-substring-slot",
    contract="experts",
    breaks="experts.index.tagged",
)
class OrderOfNames(Experts):
    """Experts are stacked in the order of their names as text."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        order = lexicographic(len(down_proj))
        if len(gate_up_proj) == len(down_proj):
            gate_up_proj = gate_up_proj[order]
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj[order], **options)


@known_bug(
    "moe-expert-index-substring-slot.down",
    contract="experts",
    breaks="experts.index.more-than-ten",
)
class OrderOfNamesDown(Experts):
    """The gate and up projections alone are in the order of their names."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        if len(gate_up_proj) == len(down_proj):
            gate_up_proj = gate_up_proj[lexicographic(len(down_proj))]
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@known_bug(
    "moe-expert-index-substring-slot.substring",
    contract="experts",
    breaks="experts.index.tagged",
)
class Substring(Experts):
    """Expert 1 is stored wherever "experts.1" is part of the name: in 10 to 19 as well."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        taken = [int(str(e)[0]) if 10 <= e < 20 else e for e in range(len(down_proj))]
        if len(gate_up_proj) == len(down_proj):
            gate_up_proj = gate_up_proj[taken]
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj[taken], **options)


# Memory that nothing was written to


class _SkipsEmptyGroups(torch.autograd.Function):
    """Rows times the matrix of each group, into memory that is not cleared."""

    @staticmethod
    def forward(ctx, x_PN, weight_EMN, sizes):
        ctx.save_for_backward(x_PN, weight_EMN)
        ctx.sizes = sizes
        parts = [x @ w.T for x, w in zip(x_PN.split(sizes), weight_EMN)]
        return torch.cat(parts) if parts else x_PN.new_empty(0, weight_EMN.shape[1])

    @staticmethod
    def backward(ctx, gradient_PM):
        x_PN, weight_EMN = ctx.saved_tensors
        gradient_PN, gradient_EMN = torch.empty_like(x_PN), torch.empty_like(weight_EMN)
        begin = 0
        for expert, size in enumerate(ctx.sizes):
            if not size:
                continue
            rows = slice(begin, begin + size)
            gradient_PN[rows] = gradient_PM[rows] @ weight_EMN[expert]
            gradient_EMN[expert] = gradient_PM[rows].T @ x_PN[rows]
            begin += size
        return gradient_PN, gradient_EMN, None


@known_bug(
    "moe-empty-expert-uninitialised",
    contract="experts",
    breaks="experts.empty.gradients",
)
class EmptyGroupsOfWeights(GroupedExperts):
    """The weight gradient of an expert without tokens is what memory held."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        order = experts_P.argsort(stable=True)
        sizes = experts_P.bincount(minlength=len(down_EHI)).tolist()
        x_PH = x_PH[order]
        gate_PI, up_PI = (_SkipsEmptyGroups.apply(x_PH, w, sizes) for w in (gate_EIH, up_EIH))
        out_PH = _SkipsEmptyGroups.apply(activation(gate_PI) * up_PI, down_EHI, sizes)
        return out_PH[order.argsort()]


@known_bug(
    "moe-empty-expert-uninitialised.output",
    contract="experts",
    breaks="experts.sentinel.whole-token",
)
class OutputNotCleared(Experts):
    """Rows of the output that no expert writes to are what memory held."""

    def sum_slots(self, out_PH, tokens_P, hidden):
        out_TH = super().sum_slots(out_PH, tokens_P, hidden)
        reached_T1 = torch.zeros(len(hidden), 1, dtype=torch.bool, device=hidden.device)
        reached_T1[tokens_P] = True
        return torch.where(reached_T1, out_TH, torch.empty_like(out_TH))


@known_bug(
    "moe-empty-expert-uninitialised.mean-of-nothing",
    contract="experts",
    breaks="experts.empty.gradients",
)
class MeanOfNothing(Experts):
    """Inputs have one scale, from the mean over each expert's tokens: NaN for an expert with none."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        sizes_E = [x_PH[experts_P == e].detach().abs().mean() for e in range(len(down_EHI))]
        scale = torch.stack(sizes_E).max().log2().round().exp2()
        x_PH = x_PH / scale * scale
        return super().through_experts(x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation)


@known_bug(
    "moe-empty-expert-uninitialised.none",
    contract="experts",
    breaks="experts.empty.connected",
)
class NothingIsNotConnected(Experts):
    """Without any token the output is made anew, and gradients are None."""

    def sum_slots(self, out_PH, tokens_P, hidden):
        if not len(tokens_P):
            return hidden.new_zeros(hidden.shape)
        return super().sum_slots(out_PH, tokens_P, hidden)


# Masked slots


class _Masks(BatchedExperts):
    """Slots without an expert go through the last one, and are taken out again."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        number = len(down_proj)
        real = indices != number
        if not real.all():
            indices = torch.where(real, indices, number - 1)
            weights = self.masked(weights, real)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)

    def masked(self, weights, real):
        """Weights of zero where there is no expert."""
        return weights.masked_fill(~real, 0)


@known_bug(
    "moe-masked-row-nan-times-zero",
    contract="experts",
    breaks="experts.sentinel.any-token",
)
class MasksByZeroWeights(_Masks):
    """Slots without an expert are computed and multiplied by a weight of 0: NaN stays NaN."""


@known_bug(
    "moe-masked-row-nan-times-zero.weight",
    contract="experts",
    breaks="experts.sentinel.any-weight",
)
class MultipliesByTheMask(_Masks):
    """The mask is multiplied into the weights, of which some may be NaN or infinite."""

    def masked(self, weights, real):
        return weights * real


@known_bug(
    "moe-masked-row-nan-times-zero.backward",
    contract="experts",
    breaks="experts.sentinel.any-token-gradients",
)
class MasksTheOutputAlone(Experts):
    """What slots without an expert give is replaced by 0, and its backward pass goes through NaN."""

    masks_weights = True

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        number = len(down_proj)
        if bool((indices < number).all()):
            return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)
        out_TH = torch.zeros_like(hidden)
        for slot in range(indices.shape[1]):
            index_T1, weight_T1 = indices[:, slot, None], weights[:, slot, None]
            real_T1 = index_T1 != number
            if self.masks_weights:
                weight_T1 = torch.where(real_T1, weight_T1, 0)
            one = (hidden, torch.where(real_T1, index_T1, 0), weight_T1)
            out = super().experts(*one, gate_up_proj, down_proj, **options)
            out_TH = out_TH + torch.where(real_T1, out, 0)
        return out_TH


@known_bug(
    "moe-masked-row-nan-times-zero.weight-backward",
    contract="experts",
    breaks="experts.sentinel.any-weight-gradients",
)
class MasksTheProductAlone(MasksTheOutputAlone):
    """The same behind weights of NaN, which the gradient of 0 is multiplied by."""

    masks_weights = False


# Several slots of a token


@known_bug(
    "moe-combine-duplicate-index-overwrite",
    contract="experts",
    breaks="experts.slots.sum",
)
class Overwrites(Experts):
    """What experts give is written to a token's row and not added: the last one stays."""

    def sum_slots(self, out_PH, tokens_P, hidden):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        out_TH = out_PH.new_zeros(hidden.shape, dtype=wide)
        return out_TH.index_put((tokens_P,), out_PH.to(wide)).to(hidden.dtype)


@known_bug(
    "moe-combine-duplicate-index-overwrite.first",
    contract="experts",
    breaks="experts.slots.sum",
)
class FirstWins(Experts):
    """A token has what its first slot gives."""

    def sum_slots(self, out_PH, tokens_P, hidden):
        first_P = torch.ones_like(tokens_P, dtype=torch.bool)
        first_P[1:] = tokens_P[1:] != tokens_P[:-1]
        return super().sum_slots(out_PH[first_P], tokens_P[first_P], hidden)


@known_bug(
    "moe-combine-duplicate-index-overwrite.counted-once",
    contract="experts",
    breaks="experts.slots.repeated",
)
class RepeatedCountOnce(Experts):
    """A mask of experts for each token has one place for an expert: the last slot's weight."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        if indices.shape == weights.shape and indices.ndim == 2:
            later = torch.ones(2 * indices.shape[1:], dtype=torch.bool, device=indices.device)
            again = indices[:, :, None] == indices[:, None, :]
            repeated = (again & later.triu(1)).any(-1)
            indices = torch.where(repeated, len(down_proj), indices)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@known_bug(
    "moe-combine-duplicate-index-overwrite.gradient",
    contract="experts",
    breaks="experts.slots.repeated-gradients",
)
class RepeatedGradientOnce(Experts):
    """The backward pass of the gather overwrites: a token has the gradient of one slot."""

    def through_experts(self, x_PH, experts_P, *weights):
        out_PH = super().through_experts(x_PH, experts_P, *weights)
        again_P = (x_PH[1:] == x_PH[:-1]).all(-1) & (experts_P[1:] == experts_P[:-1])
        again_P = torch.cat([again_P.new_zeros(1), again_P])[: len(x_PH)]
        return torch.where(again_P[:, None], out_PH.detach(), out_PH)


# Own entries: defects of programs that group tokens


@known_bug(
    "experts-weight-by-expert-number",
    contract="experts",
    breaks="experts.slots.sum",
)
class WeightByExpertNumber(Experts):
    """A token's weights are looked up by the number of the expert and not by the slot."""

    def experts(self, hidden, indices, weights, *projections, **options):
        if weights.shape == indices.shape and weights.shape[1]:
            weights = weights.gather(1, indices % weights.shape[1])
        return super().experts(hidden, indices, weights, *projections, **options)


@known_bug(
    "experts-sum-in-16-bits",
    contract="experts",
    breaks="experts.slots.many",
)
class SumsIn16Bits(Experts):
    """Slots are added up one after another in the dtype of the output."""

    def sum_slots(self, out_PH, tokens_P, hidden):
        rows = list(hidden.new_zeros(hidden.shape).unbind() if len(hidden) else ())
        for token, row in zip(tokens_P.tolist(), out_PH.to(hidden.dtype)):
            rows[token] = rows[token] + row
        return torch.stack(rows) if rows else super().sum_slots(out_PH, tokens_P, hidden)


@known_bug(
    "experts-activation-on-up",
    contract="experts",
    breaks="experts.activation.on-the-gate",
)
class ActivationOnUp(Experts):
    """The activation is that of up, and the gate is multiplied as it is."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, *rest):
        return super().through_experts(x_PH, experts_P, up_EIH, gate_EIH, *rest)


class _OtherActivation(Experts):
    """Has another activation in place of one."""

    asked = given = ""

    def experts(self, *tensors, activation="silu", **options):
        activation = self.given if activation == self.asked else activation
        return super().experts(*tensors, activation=activation, **options)


@known_bug(
    "experts-gelu-variant",
    contract="experts",
    breaks="experts.activation.gelu",
)
class GeluIsTanh(_OtherActivation):
    """``"gelu"`` is computed by the approximation."""

    asked, given = "gelu", "gelu_tanh"


@known_bug(
    "experts-gelu-variant.exact",
    contract="experts",
    breaks="experts.activation.gelu-tanh",
)
class GeluTanhIsExact(_OtherActivation):
    """``"gelu_tanh"`` is computed with the error function."""

    asked, given = "gelu_tanh", "gelu"


@known_bug(
    "experts-gelu-variant.silu",
    contract="experts",
    breaks="experts.activation.relu",
)
class AlwaysSilu(_OtherActivation):
    """``"relu"`` is ignored: the kernel knows SiLU."""

    asked, given = "relu", "silu"


@known_bug(
    "experts-sentinel-off-by-one",
    contract="experts",
    breaks="experts.sentinel.last-expert",
)
class LastExpertIsTheSentinel(Experts):
    """The last expert is taken for the mark of a slot without one."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        number = len(down_proj)
        indices = torch.where(indices == number - 1, number, indices)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@known_bug(
    "experts-sentinel-off-by-one.clamped",
    contract="experts",
    breaks="experts.sentinel.adds-nothing",
)
class SentinelIsTheLastExpert(Experts):
    """The mark of a slot without an expert is clamped to the last expert, and its weight stays."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        number = len(down_proj)
        indices = torch.where(indices == number, number - 1, indices)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@known_bug(
    "experts-sentinel-off-by-one.negative",
    contract="experts",
    breaks="experts.refuses.negative-index",
)
class NegativeCountsFromTheEnd(Experts):
    """An index of -1, the mark of other programs, is the last expert: Python counts so."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        indices = torch.where(indices < 0, indices + len(down_proj), indices)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@known_bug(
    "experts-sentinel-off-by-one.dropped",
    contract="experts",
    breaks="experts.refuses.index-beyond",
)
class DropsWhatIsOutOfRange(Experts):
    """Whatever is above the number of experts is dropped without a word."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        indices = indices.clamp(max=len(down_proj))
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@known_bug(
    "experts-groups-unsorted",
    contract="experts",
    breaks="experts.tokens.many",
)
class GroupsUnsorted(GroupedExperts):
    """Groups are counted, and rows are not sorted by expert."""

    def through_experts(self, x_PH, experts_P, *weights):
        return super().through_experts(x_PH, experts_P.sort().values, *weights)


@known_bug(
    "experts-groups-unsorted.not-put-back",
    contract="experts",
    breaks="experts.tokens.many",
)
class NotPutBack(GroupedExperts):
    """Rows are sorted by expert, and what they give stays in that order."""

    def through_experts(self, x_PH, experts_P, *weights):
        out_PH = super().through_experts(x_PH, experts_P, *weights)
        return out_PH[experts_P.argsort(stable=True)]


@known_bug(
    "experts-groups-unsorted.permuted-twice",
    contract="experts",
    breaks="experts.tokens.many",
)
class PermutedTwice(GroupedExperts):
    """Rows are put back by the permutation that sorted them, not by its inverse."""

    def through_experts(self, x_PH, experts_P, *weights):
        order = experts_P.argsort(stable=True)
        return super().through_experts(x_PH, experts_P, *weights)[order][order]


@known_bug(
    "experts-groups-unsorted.weights",
    contract="experts",
    breaks="experts.forward.bits",
)
class WeightsNotSorted(Experts):
    """Rows are sorted by expert, and their weights are not."""

    def experts(self, hidden, indices, weights, *projections, **options):
        self.order = None
        if indices.shape == weights.shape and bool((indices < len(projections[1])).all()):
            self.order = indices.flatten().argsort(stable=True)
        return super().experts(hidden, indices, weights, *projections, **options)

    def weighted(self, x_PH, weights_P1):
        if self.order is not None:
            weights_P1 = weights_P1[self.order.argsort()]
        return super().weighted(x_PH, weights_P1)


@known_bug(
    "experts-groups-unsorted.narrow-offsets",
    contract="experts",
    breaks="experts.tokens.many",
)
class NarrowOffsets(GroupedExperts):
    """Ends of groups are kept in 8 bits: pairs beyond the 256th are skipped."""

    def through_experts(self, x_PH, experts_P, *weights):
        out_PH = super().through_experts(x_PH, experts_P, *weights)
        place_P = experts_P.argsort(stable=True).argsort()
        return torch.where((place_P < 256)[:, None], out_PH, 0)
