"""Other right ways to offer the contract ``shared_core_fit``."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from conformance.correct_variants import correct_variant
from reference_impl.shared_core.fit import FittedCore, SharedCoreFit, check_fit
from reference_impl.shared_core.layer import FACTORS


@correct_variant("fit-constant-step", contract="shared_core_fit")
class ConstantStep(SharedCoreFit):
    """The step size stays what it is, as in the source."""

    def step_size(self, lr, step, num_steps):
        return lr


@correct_variant("fit-no-history", contract="shared_core_fit")
class WithoutHistory(SharedCoreFit):
    """Factors alone are given."""

    def shared_core_fit(self, experts, *, rank, num_steps=1000, lr=1e-3, seed=0):
        options = {"rank": rank, "num_steps": num_steps, "lr": lr, "seed": seed}
        return SimpleNamespace(**super().shared_core_fit(experts, **options).factors)


class _Autograd(SharedCoreFit):
    """The formula as it is written, differentiated by autograd, one expert after another."""

    optimizer = torch.optim.Adam

    def shared_core_fit(self, experts, *, rank, num_steps=1000, lr=1e-3, seed=0):
        check_fit(experts, rank, num_steps, lr)
        experts = experts.detach().float()
        factors = self.start(experts, rank, seed)
        leaves = [x.requires_grad_() for x in factors.values()]
        optimizer = self.optimizer(leaves, lr=lr)
        history, best = [], None
        for step in range(num_steps + 1):
            with torch.enable_grad():
                loss = self.loss(experts, factors)
            history.append(float(loss.detach()))
            if best is None or history[-1] < best[0]:
                best = (history[-1], {n: x.detach().clone() for n, x in factors.items()})
            if step < num_steps and math.isfinite(history[-1]):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return FittedCore(**best[1], history=tuple(history))

    def loss(self, experts, factors):
        core, u_in, v_in, u_out, v_out = (factors[name] for name in FACTORS)
        total = experts.new_zeros(())
        for e, weight in enumerate(experts):
            outer = torch.eye(len(core)) + u_out[e] @ v_out[e].T
            inner = torch.eye(core.shape[1]) + u_in[e] @ v_in[e].T
            total = total + (weight - outer @ core @ inner).square().sum()
        return total


@correct_variant("fit-autograd", contract="shared_core_fit")
class Autograd(_Autograd):
    """Autograd and Adam at a constant step size, matrices written out."""


@correct_variant("fit-numpy-random", contract="shared_core_fit")
class OtherRandomNumbers(_Autograd):
    """V comes from numpy's generator."""

    def start(self, experts_EOD, rank, seed):
        import numpy as np

        found, numbers = super().start(experts_EOD, rank, 0), np.random.default_rng(seed)
        for name in ("v_in", "v_out"):
            drawn = numbers.standard_normal(found[name].shape) / math.sqrt(rank)
            found[name] = torch.tensor(drawn, dtype=torch.float32)
        return found
