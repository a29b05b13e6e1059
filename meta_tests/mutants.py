"""Wrong implementations that break one requirement each, where no documented bug does.

A mutant's docstring says what is wrong with it. ``broken`` registers the near misses too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from conformance.harness import profiles
from conformance.harness.failures import ConformanceFailure
from conformance.harness.requirement import all_requirements
from reference_impl.attention import Attention
from reference_impl.cached_attention import CachedAttention
from reference_impl.rotary import Rotary


@dataclass(frozen=True)
class Broken:
    """A wrong implementation, and the requirement that fails for it."""

    name: str
    breaks: str
    wrong: str
    make: Callable[[], object]

    @property
    def contract(self) -> str:
        """The contract whose method it has."""
        return self.breaks.split(".")[0]

    def fails(self) -> ConformanceFailure | None:
        """The failure of the requirement that it breaks, with the gate's cases; None if it passes."""
        settings = profiles.without_shrinking(profiles.PROFILES["gate"])
        with profiles.temporarily(settings):
            try:
                all_requirements()[self.breaks].check(getattr(self.make(), self.contract))
            except ConformanceFailure as failure:
                return failure
        return None

    def assert_caught(self, *, may_raise: bool = False) -> None:
        """The requirement fails for it, and by what it computes: a crash is no near miss."""
        failure = self.fails()
        assert failure is not None, f"{self.breaks} passes although: {self.wrong}"
        crashed = failure.kind.startswith("raised")
        assert may_raise or not crashed, f"it crashes: {failure.summary}"


def broken(register: dict[str, Broken], *, breaks: str) -> Callable[[type], type]:
    """Register the decorated class, whose docstring says what is wrong."""

    def decorate(planted: type) -> type:
        wrong = " ".join(planted.__doc__.split())
        register[planted.__name__] = Broken(planted.__name__, breaks, wrong, planted)
        return planted

    return decorate


MUTANTS: dict[str, Broken] = {}


def mutant(breaks: str) -> Callable[[type], type]:
    """Register a mutant."""
    return broken(MUTANTS, breaks=breaks)


class CacheAdapter(CachedAttention):
    """An adapter and the caches that it makes in one: without options it is the adapter."""

    def __init__(self, **options) -> None:
        if options:
            super().__init__(**options)

    def cached_attention(self, **options):
        return type(self)(**options)


class OtherGradient(torch.autograd.Function):
    """The identity, whose backward pass applies ``change`` to the gradient."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


class _AfterAttention(Attention):
    """Attention whose result goes through ``after``."""

    def attention(self, q, k, v, *, return_lse=False, **options):
        out, lse = super().attention(q, k, v, return_lse=True, **options)
        out = self.after(out, q)
        return (out, lse) if return_lse else out


# Output and inputs


@mutant("attention.output.shape-dtype-device")
class OutputInFloat32(_AfterAttention):
    """The output is in float32 whatever the dtype of q."""

    def after(self, out, q):
        return out.float()


@mutant("attention.output.shape-dtype-device")
class OutputTransposed(_AfterAttention):
    """The output is [batch, tokens, heads, width]."""

    def after(self, out, q):
        return out.transpose(1, 2)


@mutant("attention.output.shape-dtype-device")
class HeadsFlattened(_AfterAttention):
    """The output is [batch, tokens, heads * width], as the output projection takes it."""

    def after(self, out, q):
        return out.transpose(1, 2).flatten(2)


@mutant("attention.output.shape-dtype-device")
class TupleWithoutLse(_AfterAttention):
    """The output comes in a tuple, with None in the place of the weights."""

    def after(self, out, q):
        return out, None


@mutant("attention.inputs.unchanged")
class QueriesScaledInPlace(Attention):
    """The queries of the caller are multiplied by the scale."""

    def attention(self, q, k, v, *, scale=None, **options):
        with torch.no_grad():
            q *= q.shape[-1] ** -0.5 if scale is None else scale
        return super().attention(q, k, v, scale=1.0, **options)


@mutant("attention.inputs.unchanged")
class CausalWrittenIntoMask(Attention):
    """The causal mask is written into the caller's mask."""

    def attention(self, q, k, v, *, causal=False, mask=None, **options):
        if causal and mask is not None:
            future = ~self.visible(q, k, causal=True)[0, 0]
            mask.masked_fill_(future, False if mask.dtype == torch.bool else -torch.inf)
        return super().attention(q, k, v, causal=causal, mask=mask, **options)


@mutant("attention.extreme.length-one")
class ViewOfValues(Attention):
    """With a single key the output is a view of v."""

    def attention(self, q, k, v, *, return_lse=False, **options):
        if k.shape[2] == 1 and k.shape[1] in (1, q.shape[1]) and not return_lse:
            return v.expand(-1, q.shape[1], q.shape[2], -1)
        return super().attention(q, k, v, return_lse=return_lse, **options)


@mutant("attention.output.deterministic")
class GlobalRandomness(_AfterAttention):
    """A global random number generator decides the last bits: two runs differ."""

    def after(self, out, q):
        return out * (1 + torch.finfo(out.dtype).eps * (torch.rand_like(out) < 0.5))


@mutant("attention.output.deterministic")
class DependsOnEarlierCalls(_AfterAttention):
    """The last bits depend on how many calls there were, as with a workspace left as it was."""

    def after(self, out, q):
        self.calls = getattr(self, "calls", 0) + 1
        return out * (1 + torch.finfo(out.dtype).eps * (self.calls % 3))


@mutant("attention.invariance.batch-rows-are-independent")
class FirstAnswerKept(Attention):
    """The answer for inputs of these shapes is kept and given again."""

    def attention(self, q, k, v, **options):
        kept = self.__dict__.setdefault("kept", {})
        key = (q.shape, k.shape, v.shape, q.dtype, repr(options))
        if key not in kept:
            kept[key] = super().attention(q, k, v, **options)
        return kept[key]


@mutant("attention.causal.chunked-prefill")
class OutputBufferReused(_AfterAttention):
    """Outputs of one shape are written to one buffer: the next call overwrites the last answer."""

    def after(self, out, q):
        buffers = self.__dict__.setdefault("buffers", {})
        buffer = buffers.setdefault((out.shape, out.dtype), torch.empty_like(out))
        return buffer.copy_(out.detach())


# What is seen


@mutant("attention.full.sees-every-key")
class AlwaysCausal(Attention):
    """Attention is causal, asked or not."""

    def visible(self, q, k, *, causal, **options):
        return super().visible(q, k, causal=True, **options)


@mutant("attention.full.sees-every-key")
class FirstKeyIsSink(Attention):
    """The first key is kept for a sink and never seen."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        first = torch.arange(scores_BHQK.shape[-1]) == 0
        return super().softmax(scores_BHQK, visible_BHQK & ~first, sinks)


@mutant("attention.padding.content-changes-nothing")
class PaddingLeaks(Attention):
    """Padding is pushed down by 14 instead of hidden: it keeps a weight of a millionth."""

    def attention(self, q, k, v, *, key_valid=None, mask=None, **options):
        if key_valid is not None and mask is None:
            mask = torch.zeros(key_valid.shape, dtype=q.dtype).masked_fill(~key_valid, -14.0)
            mask, key_valid = mask[:, None, None], None
        return super().attention(q, k, v, key_valid=key_valid, mask=mask, **options)


@mutant("attention.padding.content-changes-nothing")
class PaddingInValueMean(_AfterAttention):
    """Values are centred over all slots, padding included, and the mean is added again."""

    def attention(self, q, k, v, **options):
        self.mean = v.mean(2, keepdim=True)
        return super().attention(q, k, v - self.mean, **options)

    def after(self, out, q):
        return out + self.expand_kv_heads(self.mean, q.shape[1])


# Log-sum-exp and gradients


@mutant("attention.lse.includes-sinks")
class SinksNotInLse(Attention):
    """The sinks are in the weights and not in the log-sum-exp."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        weights, _ = super().softmax(scores_BHQK, visible_BHQK, sinks)
        return weights, super().softmax(scores_BHQK, visible_BHQK, None)[1]


@mutant("attention.gradient.full")
class GradientOfKeysScaled(Attention):
    """The gradient of the keys is a tenth too small."""

    def attention(self, q, k, v, **options):
        k = OtherGradient.apply(k, lambda gradient: gradient * 0.9)
        return super().attention(q, k, v, **options)


# Rotary embedding


@mutant("rotary.output.shape-dtype-device")
class RotatedInFloat32(Rotary):
    """The rotated x is in float32 whatever the dtype of x."""

    def rotary(self, x, positions, **options):
        return super().rotary(x.float(), positions, **options)


@mutant("rotary.output.deterministic")
class RandomTables(Rotary):
    """A global random number generator decides the last bits."""

    def rotary(self, x, positions, **options):
        out = super().rotary(x, positions, **options)
        return out * (1 + torch.finfo(out.dtype).eps * (torch.rand_like(out) < 0.5))


@mutant("rotary.positions.zero")
class CountsFromOne(Rotary):
    """Positions are counted from 1: scores are right, the vectors are not."""

    def positions(self, x, positions):
        return positions + 1


@mutant("rotary.layers.yarn-truncate")
class TruncateOfLayersIgnored(Rotary):
    """truncate in the table of a type of layer is not read."""

    def layer_options(self, layers, layer_type):
        options = super().layer_options(layers, layer_type)
        if options is None or options.get("scaling") is None:
            return options
        scaling = {name: x for name, x in options["scaling"].items() if name != "truncate"}
        return {**options, "scaling": scaling}


# Attention with a cache


@mutant("cached_attention.window.own-token-only")
class WindowOfZeroIsNone(CacheAdapter):
    """A window that reaches back 0 tokens is taken for none given."""

    def attend(self, q, positions):
        if self.window is not None and not self.window[0]:
            self.window = None
        return super().attend(q, positions)


@mutant("cached_attention.padding.right-then-window")
class WindowCountsSlots(CacheAdapter):
    """After the first step only the last slots within the window are kept, padding among them."""

    def append(self, k, v, positions):
        if self.window is not None and self.positions_BS is not None:
            kept = -max(self.window[0], 1)
            self.k_BGSD, self.v_BGSE = self.k_BGSD[:, :, kept:], self.v_BGSE[:, :, kept:]
            self.positions_BS = self.positions_BS[:, kept:]
        super().append(k, v, positions)


@mutant("cached_attention.steps.first")
class FirstStepSeesAll(CacheAdapter):
    """The first step is not causal."""

    def attend(self, q, positions):
        if q.shape[2] < self.positions_BS.shape[1]:
            return super().attend(q, positions)
        last = positions.amax(-1, keepdim=True).expand_as(positions)
        return super().attend(q, last)


@mutant("cached_attention.steps.first")
class FirstKeyNotRotated(CacheAdapter):
    """The first step's keys are kept as they came, without rotation."""

    def key_positions(self, positions):
        return positions * 0 if self.positions_BS is None else positions


@mutant("cached_attention.output.deterministic")
class RandomCache(CacheAdapter):
    """A global random number generator decides the last bits of what is kept."""

    def append(self, k, v, positions):
        noise = torch.finfo(v.dtype).eps * (torch.rand_like(v) < 0.5)
        super().append(k, v * (1 + noise), positions)
