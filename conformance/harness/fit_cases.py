"""Cases of fitting a shared core: experts of a few kinds, and how they are fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, shown_case
from conformance.harness.core_cases import equal_sizes
from conformance.harness.qwen2_cases import as_strategy

EXPERTS = {
    "random": ("experts = r(E, O, D) + r(O, D)",),
    "equal": ("experts = r(O, D).expand(E, O, D).clone()",),
    "planted": (
        "wrap = lambda width: torch.eye(width) + 0.4 * r(E, width, R) @ r(E, R, width) / width**0.5",
        "experts = wrap(O) @ r(O, D) @ wrap(D)",
    ),
    "near": ("experts = r(O, D) + 1e-3 * r(E, O, D)",),
}
"""How the experts are made. Planted ones are a core between wrappers of the rank that is fitted."""

LAYOUTS = {
    "rows": (),
    "columns": ("experts = experts.mT.contiguous().mT",),
    "slice": ("experts = torch.cat([experts, experts], -1)[..., :D]",),
    "experts last": ("experts = experts.movedim(0, -1).contiguous().movedim(-1, 0)",),
}
"""How the experts lie in memory."""


@dataclass(frozen=True, kw_only=True)
class FitCase:
    """Experts, and how they are fitted."""

    experts: int = 4
    d_out: int = 9
    d_in: int = 7
    rank: int = 2
    steps: int = 0
    lr: float = 1e-2
    kind: str = "random"
    layout: str = "rows"
    dtype: str = "float32"
    seed: int = 0

    def __repr__(self) -> str:
        """The sizes, and whatever is not at its default."""
        return shown_case(self, always=5)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set(equal_sizes(d_in=self.d_in, d_out=self.d_out))
        equal |= equal_sizes(experts=self.experts, d_in=self.d_in)
        equal |= equal_sizes(experts=self.experts, d_out=self.d_out)
        equal |= equal_sizes(experts=self.experts, rank=self.rank)
        return frozenset(equal | ({"one expert"} if self.experts == 1 else set()))

    def call(self, *edits: str, device: str = "cpu", **options: str) -> Call:
        """The call; ``edits`` are lines that change ``experts``, options are source text."""
        lines = (
            f"E, O, D, R = {self.experts}, {self.d_out}, {self.d_in}, {self.rank}",
            f"g = torch.Generator().manual_seed({self.seed})",
            "r = lambda *shape: torch.randn(shape, generator=g)",
            *EXPERTS[self.kind],
            *([f"experts = experts.to(torch.{self.dtype})"] if self.dtype != "float32" else []),
            *([f"experts = experts.to({device!r})"] if device != "cpu" else []),
            *LAYOUTS[self.layout],
            *edits,
        )
        given = {"rank": "R", "num_steps": str(self.steps), "lr": repr(self.lr), "seed": "3"}
        given |= options
        return Call(
            "shared_core_fit",
            lines,
            ("experts",),
            tuple(given.items()),
            dtype=getattr(torch, self.dtype),
            case=self,
        )


SIZES = st.sampled_from([(9, 7), (6, 13), (12, 5), (8, 11), (7, 10)])


@st.composite
def _fit_cases(draw: st.DrawFn, fixed: dict[str, Any]) -> FitCase:
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    d_out, d_in = draw(SIZES)
    given.setdefault("d_out", d_out)
    given.setdefault("d_in", d_in)
    choices = {
        "rank": st.integers(1, min(4, given["d_out"], given["d_in"])),
        "experts": st.integers(2, 6),
        "seed": st.integers(0, 2**16),
    }
    return FitCase(**given, **{n: draw(c) for n, c in choices.items() if n not in given})


def fit_cases(**fixed: Any) -> SearchStrategy[FitCase]:
    """Cases of experts; a strategy or a value fixes a field."""
    return _fit_cases(fixed)
