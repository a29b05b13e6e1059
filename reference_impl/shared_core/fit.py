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
from reference_impl.stored import all_finite

CHUNK_BYTES = 1 << 22
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
        room_EOD = room_for(experts_EOD)
        history = [squared_error(experts_EOD, factors, room_EOD)]
        kept = Kept(factors, history[0])
        optimizer = torch.optim.Adam(list(factors.values()), lr=lr, fused=True)
        for step in steps(num_steps, progress):
            optimizer.param_groups[0]["lr"] = self.step_size(lr, step, num_steps)
            loss = error_and_gradients(experts_EOD, factors, room_EOD)
            if step:
                history.append(loss)
                self.keep(kept, factors, loss)
            if not math.isfinite(loss):
                break
            optimizer.step()
        else:
            if num_steps:
                history.append(squared_error(experts_EOD, factors, room_EOD))
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


@dataclass(frozen=True)
class Sides:
    """Of every expert, what its reconstruction is made of beside the core: Ŵ = C + left @ right.

    left = [C U_in | U_out] [E, O, 2R] and right = [V_inᵀ ; V_outᵀ M] [E, 2R, D], where M is
    C (I + U_in V_inᵀ).
    """

    left: Tensor
    right: Tensor
    cu_EOR: Tensor
    """C U_in."""
    vm_ERD: Tensor
    """V_outᵀ M."""
    vcu_ERR: Tensor
    """V_outᵀ C U_in."""


def sides(factors: dict[str, Tensor]) -> Sides:
    """Made of the core once for all experts: M itself, which is as large as they are, is not."""
    core, u_in, v_in, u_out, v_out = factors.values()
    cu_EOR = core @ u_in
    vcu_ERR = v_out.mT @ cu_EOR
    vm_ERD = torch.baddbmm(v_out.mT @ core, vcu_ERR, v_in.mT)
    left, right = torch.cat([cu_EOR, u_out], dim=2), torch.cat([v_in.mT, vm_ERD], dim=1)
    return Sides(left, right, cu_EOR, vm_ERD, vcu_ERR)


def room_for(experts_EOD: Tensor) -> Tensor:
    """Memory for a chunk of residuals; new memory at each step would take longer than a product."""
    return torch.empty_like(experts_EOD[next(chunks(experts_EOD))])


def residuals(
    experts_EOD: Tensor, factors: dict[str, Tensor], made: Sides, room_EOD: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Ŵ − W of one chunk of experts after another, all in the same memory."""
    for part in chunks(experts_EOD):
        experts = experts_EOD[part]
        residual_EOD = torch.sub(factors["core"], experts, out=room_EOD[: len(experts)])
        yield part, residual_EOD.baddbmm_(made.left[part], made.right[part])


def squared_error(experts_EOD: Tensor, factors: dict[str, Tensor], room_EOD: Tensor) -> float:
    """Σ_e ‖W_e − Ŵ_e‖²."""
    found = residuals(experts_EOD, factors, sides(factors), room_EOD)
    return sum(squared_norm(residual_EOD) for _, residual_EOD in found)


def squared_norm(x: Tensor) -> float:
    """The sum of the squares."""
    return float(x.flatten().dot(x.flatten()))


def error_and_gradients(experts_EOD: Tensor, factors: dict[str, Tensor], room_EOD: Tensor) -> float:
    """The loss, and its gradients in the ``grad`` of the factors.

    With R = Ŵ − W and G = (I + V_out U_outᵀ) R: dU_out = 2 R Mᵀ V_out, dV_out = 2 M Rᵀ U_out,
    dU_in = 2 Cᵀ G V_in, dV_in = 2 Gᵀ C U_in and dC = 2 Σ_e G (I + V_in U_inᵀ). Of everything as large
    as the experts only R is made; it is multiplied once from either side.
    """
    core, u_in, v_in, u_out, v_out = factors.values()
    made = sides(factors)
    from_left_ESO = torch.cat([u_out, made.cu_EOR], dim=2).mT
    from_right_EDS = torch.cat([made.vm_ERD.mT, v_in], dim=2)
    rank, loss = u_in.shape[-1], 0.0
    core.grad = torch.zeros_like(core) if core.grad is None else core.grad.zero_()
    rows_ESD, columns_EOS = torch.empty_like(made.right), torch.empty_like(made.left)
    for part, r_EOD in residuals(experts_EOD, factors, made, room_EOD):
        loss += squared_norm(r_EOD)
        torch.bmm(from_left_ESO[part], r_EOD, out=rows_ESD[part])
        torch.bmm(r_EOD, from_right_EDS[part], out=columns_EOS[part])
        for residual in r_EOD:
            core.grad += residual
    ur_ERD, ucr_ERD = rows_ESD.split(rank, dim=1)
    u_out.grad, rv_EOR = columns_EOS.split(rank, dim=2)
    gv_EOR = torch.baddbmm(rv_EOR, v_out, ur_ERD @ v_in)
    v_out.grad = torch.baddbmm(core @ ur_ERD.mT, made.cu_EOR, v_in.mT @ ur_ERD.mT)
    u_in.grad = core.mT @ gv_EOR
    v_in.grad = torch.baddbmm(ucr_ERD.mT, ur_ERD.mT, made.vcu_ERR)
    left = torch.cat([v_out, gv_EOR], dim=2).movedim(1, 0).flatten(1)
    right = torch.cat([ur_ERD, u_in.mT], dim=1).flatten(0, 1)
    core.grad.addmm_(left, right, beta=2, alpha=2)
    for wrapper in (u_in, v_in, u_out, v_out):
        wrapper.grad = 2 * wrapper.grad
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
    if not all_finite(experts):
        raise ValueError("experts hold values that are not finite")
    if not 1 <= rank <= min(experts.shape[1:]):
        raise ValueError(f"rank is {rank}, expected 1 to {min(experts.shape[1:])}")
    if num_steps < 0 or not lr > 0:
        raise ValueError(f"{num_steps} steps of size {lr}: expected 0 or more, of a size above 0")
