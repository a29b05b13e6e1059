"""Subtle mistakes in fitting a shared core that no catalogue lists, for every requirement."""

from dataclasses import replace

import pytest
import torch
from mutants import Broken

from reference_impl.shared_core.fit import SharedCoreFit

NEAR_FIT: dict[str, Broken] = {}


def near(breaks: str):
    """Register an adapter, whose docstring says what is wrong with it."""

    def decorate(adapter: type) -> type:
        wrong, slug = " ".join(adapter.__doc__.split()), f"shared_core_fit.{breaks}"
        NEAR_FIT[adapter.__name__] = Broken(adapter.__name__, slug, wrong, adapter)
        return adapter

    return decorate


@pytest.mark.parametrize("name", NEAR_FIT)
def test_near_miss_is_caught(name):
    NEAR_FIT[name].assert_caught()


class Start(SharedCoreFit):
    """The steps as they are, from another beginning."""

    def start(self, experts_EOD, rank, seed):
        found = super().start(experts_EOD, rank, seed)
        return found | self.other(found, experts_EOD)


class Edited(SharedCoreFit):
    """What is fitted, changed afterwards."""

    def shared_core_fit(self, experts, **options):
        return self.edit(super().shared_core_fit(experts, **options), experts, options)


class Asked(SharedCoreFit):
    """Something else is asked for."""

    def shared_core_fit(self, experts, **options):
        experts, changed = self.change(experts, **options)
        return super().shared_core_fit(experts, **options | changed)


# The beginning


@near("start.mean")
class FirstExpert(Start):
    """The first expert takes the place of the mean."""

    def other(self, found, experts):
        return {"core": experts[0].clone()}


@near("start.mean")
class MeanIn16Bits(Start):
    """The mean is rounded to bfloat16."""

    def other(self, found, experts):
        return {"core": found["core"].bfloat16().float()}


@near("start.one-expert")
class Unbiased(Start):
    """A sum over one expert is divided by none, which is taken for zero."""

    def other(self, found, experts):
        return {"core": found["core"] * float(len(experts) > 1)}


@near("start.random-v")
class OneVForAll(Start):
    """Every expert begins with the same V."""

    def other(self, found, experts):
        return {n: found[n][:1].expand_as(found[n]).clone() for n in ("v_in", "v_out")}


@near("start.random-v")
class SmallU(Start):
    """U begins with small random numbers."""

    def other(self, found, experts):
        return {n: 1e-4 * found["v" + n[1:]].flip(0) for n in ("u_in", "u_out")}


# How good it is


@near("loss.never-worse-than-mean")
class BeginningIsNotKept(SharedCoreFit):
    """The best step is returned, but the beginning is not among them."""

    def keep(self, kept, factors, loss):
        if loss < kept.loss or not hasattr(kept, "stepped"):
            kept.take(factors, loss)
            kept.stepped = True


@near("loss.few-steps")
class KeepsBestOfTwo(BeginningIsNotKept):
    """The first step is taken for better than the beginning."""


@near("loss.equal-experts")
class Jitter(Start):
    """The core begins a little beside the mean, to break symmetry."""

    def other(self, found, experts):
        noise = torch.randn(found["core"].shape, generator=torch.Generator().manual_seed(0))
        return {"core": found["core"] + 1e-4 * noise}


@near("loss.planted")
class OuterWrapperAlone(Edited):
    """The wrappers of the input are dropped."""

    def edit(self, fitted, experts, options):
        return replace(fitted, u_in=torch.zeros_like(fitted.u_in))


@near("loss.steps-help")
class StepsOfAThousandth(Asked):
    """Steps are a thousandth of what is asked for."""

    def change(self, experts, lr, **options):
        return experts, {"lr": lr / 1000}


@near("loss.rank-counts")
class FirstColumnOnly(Edited):
    """Of every wrapper only the first column is used."""

    def edit(self, fitted, experts, options):
        first = torch.arange(options["rank"]) == 0
        return replace(fitted, u_in=fitted.u_in * first, u_out=fitted.u_out * first)


# History


@near("history.begins-with-mean")
class MeanOverElements(Edited):
    """Losses are means over elements."""

    def edit(self, fitted, experts, options):
        return replace(fitted, history=tuple(x / experts.numel() for x in fitted.history))


@near("history.begins-with-mean")
class AfterEachStep(Edited):
    """The history begins after the first step."""

    def edit(self, fitted, experts, options):
        return replace(fitted, history=fitted.history[1:])


@near("history.best-is-returned")
class FactorsAfterTheStep(SharedCoreFit):
    """The loss before a step is kept with the factors after it."""

    def shared_core_fit(self, experts, **options):
        found = super().shared_core_fit(experts, **options)
        steps = found.history.index(min(found.history)) - 1
        if steps < 1:
            return found
        before = super().shared_core_fit(experts, **options | {"num_steps": steps})
        return replace(before, history=found.history)


# Random numbers


@near("seed.other")
class SeedIgnored(Asked):
    """The seed is always 0."""

    def change(self, experts, **options):
        return experts, {"seed": 0}


@near("seed.same")
class CountsItsCalls(Asked):
    """Every fit goes on where the generator of the one before stopped."""

    def change(self, experts, seed, **options):
        self.calls = getattr(self, "calls", 0) + 1
        return experts, {"seed": seed + self.calls}


@near("seed.global-state")
class DrawsGlobally(Asked):
    """One number is drawn from the global generator."""

    def change(self, experts, **options):
        torch.rand(())
        return experts, {}


@near("seed.global-state")
class SwitchesGradients(Asked):
    """Gradients are not recorded any more."""

    def change(self, experts, **options):
        torch.set_grad_enabled(False)
        return experts, {}


# Tensors


@near("output.float32")
class FactorsInGivenDtype(Edited):
    """Factors are rounded to the dtype of the experts, and are float32 again."""

    def edit(self, fitted, experts, options):
        made = {name: x.to(experts.dtype).float() for name, x in fitted.factors.items()}
        return replace(fitted, **made)


@near("output.float64")
class FactorsAsWide(Edited):
    """Factors have the dtype of the experts if that is wider."""

    def edit(self, fitted, experts, options):
        wide = torch.promote_types(torch.float32, experts.dtype)
        return replace(fitted, **{name: x.to(wide) for name, x in fitted.factors.items()})


@near("output.square")
class SidesExchanged(Edited):
    """Where shapes allow it, the wrappers of input and output are exchanged."""

    def edit(self, fitted, experts, options):
        if experts.shape[1] != experts.shape[2]:
            return fitted
        names = {"u_in": "u_out", "v_in": "v_out", "u_out": "u_in", "v_out": "v_in"}
        return replace(fitted, **{n: getattr(fitted, other) for n, other in names.items()})


@near("output.full-rank")
class HalfTheWidthAtMost(Edited):
    """A rank of more than half the smaller width is taken for half of it."""

    def edit(self, fitted, experts, options):
        most = max(1, min(experts.shape[1:]) // 2)
        cut = {n: x[..., :most] for n, x in fitted.factors.items() if n != "core"}
        return replace(fitted, **cut)


@near("output.detached")
class Leaves(Edited):
    """The factors are still the leaves that were optimised."""

    def edit(self, fitted, experts, options):
        return replace(fitted, core=fitted.core.requires_grad_())


@near("output.detached")
class CoreOfOneExpert(Edited):
    """The core of a single expert that nothing was fitted to is that expert itself."""

    def edit(self, fitted, experts, options):
        if len(experts) > 1 or options["num_steps"] or experts.dtype != torch.float32:
            return fitted
        return replace(fitted, core=experts.detach()[0])


# What cannot be fitted


class Unchecked(SharedCoreFit):
    """Something is put right without a word."""

    def shared_core_fit(self, experts, **options):
        return super().shared_core_fit(*self.mended(experts), **self.options(experts, **options))

    def mended(self, experts):
        return (experts,)

    def options(self, experts, **options):
        return options


@near("refuses.no-experts")
class NoneIsOneOfZeros(Unchecked):
    """No experts are fitted as one of zeros."""

    def mended(self, experts):
        return (experts if len(experts) else experts.new_zeros(1, *experts.shape[1:]),)


@near("refuses.not-finite")
class NotFiniteIsZero(Unchecked):
    """What is not finite is taken for zero."""

    def mended(self, experts):
        return (experts.nan_to_num(0, 0, 0),)


@near("refuses.rank")
class RankIsClamped(Unchecked):
    """A rank is made to fit."""

    def options(self, experts, rank, **options):
        return options | {"rank": max(1, min(rank, *experts.shape[1:]))}


@near("refuses.negative-steps")
class NegativeIsNone(Unchecked):
    """A negative number of steps is none."""

    def options(self, experts, num_steps, **options):
        return options | {"num_steps": max(0, num_steps)}


@near("refuses.one-matrix")
class MatrixIsOneExpert(Unchecked):
    """A matrix is taken for the only expert."""

    def mended(self, experts):
        return (experts[None] if experts.ndim == 2 else experts,)
