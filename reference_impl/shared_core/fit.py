"""Fitting a shared core and wrappers to experts: the zero-shot start of a compressed model.

Minimises Σ_e ‖W_e − (I + U_out,e V_out,eᵀ) C (I + U_in,e V_in,eᵀ)‖² with Adam. The gradients are
written out, so that nothing of size [experts, d, d] is made but a few matrices of a chunk of experts.
Axes are E experts (of a chunk), O d_out, D d_in, R rank.

Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/zero_shot_init.py``: its start, its loss and its
optimizer. Two things differ: the step size falls to zero along half a cosine, and what is returned is
the best of all iterates instead of the last, so that a step size that is too large cannot do harm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reference_impl.shared_core.layer import FACTORS

CHUNK_BYTES = 1 << 24
"""Bytes of the experts that are computed at once: their few temporaries stay in a cache."""


@dataclass(frozen=True)
class FittedCore:
    """See :class:`conformance.contracts.FittedCore`."""

    core: Tensor
    u_in: Tensor
    v_in: Tensor
    u_out: Tensor
    v_out: Tensor
    history: tuple[float, ...] = ()

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {name: getattr(self, name) for name in FACTORS}


class SharedCoreFit:
    """The contract ``shared_core_fit``; the steps are methods."""

    def shared_core_fit(
        self,
        experts: Tensor,
        *,
        rank: int,
        num_steps: int = 1000,
        lr: float = 1e-3,
        seed: int = 0,
        progress: str | None = None,
    ) -> FittedCore:
        """See :class:`conformance.contracts.SharedCoreFit`; ``progress`` titles a bar on stderr."""
        check_fit(experts, rank, num_steps, lr)
        experts_EOD = experts.detach().to(torch.float32)
        factors = self.start(experts_EOD, rank, seed)
        history = [squared_error(experts_EOD, factors)]
        kept = Kept(factors, history[0])
        optimizer = torch.optim.Adam(list(factors.values()), lr=lr)
        for step in steps(num_steps, progress):
            optimizer.param_groups[0]["lr"] = self.step_size(lr, step, num_steps)
            loss = error_and_gradients(experts_EOD, factors)
            if step:
                history.append(loss)
                self.keep(kept, factors, loss)
            if not math.isfinite(loss):
                break
            optimizer.step()
        else:
            if num_steps:
                history.append(squared_error(experts_EOD, factors))
                self.keep(kept, factors, history[-1])
        return FittedCore(**kept.factors, history=tuple(history))

    def start(self, experts_EOD: Tensor, rank: int, seed: int) -> dict[str, Tensor]:
        """The mean of the experts between wrappers that are the identity: U = 0, V of variance 1/rank.

        Random numbers are drawn on the CPU, so that a seed means the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        number, d_out, d_in = experts_EOD.shape
        found = {"core": experts_EOD.mean(0)}
        for side, width in (("in", d_in), ("out", d_out)):
            v_EWR = torch.randn(number, width, rank, generator=generator) / math.sqrt(rank)
            found[f"u_{side}"] = experts_EOD.new_zeros(v_EWR.shape)
            found[f"v_{side}"] = v_EWR.to(experts_EOD.device)
        return {name: found[name] for name in FACTORS}

    def step_size(self, lr: float, step: int, num_steps: int) -> float:
        """Half a cosine from ``lr`` to zero: at a constant size Adam never comes to rest."""
        return lr * (1 + math.cos(math.pi * step / num_steps)) / 2

    def keep(self, kept: Kept, factors: dict[str, Tensor], loss: float) -> None:
        """Keep the factors if they are the best so far."""
        if loss < kept.loss:
            kept.take(factors, loss)


class Kept:
    """The best factors so far, in memory of their own."""

    def __init__(self, factors: dict[str, Tensor], loss: float) -> None:
        self.factors = {name: factor.clone() for name, factor in factors.items()}
        self.loss = loss

    def take(self, factors: dict[str, Tensor], loss: float) -> None:
        """Copy these."""
        self.loss = loss
        for name, factor in factors.items():
            self.factors[name].copy_(factor)


def chunks(experts_EOD: Tensor) -> Iterator[slice]:
    """Slices of the experts, each of at most ``CHUNK_BYTES``, or of one expert."""
    size = max(1, CHUNK_BYTES // max(1, experts_EOD[0].nbytes))
    for begin in range(0, len(experts_EOD), size):
        yield slice(begin, begin + size)


def products(experts_EOD: Tensor, factors: dict[str, Tensor], part: slice) -> tuple[Tensor, ...]:
    """Of some experts: C U_in, M = C (I + U_in V_inᵀ), V_outᵀ M, and the residual Ŵ − W."""
    core, u_in, v_in, u_out, v_out = factors.values()
    u_in, v_in, u_out, v_out = (x[part] for x in (u_in, v_in, u_out, v_out))
    cu_EOR = core @ u_in
    m_EOD = torch.baddbmm(core, cu_EOR, v_in.mT)
    vm_ERD = v_out.mT @ m_EOD
    residual_EOD = (m_EOD - experts_EOD[part]).baddbmm_(u_out, vm_ERD)
    return cu_EOR, m_EOD, vm_ERD, residual_EOD


def squared_error(experts_EOD: Tensor, factors: dict[str, Tensor]) -> float:
    """Σ_e ‖W_e − Ŵ_e‖²."""
    parts = (products(experts_EOD, factors, part)[-1] for part in chunks(experts_EOD))
    return sum(float(residual.square_().sum()) for residual in parts)


def error_and_gradients(experts_EOD: Tensor, factors: dict[str, Tensor]) -> float:
    """The loss, and its gradients in the ``grad`` of the factors.

    With R = Ŵ − W and G = (I + V_out U_outᵀ) R: dU_out = 2 R Mᵀ V_out, dV_out = 2 M Rᵀ U_out,
    dU_in = 2 Cᵀ G V_in, dV_in = 2 Gᵀ C U_in and dC = 2 Σ_e G (I + V_in U_inᵀ).
    """
    core, u_in, v_in, u_out, v_out = factors.values()
    for factor in factors.values():
        if factor.grad is None:
            factor.grad = torch.empty_like(factor)
    core.grad.zero_()
    loss = 0.0
    for part in chunks(experts_EOD):
        cu_EOR, m_EOD, vm_ERD, r_EOD = products(experts_EOD, factors, part)
        loss += float(r_EOD.flatten().dot(r_EOD.flatten()))
        ur_ERD = u_out[part].mT @ r_EOD
        torch.bmm(r_EOD, vm_ERD.mT, out=u_out.grad[part])
        torch.bmm(m_EOD, ur_ERD.mT, out=v_out.grad[part])
        g_EOD = r_EOD.baddbmm_(v_out[part], ur_ERD)
        gv_EOR = g_EOD @ v_in[part]
        torch.matmul(core.mT, gv_EOR, out=u_in.grad[part])
        torch.bmm(g_EOD.mT, cu_EOR, out=v_in.grad[part])
        core.grad += g_EOD.sum(0)
        core.grad.addmm_(gv_EOR.movedim(1, 0).flatten(1), u_in[part].movedim(2, 1).flatten(0, 1))
    for factor in factors.values():
        factor.grad *= 2
    return loss


def steps(number: int, title: str | None) -> Iterator[int]:
    """The numbers of the steps, under a progress bar if it has a title."""
    if title is None:
        return iter(range(number))
    from tqdm import tqdm

    return iter(tqdm(range(number), desc=title, leave=False))


def check_fit(experts: Tensor, rank: int, num_steps: int, lr: float) -> None:
    """Raise ValueError for what cannot be fitted."""
    if experts.ndim != 3 or not experts.numel():
        found = list(experts.shape)
        raise ValueError(f"experts have shape {found}, expected [experts, d_out, d_in]")
    if not bool(torch.isfinite(experts).all()):
        raise ValueError("experts hold values that are not finite")
    if not 1 <= rank <= min(experts.shape[1:]):
        raise ValueError(f"rank is {rank}, expected 1 to {min(experts.shape[1:])}")
    if num_steps < 0 or not lr > 0:
        raise ValueError(f"{num_steps} steps of size {lr}: expected 0 or more, of a size above 0")
