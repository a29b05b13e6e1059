"""Cases of mixture-of-experts blocks: sizes, options, and hidden states whose routing is clear.

Axes are B batch rows, T tokens, H hidden, E experts, I intermediate. The rows of the router are
orthonormal, and along them hidden states are set so that the logits of a token are a step apart: in
16 bits, where logits are rounded, experts are chosen as in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, shown_case
from conformance.harness.qwen2_cases import as_strategy
from conformance.harness.router_cases import ANY_DTYPE, GROUPED, SEEDS, bias_source, spacing

HIDDEN = (20, 24, 28)
EXPERTS = (6, 8, 12, 16)
INTERMEDIATE = (5, 7, 11, 18)
"""No half of a hidden size, nor one itself."""
SHAPES = ((2, 5), (2, 7), (3, 4), (3, 5), (4, 3))
"""Batch rows and tokens."""


@dataclass(frozen=True, kw_only=True)
class BlockCase:
    """One call of a block; every field but the sizes is off by default."""

    batch: int = 2
    tokens: int = 5
    hidden: int = 20
    intermediate: int = 7
    experts: int = 8
    top_k: int = 3
    dtype: str = "float32"
    seed: int = 0
    score: str = "softmax"
    normalize: bool = False
    bias: str | None = None
    groups: tuple[int, int] | None = None
    scaling: float = 1.0
    shared: int | None = None
    """The width of an expert that every token goes to."""
    shared_gate: bool = False
    routing: str = "spread"
    """``alike``: all tokens have the same order of experts."""

    def __repr__(self) -> str:
        """The sizes, and whatever else is not at its default."""
        return shown_case(self, always=7)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong blocks give the right answer."""
        equal = set()
        for a, b in (
            ("batch", "tokens"),
            ("experts", "top_k"),
            ("batch", "experts"),
            ("experts", "hidden"),
        ):
            if getattr(self, a) == getattr(self, b):
                equal.add(f"{a} = {b}")
        if 2 * self.intermediate == self.hidden:
            equal.add("2 intermediate = hidden")
        if self.intermediate == self.hidden:
            equal.add("intermediate = hidden")
        if self.shared == self.intermediate:
            equal.add("shared = intermediate")
        if self.top_k == 1:
            equal.add("one expert a token")
        if self.batch * self.tokens == 1:
            equal.add("one token")
        return frozenset(equal)

    def call(self, dtype: torch.dtype, device: str = "cpu") -> Call:
        """The call, with tensors of ``dtype`` on ``device``; the bias stays in float32."""
        names = ["hidden", "router", "gate_up_proj", "down_proj"]
        lines, options = self._weights(), {"top_k": str(self.top_k)}
        for name, value in (("score", self.score), ("groups", self.groups)):
            if value not in (None, "softmax"):
                options[name] = repr(value)
        if self.normalize:
            options["normalize"] = "True"
        if self.scaling != 1:
            options["scaling_factor"] = repr(self.scaling)
        if self.shared is not None:
            lines += self._shared()
            names += ["shared_gate_up", "shared_down"]
            options["shared"] = "(shared_gate_up, shared_down)"
        if self.shared_gate:
            lines.append(
                f"shared_gate = torch.randn(1, {self.hidden}, generator=g) * {self.hidden**-0.5:.3f}"
            )
            names.append("shared_gate")
            options["shared_gate"] = "shared_gate"
        if dtype != torch.float32:
            lines.append(f"{', '.join(names)} = (x.to({dtype}) for x in ({', '.join(names)}))")
        if self.bias is not None:
            lines.append(f"bias = {bias_source(self.bias, self.experts)}")
            names.append("bias")
            options["selection_bias"] = "bias"
        if device != "cpu":
            lines.append(f"{', '.join(names)} = (x.to('{device}') for x in ({', '.join(names)}))")
        arguments = ("hidden", "router", "gate_up_proj", "down_proj")
        return Call("moe_block", tuple(lines), arguments, tuple(options.items()), dtype, self)

    def _weights(self) -> list[str]:
        """Lines that make the arguments, in float32."""
        hidden, experts, width = self.hidden, self.experts, self.intermediate
        count = self.batch * self.tokens
        step, low = spacing(experts)
        order = f"order = torch.rand({count}, {experts}, generator=g).argsort(-1)"
        if self.routing == "alike":
            order = f"order = torch.randperm({experts}, generator=g).repeat({count}, 1)"
        return [
            f"g = torch.Generator().manual_seed({self.seed})",
            f"router = torch.linalg.qr(torch.randn({hidden}, {experts}, generator=g))[0].T"
            ".contiguous()",
            f"hidden = torch.randn({count}, {hidden}, generator=g)",
            order,
            f"logits = (order + 0.5 * torch.rand({count}, {experts}, generator=g)) * {step} - {low}",
            "hidden = (hidden + (logits - hidden @ router.T) @ router)"
            f".view({self.batch}, {self.tokens}, {hidden})",
            f"gate_up_proj = torch.randn({experts}, {2 * width}, {hidden}, generator=g)"
            f" * {1.5 * hidden**-0.5:.3f}",
            f"down_proj = torch.randn({experts}, {hidden}, {width}, generator=g)"
            f" * {2 * width**-0.5:.3f}",
        ]

    def _shared(self) -> list[str]:
        hidden, width = self.hidden, self.shared
        return [
            f"shared_gate_up = torch.randn({2 * width}, {hidden}, generator=g)"
            f" * {1.5 * hidden**-0.5:.3f}",
            f"shared_down = torch.randn({hidden}, {width}, generator=g) * {width**-0.5:.3f}",
        ]


def block_cases(**fixed: Any) -> SearchStrategy[BlockCase]:
    """Cases in which a strategy or a value fixes a field; ``groups="any"`` draws groups.

    ``shared="any"`` draws a width other than that of the experts, and with ``shared_gate`` either
    both or neither of the two.
    """
    return _block_cases(fixed)


@st.composite
def _block_cases(draw: st.DrawFn, fixed: Mapping[str, Any]) -> BlockCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    choices = 0
    if given.get("groups") == "any":
        number, size = draw(st.sampled_from(GROUPED))
        kept = draw(st.integers(1, number - 1))
        given |= {"groups": (number, kept), "experts": number * size}
        choices = kept * size
    given.setdefault("experts", draw(st.sampled_from(EXPERTS)))
    most = min(choices or given["experts"] - 1, 4)
    given.setdefault("top_k", draw(st.integers(min(2, most), most)))
    if "batch" not in given and "tokens" not in given:
        given["batch"], given["tokens"] = draw(st.sampled_from(SHAPES))
    given.setdefault("hidden", draw(st.sampled_from(HIDDEN)))
    given.setdefault("intermediate", draw(st.sampled_from(INTERMEDIATE)))
    if given.get("shared") == "any":
        given["shared"] = draw(
            st.sampled_from([n for n in (6, 9, 13) if n != given["intermediate"]])
        )
    if given.get("shared") is None:
        given["shared_gate"] = False
    given.setdefault("dtype", draw(ANY_DTYPE))
    given.setdefault("seed", draw(SEEDS))
    return BlockCase(**given)
