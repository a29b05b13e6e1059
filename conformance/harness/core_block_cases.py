"""Cases of mixture-of-experts blocks whose projections are shared cores.

Tokens are moved so that their logits are well apart: no rounding chooses other experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, shown_case
from conformance.harness.core_cases import FACTORS, PROJECTIONS, cast, equal_sizes
from conformance.harness.qwen2_cases import as_strategy


@dataclass(frozen=True, kw_only=True)
class BlockCase:
    """One block and its input; no token's experts are as good as others."""

    experts: int = 5
    top_k: int = 2
    hidden: int = 9
    intermediate: int = 13
    wrapper_ranks: tuple[int, int, int] = (2, 3, 1)
    """Of the wrappers of gate, up and down. (No ``ranks``: those would be processes.)"""
    batch: int = 2
    tokens: int = 6
    normalize: bool = True
    return_logits: bool = False
    one_expert: bool = False
    """Whether all tokens have the same experts."""
    strength: float = 0.7
    """Of what a wrapper adds, beside the identity."""
    dtype: str = "float32"
    seed: int = 0

    def __repr__(self) -> str:
        """The sizes, and whatever is not at its default."""
        return shown_case(self)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set(equal_sizes(hidden=self.hidden, intermediate=self.intermediate))
        equal |= equal_sizes(hidden=self.hidden, double_intermediate=2 * self.intermediate)
        if self.top_k == self.experts:
            equal.add("all experts")
        if self.top_k == 1:
            equal.add("one expert a token")
        if len(set(self.wrapper_ranks)) == 1:
            equal.add("one rank")
        if self.batch * self.tokens <= 1:
            equal.add("one token")
        return frozenset(equal)

    @property
    def total(self) -> int:
        """Parameters of the block: the router, each core once, and wrappers."""
        width = self.hidden + self.intermediate
        core = self.hidden * self.intermediate
        wrappers = sum(self.experts * 2 * rank * width for rank in self.wrapper_ranks)
        return self.experts * self.hidden + 3 * core + wrappers

    def call(self, dtype: torch.dtype, device: str = "cpu", *edits: str) -> Call:
        """The call that makes the block; ``edits`` are lines behind the factors and ``hidden``."""
        e, h, n = self.experts, self.hidden, self.batch * self.tokens
        order = "torch.randperm(e, generator=g)"
        orders = f"[{order}] * {n}" if self.one_expert else f"[{order} for _ in range({n})]"
        lines = [
            f"g = torch.Generator().manual_seed({self.seed})",
            "r = lambda *shape: torch.randn(shape, generator=g)",
            f"e, s = {e}, {self.strength}",
            "def factors(d_in, d_out, rank):",
            "    u_in, u_out = s * r(e, d_in, rank) / d_in**0.5, s * r(e, d_out, rank) / d_out**0.5",
            "    v_in, v_out = r(e, d_in, rank), r(e, d_out, rank)",
            "    core = 1.5 * r(d_out, d_in) / d_in**0.5",
            "    return dict(core=core, u_in=u_in, v_in=v_in, u_out=u_out, v_out=v_out)",
        ]
        for name, rank in zip(PROJECTIONS, self.wrapper_ranks):
            widths = (h, self.intermediate) if name != "down_proj" else (self.intermediate, h)
            lines.append(f"{name} = factors({widths[0]}, {widths[1]}, {rank})")
        lines += [
            f"router, x = r(e, {h}) / {h} ** 0.5, r({n}, {h})",
            # The logits of a token are 0.4 apart, in an order of its own.
            f"orders = {orders}",
            f"wanted = torch.stack(orders).view({n}, e) * 0.4 - 0.2 * e + 0.05 * r({n}, e)"
            if n
            else f"wanted = r({n}, e)",
            "x = x + (wanted - x @ router.mT) @ torch.linalg.pinv(router).mT",
            f"hidden = x.view({self.batch}, {self.tokens}, {h})",
            *edits,
        ]
        if to := cast(dtype, device):
            listed = ", ".join(PROJECTIONS)
            lines += [
                f"router, hidden = router.to({to}), hidden.to({to})",
                f"{listed} = ({{k: t.to({to}) for k, t in p.items()}} for p in ({listed}))",
            ]
        options = {"top_k": str(self.top_k), "normalize": str(self.normalize)}
        if self.return_logits:
            options["return_logits"] = "True"
        arguments = ("router", *PROJECTIONS)
        made = tuple(options.items())
        return Call("shared_core_block", tuple(lines), arguments, made, dtype, self)


WIDTHS = st.sampled_from([(9, 13), (12, 7), (11, 16), (8, 15), (14, 10)])
"""hidden, intermediate"""
SQUARE = st.sampled_from([(9, 9), (12, 12)])
FUSED = st.sampled_from([(14, 7), (16, 8), (12, 6)])
RANKS = st.permutations([1, 2, 3]).map(tuple)


def block_cases(
    widths: SearchStrategy[tuple[int, int]] = WIDTHS, **fixed: object
) -> SearchStrategy[BlockCase]:
    """Blocks of such widths (hidden, intermediate); a strategy or a value fixes a field."""
    return _block_cases(widths, fixed)


@st.composite
def _block_cases(
    draw: st.DrawFn, widths: SearchStrategy[tuple[int, int]], fixed: Mapping[str, object]
) -> BlockCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    hidden, intermediate = draw(widths)
    experts = given.pop("experts", None) or draw(st.integers(4, min(6, hidden - 1)))
    top_k = given.pop("top_k", None) or draw(st.integers(2, experts - 1))
    top_k = experts if top_k == "all" else top_k
    given = {"hidden": hidden, "intermediate": intermediate} | given
    choices = {
        "wrapper_ranks": RANKS,
        "normalize": st.booleans(),
        "batch": st.integers(1, 3),
        "tokens": st.integers(4, 7),
        "seed": st.integers(0, 2**16),
    }
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in given}
    return BlockCase(experts=experts, top_k=top_k, **given, **drawn)


FACTOR_NAMES = tuple(f"{projection}.{name}" for projection in PROJECTIONS for name in FACTORS)
