"""Experts of a mixture to be measured: dense, and compressed to a shared core.

The shapes for a GPU are a layer of Qwen3-30B-A3B and one of Mixtral-8x7B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.benchmarks.routing import Skew, experts_reached, routing
from conformance.benchmarks.workload import Inputs, Work, Workload, need_options

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FACTORS = ("core", "u_in", "v_in", "u_out", "v_out")
"""The factors of a compressed projection, by the contract's names."""

TOKENS_CHECKED = 16
"""Tokens of a call whose rows are held against the oracle."""

ROUTER_NORM, LEAN = 0.5, 12.0
"""Of a compressed workload: the norm of a router's row, and how far hidden states lean towards it.

A drawn expert's logit is about LEAN · ROUTER_NORM² = 3, the others' spread about 0 by ROUTER_NORM.
"""

CLEAR = 1.2
"""How much more likely the last chosen expert is than the next, where rounding does not decide."""


@dataclass(frozen=True)
class Shape:
    """A layer: its name, experts, experts a token, and both widths."""

    model: str
    experts: int
    slots: int
    hidden: int
    intermediate: int

    def __str__(self) -> str:
        sizes = f"e{self.experts}k{self.slots}.{self.hidden}x{self.intermediate}"
        return f"{self.model}.{sizes}"


QWEN3 = Shape("qwen3-30b-a3b", 128, 8, 2048, 768)
MIXTRAL = Shape("mixtral-8x7b", 8, 2, 4096, 14336)
SMALL_QWEN3 = Shape("qwen3-small", 16, 4, 256, 96)
SMALL_MIXTRAL = Shape("mixtral-small", 8, 2, 256, 896)


@dataclass(frozen=True)
class ExpertsWorkload(Workload):
    """``experts`` on ``tokens`` routed tokens."""

    shape: Shape
    tokens: int
    skew: Skew
    dtype: str

    contract = "experts"
    refilled = ("hidden", "indices", "weights", "gate_up_proj", "down_proj")

    @property
    def name(self) -> str:
        """See :class:`Workload`."""
        return f"experts.{self.shape}.t{self.tokens}.{self.skew}.{self.dtype}"

    def inputs(self, device: str, seed: int) -> Inputs:
        """The arguments of the contract; weights have the variance of an initialised model."""
        shape, draw = self.shape, _random(device, self.torch_dtype, seed)
        indices, weights = routing(self.tokens, shape.experts, shape.slots, self.skew, device, seed)
        inner, outer = shape.intermediate, shape.hidden
        return {
            "hidden": draw(self.tokens, outer),
            "indices": indices,
            "weights": weights.to(self.torch_dtype),
            "gate_up_proj": draw(shape.experts, 2 * inner, outer, scale=outer**-0.5),
            "down_proj": draw(shape.experts, outer, inner, scale=inner**-0.5),
        }

    def bind(self, method: Callable, inputs: Inputs) -> Callable[[], Any]:
        """See :class:`Workload`."""
        need_options(method, {})
        arguments = [inputs[name] for name in self.refilled]

        def call() -> Any:
            with torch.no_grad():
                return method(*arguments)

        return call

    def work(self) -> Work:
        """6·H·I operations a pair of a token and an expert; weights of the experts reached once."""
        shape = self.shape
        of_an_expert = 3 * shape.hidden * shape.intermediate
        reached = experts_reached(self.tokens, shape.experts, shape.slots, self.skew)
        size, pairs = self.torch_dtype.itemsize, self.tokens * shape.slots
        rows = 2 * self.tokens * shape.hidden * size + pairs * (8 + size)
        return Work(2 * pairs * of_an_expert, rows + round(reached * of_an_expert * size))

    def check(self, output: Any, inputs: Inputs) -> None:
        """See :class:`Workload`; rows of some tokens, among them the first and the last."""
        found = _rows_of(self, output, (self.tokens, self.shape.hidden))
        tokens = sample(self.tokens, inputs["hidden"])
        expected = mixture(
            inputs["hidden"][tokens].double(),
            inputs["indices"][tokens],
            inputs["weights"][tokens].double(),
            lambda expert: inputs["gate_up_proj"][expert].double().chunk(2),
            lambda expert: inputs["down_proj"][expert].double(),
        )
        self.check_rows("the output", found[tokens], expected)


@dataclass(frozen=True)
class CompressedWorkload(Workload):
    """``shared_core_block`` on ``tokens`` tokens: router and experts with wrappers of ``rank``.

    The module is built once, outside of the call that is timed.
    """

    shape: Shape
    rank: int
    tokens: int
    skew: Skew
    dtype: str

    contract = "shared_core_block"
    refilled = ("hidden",)

    @property
    def name(self) -> str:
        """See :class:`Workload`."""
        of = f"{self.shape}.r{self.rank}.t{self.tokens}"
        return f"shared_core_block.{of}.{self.skew}.{self.dtype}"

    @property
    def dense(self) -> ExpertsWorkload:
        """The same layer before it was compressed, its routing given."""
        return ExpertsWorkload(self.shape, self.tokens, self.skew, self.dtype)

    def inputs(self, device: str, seed: int) -> Inputs:
        """``hidden`` [1, tokens, hidden], ``router``, and the factors as ``gate_proj.core`` ….

        The router is random rows, scaled, and hidden states lean towards the rows of the experts
        that the routing drew, so that the block routes by that skew.
        """
        shape, draw = self.shape, _random(device, self.torch_dtype, seed)
        outer, inner = shape.hidden, shape.intermediate
        # From one seed in all refills: hidden states must lean towards the router that is bound.
        fixed = _random(device, self.torch_dtype, 0)
        router = fixed(shape.experts, outer, scale=ROUTER_NORM * outer**-0.5)
        indices, _ = routing(self.tokens, shape.experts, shape.slots, self.skew, device, seed)
        lean = F.one_hot(indices, shape.experts).sum(1).to(self.torch_dtype) @ router
        made = {
            "hidden": (draw(self.tokens, outer) + LEAN * lean)[None],
            "router": router,
        }
        for name in PROJECTIONS:
            d_in, d_out = (inner, outer) if name == "down_proj" else (outer, inner)
            made[f"{name}.core"] = draw(d_out, d_in, scale=d_in**-0.5)
            for side, width in (("in", d_in), ("out", d_out)):
                for factor in "uv":
                    values = draw(shape.experts, width, self.rank, scale=width**-0.5)
                    made[f"{name}.{factor}_{side}"] = values
        return made

    def bind(self, method: Callable, inputs: Inputs) -> Callable[[], Any]:
        """See :class:`Workload`."""
        options = {"top_k": self.shape.slots, "normalize": True}
        need_options(method, options)
        block = method(inputs["router"], *(factors(inputs, n) for n in PROJECTIONS), **options)

        def call() -> Any:
            with torch.no_grad():
                return block(inputs["hidden"])

        return call

    def work(self) -> Work:
        """The fewest operations known: each core once a token, and 2·rank columns a pair.

        W = C + A B with A and B of twice the rank, so that the core does not depend on the expert.
        Bytes of the cores once, and of the wrappers of the experts that are reached.
        """
        shape, size = self.shape, self.torch_dtype.itemsize
        core = 3 * shape.hidden * shape.intermediate
        wrapper = 3 * 2 * self.rank * (shape.hidden + shape.intermediate)
        router = shape.experts * shape.hidden
        pairs = self.tokens * shape.slots
        reached = experts_reached(self.tokens, shape.experts, shape.slots, self.skew)
        flops = 2 * (self.tokens * (core + router) + pairs * wrapper)
        values = 2 * self.tokens * shape.hidden + router + core + reached * wrapper
        return Work(flops, round(values * size))

    def check(self, output: Any, inputs: Inputs) -> None:
        """See :class:`Workload`; rows of some tokens.

        Tokens whose last chosen and first rejected expert are nearly tied, where rounding decides,
        are left out.
        """
        found = _rows_of(self, output, (1, self.tokens, self.shape.hidden))[0]
        hidden = inputs["hidden"][0]
        tokens = sample(self.tokens, hidden)
        scores = (hidden[tokens].double() @ inputs["router"].double().mT).softmax(-1)
        slots = self.shape.slots
        best = scores.topk(min(slots + 1, scores.shape[-1]), dim=-1)
        clear = best.values[:, slots - 1] > CLEAR * best.values[:, slots:].amax(-1)
        if not clear.any():
            raise self.wrong("no token that was looked at has a clear choice of experts")
        tokens, indices = tokens[clear], best.indices[clear, :slots]
        weights = best.values[clear, :slots]
        expected = mixture(
            hidden[tokens].double(),
            indices,
            weights / weights.sum(-1, keepdim=True),
            lambda expert: [reconstruct(factors(inputs, n), expert) for n in PROJECTIONS[:2]],
            lambda expert: reconstruct(factors(inputs, PROJECTIONS[2]), expert),
        )
        self.check_rows("the output", found[tokens], expected)


def _random(device: str, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """Normal numbers of a shape, from one generator."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return made if scale == 1.0 else made.mul_(scale)

    return draw


def _rows_of(workload: Workload, output: Any, shape: tuple[int, ...]) -> Tensor:
    """The output, if it is a tensor of this shape."""
    if not isinstance(output, Tensor) or output.shape != shape:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise workload.wrong(f"the output is {found}, expected {list(shape)}")
    return output


def sample(tokens: int, hidden: Tensor) -> Tensor:
    """Tokens that are looked at, int64: the first and the last, and others by chance."""
    number = min(tokens, TOKENS_CHECKED)
    chance = int(hidden[: 1 << 10].float().abs().sum().item())
    generator = torch.Generator().manual_seed(chance)
    others = torch.randperm(tokens, generator=generator)[: max(0, number - 2)].tolist()
    return torch.tensor(sorted({0, tokens - 1, *others}), device=hidden.device)


def factors(inputs: Inputs, projection: str) -> dict[str, Tensor]:
    """The factors of a projection by the contract's names."""
    return {name: inputs[f"{projection}.{name}"] for name in FACTORS}


def reconstruct(parts: dict[str, Tensor], expert: int) -> Tensor:
    """(I + U_out V_outᵀ) C (I + U_in V_inᵀ) of one expert in float64, without forming the squares."""
    core = parts["core"].double()
    u_in, v_in, u_out, v_out = (parts[name][expert].double() for name in FACTORS[1:])
    right = core + (core @ u_in) @ v_in.mT
    return right + u_out @ (v_out.mT @ right)


def mixture(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_and_up: Callable[[int], list[Tensor]],
    down: Callable[[int], Tensor],
) -> Tensor:
    """Σ weight · down(silu(gate x) ⊙ up x) for rows ``x`` [tokens, hidden], all in float64."""
    out = torch.zeros_like(x)
    for expert in indices.unique().tolist():
        rows, slots = (indices == expert).nonzero(as_tuple=True)
        gate, up = gate_and_up(expert)
        h = F.silu(x[rows] @ gate.mT) * (x[rows] @ up.mT)
        out.index_add_(0, rows, (h @ down(expert).mT) * weights[rows, slots, None])
    return out


def experts_workloads(kind: str) -> list[Workload]:
    """Those for ``cpu`` or ``cuda``."""
    if kind == "cpu":
        return [
            ExpertsWorkload(SMALL_QWEN3, 128, "uniform", "float32"),
            ExpertsWorkload(SMALL_QWEN3, 128, "skewed", "float32"),
            ExpertsWorkload(SMALL_MIXTRAL, 32, "uniform", "float32"),
            CompressedWorkload(SMALL_QWEN3, 8, 128, "uniform", "float32"),
            CompressedWorkload(SMALL_QWEN3, 8, 128, "skewed", "float32"),
            CompressedWorkload(SMALL_MIXTRAL, 16, 32, "uniform", "float32"),
        ]
    routes: list[tuple[int, Skew]] = [
        *((tokens, "uniform") for tokens in (1, 16, 64, 1024, 4096, 16384)),
        *((tokens, "skewed") for tokens in (64, 16384)),
    ]
    return [
        *(ExpertsWorkload(s, *route, "bfloat16") for s in (QWEN3, MIXTRAL) for route in routes),
        *(
            CompressedWorkload(s, 64, *route, "bfloat16")
            for s in (QWEN3, MIXTRAL)
            for route in routes
        ),
    ]
