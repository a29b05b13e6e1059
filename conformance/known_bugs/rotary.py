"""Documented bugs of rotary embedding, and of the modules that hold it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conformance.known_bugs import known_bug
from reference_impl.rotary import (
    Rotary,
    RotaryModule,
    default_frequencies,
    join_pairs,
    split_pairs,
    yarn_mscale,
)


@known_bug("rope-pair-layout-mismatch", contract="rotary", breaks="rotary.pairs.half")
class InterleavedForHalf(Rotary):
    """Rotates channels 2p and 2p + 1 where the weights have p and p + P as a pair."""

    def rotate(self, x_BHTR, cos, sin, layout):
        return super().rotate(x_BHTR, cos, sin, "interleaved" if layout == "half" else layout)


@known_bug(
    "rope-pair-layout-mismatch.reverse", contract="rotary", breaks="rotary.pairs.interleaved"
)
class HalfForInterleaved(Rotary):
    """Rotates channels p and p + P where the weights have 2p and 2p + 1 as a pair."""

    def rotate(self, x_BHTR, cos, sin, layout):
        return super().rotate(x_BHTR, cos, sin, "half" if layout == "interleaved" else layout)


@known_bug("rope-positions-low-precision", contract="rotary", breaks="rotary.positions.far")
class PositionsInModelDtype(Rotary):
    """Positions are held in the dtype of x: bfloat16 counts to 256, float16 to 2048."""

    def angles(self, x, positions, frequencies_P):
        return super().angles(x, positions.to(x.dtype), frequencies_P)


@known_bug("rope-positions-low-precision.angles", contract="rotary", breaks="rotary.positions.far")
class AnglesInModelDtype(Rotary):
    """Positions are integers, their product with the frequencies is rounded to the dtype of x."""

    def angles(self, x, positions, frequencies_P):
        return super().angles(x, positions, frequencies_P).to(x.dtype).double()


@known_bug(
    "rope-positions-low-precision.frequencies", contract="rotary", breaks="rotary.positions.far"
)
class FrequenciesInModelDtype(Rotary):
    """The frequencies were cast with the model to the dtype of x."""

    def angles(self, x, positions, frequencies_P):
        return super().angles(x, positions, frequencies_P.to(x.dtype).double())


@known_bug("rope-applied-over-head-axis", contract="rotary", breaks="rotary.heads.alike")
class IndexedByHead(Rotary):
    """The tables are indexed by head: every token of a head turns by the same angle."""

    def tables(self, x, positions, frequencies_P, attention_factor):
        heads = torch.arange(x.shape[1], device=x.device)[None]
        cos_11HP, sin_11HP = super().tables(x, heads, frequencies_P, attention_factor)
        shape = (positions.shape[0], -1, positions.shape[1], -1)
        return tuple(t.transpose(1, 2).expand(shape) for t in (cos_11HP, sin_11HP))


@known_bug(
    "rope-applied-over-head-axis.scaling-length",
    contract="rotary",
    breaks="rotary.dynamic.beyond-trained-length",
)
class HeadsAsLength(Rotary):
    """Dynamic scaling takes the number of heads for the length of the sequence."""

    def length(self, x, positions):
        return x.shape[1]


@known_bug("rope-theta-ignored", contract="rotary", breaks="rotary.theta.configured")
class ThetaIgnored(Rotary):
    """theta is 10000 whatever the configuration says."""

    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        return super().frequencies(rotary_dim, 10000.0, layout, scaling, length)


@known_bug("rope-theta-ignored.layers", contract="rotary", breaks="rotary.layers.theta")
class ThetaOfLayersIgnored(Rotary):
    """theta inside the tables of the layer types is not read."""

    def layer_options(self, layers, layer_type):
        options = super().layer_options(layers, layer_type)
        return None if options is None else {**options, "theta": 10000.0}


@known_bug("rope-linear-scaling-ignored", contract="rotary", breaks="rotary.linear.frequencies")
class LinearIgnored(Rotary):
    """rope_type "linear" is parsed and not applied."""

    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        if scaling is not None and scaling["rope_type"] == "linear":
            scaling = None
        return super().frequencies(rotary_dim, theta, layout, scaling, length)


@known_bug(
    "rope-linear-scaling-ignored.multiplies",
    contract="rotary",
    breaks="rotary.linear.divides-positions",
)
class LinearMultiplies(Rotary):
    """Linear scaling multiplies positions by the factor instead of dividing them."""

    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        if scaling is not None and scaling["rope_type"] == "linear":
            scaling = {**scaling, "factor": 1 / scaling["factor"]}
        return super().frequencies(rotary_dim, theta, layout, scaling, length)


@known_bug(
    "rope-linear-scaling-ignored.default-two", contract="rotary", breaks="rotary.layout.half"
)
class DoubledWithoutScaling(Rotary):
    """Without a scaling table, a default factor of 2 doubles every position."""

    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        frequencies, factor = super().frequencies(rotary_dim, theta, layout, scaling, length)
        return frequencies * (2 if scaling is None else 1), factor


@known_bug("rope-scaling-on-local-layers", contract="rotary", breaks="rotary.layers.scaling")
class ScalingForAllLayers(Rotary):
    """Each layer has its theta, and all have the scaling of the layers that are scaled."""

    def layer_options(self, layers, layer_type):
        options = super().layer_options(layers, layer_type)
        tables = [table for table in layers.values() if table is not None]
        scaling = next((table["scaling"] for table in tables if table.get("scaling")), None)
        return None if options is None else {**options, "scaling": scaling}


@known_bug(
    "rope-scaling-on-local-layers.one-table", contract="rotary", breaks="rotary.layers.permuted"
)
class OneTable(Rotary):
    """All layers share one table, those that must not rotate too."""

    def layer_options(self, layers, layer_type):
        return next(table for table in layers.values() if table is not None)


@known_bug("rope-ntk-not-reset", contract="rotary", breaks="rotary.dynamic.stateless")
class LongestLengthKept(Rotary):
    """The table of the longest call so far is used for shorter calls after it."""

    longest = 0

    def length(self, x, positions):
        self.longest = max(self.longest, super().length(x, positions))
        return self.longest


@known_bug("rope-ntk-not-reset.longrope", contract="rotary", breaks="rotary.longrope.stateless")
class LongFactorsKept(LongestLengthKept):
    """After one long call, LongRoPE keeps the long divisors for short calls too."""

    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        if scaling is None or scaling["rope_type"] != "longrope":
            length = 0
        return super().frequencies(rotary_dim, theta, layout, scaling, length)


class _YarnScaling(Rotary):
    """Changes what a YaRN table says before it is used."""

    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        if scaling is not None and scaling["rope_type"] == "yarn":
            scaling = self.misread(scaling, length)
        return super().frequencies(rotary_dim, theta, layout, scaling, length)


@known_bug(
    "rope-yarn-attention-factor-ignored",
    contract="rotary",
    breaks="rotary.yarn.attention-factor-given",
)
class AttentionFactorDropped(_YarnScaling):
    """attention_factor is filtered out of the table; 0.1 ln(factor) + 1 is used."""

    def misread(self, scaling, length):
        return {name: value for name, value in scaling.items() if name != "attention_factor"}


@known_bug(
    "rope-yarn-attention-factor-ignored.log-again",
    contract="rotary",
    breaks="rotary.yarn.attention-factor-given",
)
class AttentionFactorAsFactor(_YarnScaling):
    """The attention_factor that is given is put through the logarithm once more."""

    def misread(self, scaling, length):
        given = scaling.get("attention_factor")
        return scaling if given is None else {**scaling, "attention_factor": yarn_mscale(given)}


@known_bug(
    "rope-yarn-attention-factor-ignored.factor-replaced",
    contract="rotary",
    breaks="rotary.yarn.factor-given",
)
class FactorFromLengths(_YarnScaling):
    """factor is replaced by a maximum length over the trained one wherever the latter is set."""

    def misread(self, scaling, length):
        trained = scaling["original_max_position_embeddings"]
        return {**scaling, "factor": max(32768, length) / trained}


@known_bug(
    "rope-yarn-attention-factor-ignored.mscale",
    contract="rotary",
    breaks="rotary.yarn.mscale-ratio",
)
class MscaleDropped(_YarnScaling):
    """mscale and mscale_all_dim do not reach the factor on cos and sin."""

    def misread(self, scaling, length):
        return {name: value for name, value in scaling.items() if not name.startswith("mscale")}


@known_bug(
    "rope-yarn-attention-factor-ignored.truncate",
    contract="rotary",
    breaks="rotary.yarn.truncate-off",
)
class TruncateDropped(_YarnScaling):
    """truncate is filtered out of the table; the ramp is always rounded to whole pairs."""

    def misread(self, scaling, length):
        return {**scaling, "truncate": True}


@known_bug("rope-partial-ignored", contract="rotary", breaks="rotary.partial.every-scaling")
class PartialIgnoredWhenScaled(Rotary):
    """The code path of scaled embeddings has no rotary_dim and rotates the whole head."""

    def rotary(self, x, positions, *, rotary_dim=None, scaling=None, **options):
        plain = scaling is None or scaling["rope_type"] == "longrope"  # its divisors would not fit
        rotary_dim = rotary_dim if plain else None
        return super().rotary(x, positions, rotary_dim=rotary_dim, scaling=scaling, **options)


@known_bug("rope-partial-ignored.layout", contract="rotary", breaks="rotary.partial.every-layout")
class PartialIgnoredWhenInterleaved(Rotary):
    """The code path of interleaved pairs has no rotary_dim and rotates the whole head."""

    def rotary(self, x, positions, *, rotary_dim=None, layout="half", scaling=None, **options):
        if layout.startswith("interleaved") and scaling is None:
            rotary_dim = None
        options |= {"rotary_dim": rotary_dim, "layout": layout, "scaling": scaling}
        return super().rotary(x, positions, **options)


@known_bug(
    "rope-partial-ignored.head-width", contract="rotary", breaks="rotary.partial.frequencies"
)
class FrequenciesOfTheHead(Rotary):
    """The rotated channels have the first frequencies of the whole head, not their own."""

    def rotary(self, x, positions, **options):
        self.head_dim = x.shape[-1]
        return super().rotary(x, positions, **options)

    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        if layout != "half-truncated" and scaling is None:
            return default_frequencies(self.head_dim, theta)[: rotary_dim // 2], 1.0
        return super().frequencies(rotary_dim, theta, layout, scaling, length)


@known_bug(
    "rope-left-pad-shared-positions", contract="rotary", breaks="rotary.positions.left-padded"
)
class PositionsOfFirstRow(Rotary):
    """All rows share one counter: the positions of the first row are used for every row."""

    def positions(self, x, positions):
        return positions[:1]


@known_bug(
    "rope-left-pad-shared-positions.slots",
    contract="rotary",
    breaks="rotary.positions.left-padded",
)
class PositionsAreSlots(Rotary):
    """Tokens are counted from 0 by their place in the batch; the positions given are not read."""

    def positions(self, x, positions):
        return torch.arange(x.shape[2], device=x.device)[None]


@known_bug("rope-decode-position-zero.slice", contract="rotary", breaks="rotary.positions.offset")
class ChunkFromZero(Rotary):
    """A chunk of consecutive tokens is rotated from position 0, wherever it begins."""

    def positions(self, x, positions):
        return positions - positions[:, :1].clamp(min=0)


class _WrongAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, cos, sin):
        ctx.save_for_backward(cos, sin)
        return first * cos - second * sin, second * cos + first * sin

    @staticmethod
    def backward(ctx, first, second):
        cos, sin = ctx.saved_tensors
        return first * cos - second * sin, second * cos + first * sin, None, None


@known_bug("rope-backward-formula", contract="rotary", breaks="rotary.gradient.x")
class BackwardSameWay(Rotary):
    """The backward pass turns the gradient the same way as x: sin is not negated.

    The entry's other formula, g cos - rot(g) sin for g cos - rot(g sin), is the same function here:
    both channels of a pair have the same sin.
    """

    def rotate(self, x_BHTR, cos, sin, layout):
        sin = -sin if layout == "half-truncated" else sin
        first, second = split_pairs(x_BHTR.to(cos.dtype), layout)
        return join_pairs(*_WrongAdjoint.apply(first, second, cos, sin), layout).to(x_BHTR.dtype)


@known_bug("rope-backward-formula.none", contract="rotary", breaks="rotary.gradient.x")
class NoBackward(Rotary):
    """The fused operation has no backward pass: no gradient reaches x."""

    def rotary(self, x, positions, **options):
        return super().rotary(x.detach(), positions, **options)


@known_bug("rope-backward-formula.in-place", contract="rotary", breaks="rotary.inputs.unchanged")
class RotatesInPlace(Rotary):
    """x itself is rotated, so that a recomputation in the backward pass rotates it twice."""

    def rotary(self, x, positions, **options):
        out = super().rotary(x, positions, **options)
        if 0 not in x.stride():
            x.data.copy_(out.data)
        return out


class _TableModule(nn.Module):
    """A rotary module that keeps its frequencies in a buffer, as most models do."""

    def __init__(self, head_dim: int, *, rotary_dim=None, theta=10000.0, **options) -> None:
        super().__init__()
        self.width = head_dim if rotary_dim is None else rotary_dim
        self.theta, self.options = theta, options
        self.register_buffer("inv_freq", self.compute(), persistent=self.persistent)

    persistent = False

    def compute(self) -> Tensor:
        return 1.0 / self.theta ** (torch.arange(0, self.width, 2).float() / self.width)

    def reset_parameters(self) -> None:
        self.inv_freq = self.compute()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        module = self

        class Steps(Rotary):
            def angles(self, x, positions, frequencies_P):
                return module.angles(positions, frequencies_P)

        return Steps().rotary(x, positions, rotary_dim=self.width, theta=self.theta, **self.options)

    def angles(self, positions: Tensor, frequencies_P: Tensor) -> Tensor:
        if self.options.get("scaling") or self.options.get("layout") == "half-truncated":
            return positions[..., None] * frequencies_P
        return positions.to(self.inv_freq.dtype)[..., None] * self.inv_freq


class _Modules:
    """An adapter that makes modules of one class."""

    module: type[nn.Module]

    def rotary_module(self, head_dim, **options):
        return self.module(head_dim, **options)


class _Float32Table(_TableModule):
    """Keeps its buffer in float32 through a cast, and so is right where it is not changed."""

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if not self.inv_freq.is_meta and self.inv_freq.dtype != torch.float32:
            self.inv_freq = self.compute()
        return self


class _RenamedTable(_Float32Table):
    """Looks for its buffer by a name that it no longer has."""

    def reset_parameters(self) -> None:
        if hasattr(self, "inv_frequencies"):
            self.inv_frequencies = self.compute()


@known_bug(
    "rope-inv-freq-meta-garbage", contract="rotary_module", breaks="rotary_module.meta.restored"
)
class NotRestored(_Modules):
    """The non-persistent inv_freq is not computed again after construction on the meta device."""

    module = _RenamedTable


@known_bug(
    "rope-positions-low-precision.cast-module",
    contract="rotary_module",
    breaks="rotary_module.cast.far-positions",
)
class CastWithTheModel(_Modules):
    """inv_freq is cast with the model, and positions take its dtype."""

    module = _TableModule


class _PersistentTable(_TableModule):
    """Keeps its buffer in the state, and uses what it loads."""

    persistent = True

    def forward(self, x, positions):
        if not getattr(self, "loaded", False):
            self.inv_freq = self.compute()
        return super().forward(x, positions)

    def angles(self, positions, frequencies_P):
        return positions.double()[..., None] * self.inv_freq.double()

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded = True


@known_bug(
    "rope-positions-low-precision.checkpoint",
    contract="rotary_module",
    breaks="rotary_module.state.round-trip",
)
class CastInTheCheckpoint(_Modules):
    """inv_freq is in the checkpoint, in the dtype that the model had when it was saved."""

    module = _PersistentTable


class _LongestKept(RotaryModule):
    """Holds steps that have a memory."""

    def __init__(self, head_dim, **options) -> None:
        super().__init__(**options)
        self.steps = LongestLengthKept()

    def forward(self, x, positions):
        return self.steps.rotary(x, positions, **self.options)


@known_bug(
    "rope-ntk-not-reset.module", contract="rotary_module", breaks="rotary_module.scaling.stateless"
)
class ModuleKeepsLongest(_Modules):
    """The module keeps the table of the longest call."""

    module = _LongestKept


@known_bug(
    "rope-theta-ignored.shared-table",
    contract="rotary_module",
    breaks="rotary_module.instances.independent",
)
class OneTableForAllModules(_Modules):
    """A table kept by width alone serves modules of any theta: the first one decides."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def rotary_module(self, head_dim, **options):
        kept = self.kept

        class Steps(Rotary):
            def frequencies(self, rotary_dim, theta, layout, scaling, length):
                found = super().frequencies(rotary_dim, theta, layout, scaling, length)
                return kept.setdefault(rotary_dim, found)

        class Module(RotaryModule):
            def forward(self, x, positions):
                return Steps().rotary(x, positions, **self.options)

        return Module(**options)
