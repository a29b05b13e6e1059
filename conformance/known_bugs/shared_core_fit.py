"""Documented bugs of fitting a shared core."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from conformance.known_bugs import known_bug
from reference_impl.shared_core.fit import SharedCoreFit

# What is returned


@known_bug(
    "fit-last-iterate",
    contract="shared_core_fit",
    breaks="shared_core_fit.loss.never-worse-than-mean",
)
class LastIterate(SharedCoreFit):
    """What the last step leaves is returned, be it worse than the beginning."""

    def keep(self, kept, factors, loss):
        if math.isfinite(loss):
            kept.take(factors, loss)


@known_bug(
    "fit-last-iterate.rises",
    contract="shared_core_fit",
    breaks="shared_core_fit.history.best-is-returned",
)
class LastBetterThanBefore(SharedCoreFit):
    """A step is kept if it is better than the mean, although an earlier one was better still."""

    def step_size(self, lr, step, num_steps):
        return lr  # as in the source: the error rises and falls

    def shared_core_fit(self, experts, **options):
        self.first = None
        return super().shared_core_fit(experts, **options)

    def keep(self, kept, factors, loss):
        if self.first is None:
            self.first = kept.loss
        if loss < self.first:
            kept.take(factors, loss)


@known_bug(
    "fit-in-given-dtype",
    contract="shared_core_fit",
    breaks="shared_core_fit.output.float32",
)
class MeanInGivenDtype(SharedCoreFit):
    """The mean is taken in the dtype of the experts, which rounds it to 16 bits."""

    def shared_core_fit(self, experts, **options):
        self.dtype = experts.dtype
        return super().shared_core_fit(experts, **options)

    def start(self, experts_EOD, rank, seed):
        found = super().start(experts_EOD, rank, seed)
        return found | {"core": found["core"].to(self.dtype).float()}


# Random numbers


@known_bug(
    "fit-global-generator",
    contract="shared_core_fit",
    breaks="shared_core_fit.seed.same",
)
class GlobalGenerator(SharedCoreFit):
    """Wrappers are drawn from the global generator, whatever the seed."""

    def start(self, experts_EOD, rank, seed):
        return super().start(experts_EOD, rank, int(torch.randint(1 << 30, ())))


@known_bug(
    "fit-global-generator.seeded",
    contract="shared_core_fit",
    breaks="shared_core_fit.seed.global-state",
)
class SeedsGlobally(SharedCoreFit):
    """The global generator is seeded, for everybody."""

    def start(self, experts_EOD, rank, seed):
        torch.manual_seed(seed)
        return super().start(experts_EOD, rank, seed)


@known_bug(
    "fit-unscaled-v",
    contract="shared_core_fit",
    breaks="shared_core_fit.start.random-v",
)
class UnscaledV(SharedCoreFit):
    """V is drawn with a variance of 1, as the source's documents say, and not 1 / rank."""

    def start(self, experts_EOD, rank, seed):
        found = super().start(experts_EOD, rank, seed)
        return {n: x * math.sqrt(rank) if n[0] == "v" else x for n, x in found.items()}


# Artefacts of an earlier run


@known_bug(
    "comp-stale-intermediate-artifact-reused.fit",
    contract="shared_core_fit",
    breaks="shared_core_fit.seed.no-memory",
)
class KeptByShape(SharedCoreFit):
    """What was fitted to experts of these shapes is given again, whatever the experts and the seed."""

    def shared_core_fit(self, experts, **options):
        kept = self.__dict__.setdefault("kept", [])
        place = (experts.shape, options["rank"], options["num_steps"])
        if kept[:1] != [place]:
            kept[:] = [place, super().shared_core_fit(experts, **options)]
        return replace(kept[1])
