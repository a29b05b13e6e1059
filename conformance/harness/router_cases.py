"""Cases of routing: logits whose choice is clear, or just not, and the options of a router.

Axes are T tokens and E experts. By default the logits of a token are the experts in random order, a
step apart and a little off, so that neither rounding nor the approximation of an exponential changes
which are chosen, and the chosen ones have far from all of the probability.
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

DTYPES = ("float32", "bfloat16", "float16")
EXPERTS = (6, 8, 12, 16, 24)
TOKENS = (5, 7, 9, 11, 13)
GROUPED = ((2, 3), (3, 2), (2, 4), (3, 4), (4, 3), (4, 4), (6, 2))
"""Groups, and experts of each."""
NEXT = {"float32": 2.0**-12, "float16": 2.0**-12, "bfloat16": 2.0**-9}
"""Between 1/4 and 1/2: from a number to the next, in float32 a few thousand further."""


@dataclass(frozen=True, kw_only=True)
class RouterCase:
    """One call of a router; every field but the sizes is off by default."""

    tokens: int = 5
    experts: int = 8
    top_k: int = 3
    dtype: str = "float32"
    seed: int = 0
    score: str = "softmax"
    normalize: bool = False
    bias: str | None = None
    """``random``; ``negative`` (every score with its bias is below 0); ``large`` (so far from 0
    that 16 bits do not tell the biases apart); ``constant``."""
    groups: tuple[int, int] | None = None
    scaling: float = 1.0
    loss: bool = False
    logits: str = "spread"
    """``spread``; ``close`` (neighbours in the 16-bit dtype); ``tied`` (a few levels); ``equal``;
    ``large`` (up to ±10⁴); ``masked`` (-inf for some experts); ``alike`` (the same order of experts
    for every token); ``rolled`` (every expert once in every place)."""

    def __repr__(self) -> str:
        """The sizes, and whatever else is not at its default."""
        return shown_case(self, always=4)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong routers give the right answer."""
        sizes = {"tokens": self.tokens, "experts": self.experts, "top_k": self.top_k}
        names = list(sizes)
        equal = {
            f"{a} = {b}"
            for at, a in enumerate(names)
            for b in names[at + 1 :]
            if sizes[a] == sizes[b]
        }
        if self.top_k == 1:
            equal.add("one expert a token")
        if self.tokens == 1:
            equal.add("one token")
        if self.groups is not None and self.groups[0] == self.groups[1]:
            equal.add("every group kept")
        return frozenset(equal)

    def call(self, dtype: torch.dtype, device: str = "cpu") -> Call:
        """The call, with logits of ``dtype`` on ``device``; biases are in float32 as they are kept."""
        lines = [f"g = torch.Generator().manual_seed({self.seed})", *self.logit_lines(dtype)]
        if dtype != torch.float32:
            lines.append(f"logits = logits.to({dtype})")
        options = {"top_k": str(self.top_k)}
        if self.score != "softmax":
            options["score"] = repr(self.score)
        if self.normalize:
            options["normalize"] = "True"
        if self.bias is not None:
            lines.append(f"bias = {bias_source(self.bias, self.experts)}")
            options["selection_bias"] = "bias"
        if self.groups is not None:
            options["groups"] = repr(self.groups)
        if self.scaling != 1:
            options["scaling_factor"] = repr(self.scaling)
        if self.loss:
            options["return_balancing_loss"] = "True"
        if device != "cpu":
            tensors = ["logits"] + ["bias"] * (self.bias is not None)
            lines += [f"{name} = {name}.to('{device}')" for name in tensors]
        return Call("moe_router", tuple(lines), ("logits",), tuple(options.items()), dtype, self)

    def logit_lines(self, dtype: torch.dtype) -> list[str]:
        """Lines that make ``logits`` [tokens, experts] in float32."""
        shape = (self.tokens, self.experts)
        order = f"order = torch.rand({shape}, generator=g).argsort(-1)"
        if self.logits == "equal":
            return [
                f"logits = torch.randn({self.tokens}, 1, generator=g).repeat(1, {self.experts})"
            ]
        if self.logits == "tied":
            return [f"logits = torch.randint(-2, 2, {shape}, generator=g) * 0.75"]
        if self.logits == "close":
            # A softmax in 16 bits makes several of them equal.
            step = NEXT[str(dtype).removeprefix("torch.")]
            return [order, f"logits = 0.25 + order * {step}"]
        if self.logits == "alike":
            order = f"order = torch.randperm({self.experts}, generator=g).repeat({self.tokens}, 1)"
        if self.logits == "rolled":
            step, low = spacing(self.experts)
            first = f"torch.randperm({self.experts}, generator=g)"
            return [
                f"row = {first} * {step} - {low}",
                f"logits = torch.stack([row.roll(token) for token in range({self.tokens})])",
            ]
        step, low = spacing(self.experts)
        if self.logits == "large":
            step, low = round(20_000 / self.experts), 10_000
        lines = [
            order,
            f"logits = (order + 0.5 * torch.rand({shape}, generator=g)) * {step} - {low}",
        ]
        if self.logits == "masked":
            kept = f"torch.rand({shape}, generator=g).argsort(-1) < {self.top_k + 1}"
            lines.append(f"logits = logits.masked_fill(~({kept}), -torch.inf)")
        return lines


def spacing(experts: int) -> tuple[float, float]:
    """From a logit to the next, and what is taken from all; not symmetric about 0."""
    step = min(0.25, 6 / experts)
    return step, step * experts / 2 + 0.3


def bias_source(kind: str, experts: int) -> str:
    """The expression for a ``selection_bias`` [experts] in float32."""
    if kind == "constant":
        return f"torch.full(({experts},), 0.5)"
    if kind == "negative":
        return f"-1.5 - 0.3 * torch.rand({experts}, generator=g)"
    if kind == "large":
        return f"30 + 0.1 * torch.rand({experts}, generator=g)"
    return f"0.4 * torch.randn({experts}, generator=g)"


def router_cases(**fixed: Any) -> SearchStrategy[RouterCase]:
    """Cases in which a strategy or a value fixes a field.

    Without ``groups`` there are none; ``groups="any"`` draws them, some of them not kept.
    """
    return _router_cases(fixed)


@st.composite
def _router_cases(draw: st.DrawFn, fixed: Mapping[str, Any]) -> RouterCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    choices = 0
    if given.get("groups") == "any":
        number, size = draw(st.sampled_from(GROUPED))
        kept = draw(st.integers(1, number - 1))
        given |= {"groups": (number, kept), "experts": number * size}
        choices = kept * size
    convenient = draw(st.integers(0, 5)) == 5
    given.setdefault("experts", 8 if convenient else draw(st.sampled_from(EXPERTS)))
    most = min(choices or given["experts"] - 1, 5)
    given.setdefault("top_k", min(2, most) if convenient else draw(st.integers(min(2, most), most)))
    taken = {given["experts"], given["top_k"]}
    given.setdefault(
        "tokens", 8 if convenient else draw(TOKEN_COUNTS.filter(lambda n: n not in taken))
    )
    given.setdefault("dtype", draw(ANY_DTYPE))
    given.setdefault("seed", draw(SEEDS))
    return RouterCase(**given)


TOKEN_COUNTS = st.sampled_from(TOKENS)
ANY_DTYPE = st.sampled_from(DTYPES)
SEEDS = st.integers(0, 2**16)
