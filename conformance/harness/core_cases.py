"""Cases of shared-core layers and of blocks of them: sizes, wrappers and inputs.

Wrappers are of the size of the identity that they stand beside, so that dropping either is seen, and
no two sizes are equal unless the rule is about that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, dtype_name, shown_case
from conformance.harness.qwen2_cases import as_strategy

FACTORS = ("core", "u_in", "v_in", "u_out", "v_out")
"""The names of the factors of a projection, in the order of the contract."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def equal_sizes(**sizes: int) -> frozenset[str]:
    """The pairs of sizes that are equal, as ``a = b``."""
    pairs = combinations(sizes, 2)
    return frozenset(f"{a} = {b}" for a, b in pairs if sizes[a] == sizes[b])


def cast(dtype: torch.dtype, device: str) -> str:
    """The arguments of ``.to`` as source text; empty where there is nothing to change."""
    parts = [] if device == "cpu" else [repr(device)]
    parts += [] if dtype == torch.float32 else [f"torch.{dtype_name(dtype)}"]
    return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class CoreCase:
    """One layer, and what its experts are called with."""

    experts: int = 3
    rank: int = 2
    d_in: int = 8
    d_out: int = 11
    bias: bool = False
    leading: tuple[int, ...] = (6,)
    """Axes of the input before the last one."""
    strength: float = 0.7
    """Of what a wrapper adds, beside the identity."""
    dtype: str = "float32"
    seed: int = 0

    def __repr__(self) -> str:
        """The sizes, and whatever is not at its default."""
        return shown_case(self)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set(
            equal_sizes(d_in=self.d_in, d_out=self.d_out)
            | equal_sizes(experts=self.experts, rank=self.rank)
            | equal_sizes(experts=self.experts, double_rank=2 * self.rank)
        )
        if self.experts == 1:
            equal.add("one expert")
        return frozenset(equal)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the factors."""
        inner, outer = (self.experts, self.d_in, self.rank), (self.experts, self.d_out, self.rank)
        return dict(zip(FACTORS, ((self.d_out, self.d_in), inner, inner, outer, outer)))

    @property
    def of_an_expert(self) -> int:
        """Parameters of an expert alone."""
        factors = (self.d_in * self.rank) * 2 + (self.d_out * self.rank) * 2
        return factors + (self.d_out if self.bias else 0)

    @property
    def total(self) -> int:
        """Parameters of the layer, with the core once."""
        return self.d_out * self.d_in + self.experts * self.of_an_expert

    @property
    def original(self) -> int:
        """Parameters of the experts that are not compressed."""
        return self.experts * (self.d_out * self.d_in + (self.d_out if self.bias else 0))

    def call(self, dtype: torch.dtype, device: str = "cpu", *edits: str) -> Call:
        """The call that makes the layer; ``edits`` are lines behind the factors and ``x``."""
        e, r, i, o = self.experts, self.rank, self.d_in, self.d_out
        leading = "".join(f"{size}, " for size in self.leading)
        lines = [
            f"g = torch.Generator().manual_seed({self.seed})",
            "r = lambda *shape: torch.randn(shape, generator=g)",
            f"core = r({o}, {i}) / {i} ** 0.5",
            f"u_in, v_in = {self.strength} * r({e}, {i}, {r}) / {i} ** 0.5, r({e}, {i}, {r})",
            f"u_out, v_out = {self.strength} * r({e}, {o}, {r}) / {o} ** 0.5, r({e}, {o}, {r})",
            f"bias = r({e}, {o})",
            f"x = r({leading}{i})",
            *edits,
        ]
        if to := cast(dtype, device):
            names = ", ".join((*FACTORS, "bias", "x"))
            lines.append(f"{names} = (t.to({to}) for t in ({names}))")
        options = (("bias", "bias"),) if self.bias else ()
        return Call("shared_core", tuple(lines), FACTORS, options, dtype, self)


NEW_CORE = "core = 1.3 * r(*core.shape) / core.shape[1] ** 0.5"
"""The line that gives another core."""
EDITED = (NEW_CORE, "with torch.no_grad(): out.core.copy_(core)")
"""The lines that change the core of a layer."""
SPOILT = (
    "u_in, v_in, u_out, v_out, bias = (1 - 0.5 * t for t in (u_in, v_in, u_out, v_out, bias))",
)
"""The line that gives other wrappers and biases."""

EXAMPLE = (
    # Expert 0 is worked by hand; expert 1 has the wrappers of expert 0 exchanged.
    "core = torch.tensor([[1.0, 2.0], [3.0, 4.0]])",
    "one, two = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])",
    "u_in, v_in = torch.stack([one, two]), torch.stack([two, one])",
    "u_out, v_out = torch.stack([two, one]), torch.stack([one, two])",
    "x = torch.tensor([1.0, 1.0])",
)
EXAMPLE_WEIGHTS = ([[1, 3], [4, 10]], [[10, 6], [7, 4]])
EXAMPLE_OUTPUTS = ([4, 14], [16, 11])


@dataclass(frozen=True)
class ExampleCase:
    """Two experts of two rows and columns with wrappers of rank 1, worked by hand."""

    dtype: str = "float32"
    seed: int = 0

    def confusable(self) -> frozenset[str]:
        """The two experts tell every exchange apart."""
        return frozenset()

    def call(self) -> Call:
        """The call that makes the layer."""
        return Call("shared_core", EXAMPLE, FACTORS, case=self)


# Layers

WIDTHS = st.sampled_from([(8, 11), (13, 9), (10, 15), (17, 12), (9, 14), (16, 7)])
SQUARE = st.sampled_from([(8, 8), (11, 11), (13, 13)])
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
EXPERTS_AND_RANKS = st.sampled_from([(3, 1), (5, 1), (3, 2), (5, 2), (7, 2), (5, 3), (7, 3)])


def core_cases(
    widths: SearchStrategy[tuple[int, int]] = WIDTHS, **fixed: object
) -> SearchStrategy[CoreCase]:
    """Layers of such widths (d_in, d_out); a strategy or a value fixes a field."""
    return _core_cases(widths, fixed)


@st.composite
def _core_cases(
    draw: st.DrawFn, widths: SearchStrategy[tuple[int, int]], fixed: Mapping[str, object]
) -> CoreCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    d_in, d_out = draw(widths)
    experts, rank = draw(EXPERTS_AND_RANKS)
    given = {"experts": experts, "rank": rank, "d_in": d_in, "d_out": d_out} | given
    given.setdefault("seed", draw(st.integers(0, 2**16)))
    return CoreCase(**given)
