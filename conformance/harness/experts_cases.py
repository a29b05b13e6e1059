"""Cases of experts: sizes, routing, layouts and weights, drawn by Hypothesis.

Integer cases have numbers with which every correct implementation computes the same float32 bits, in
any order: all inputs are small integers, and those of the gate are so large that SiLU and GELU have
become exactly max(x, 0) there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, shown_case
from conformance.harness.qwen2_cases import as_strategy

FLOATING = ("hidden", "weights", "gate_up_proj", "down_proj")
ARGUMENTS = ("hidden", "indices", "weights", "gate_up_proj", "down_proj")
GATE_UNIT = 512
"""Factor of the gate's integers: half of it is where float32 rounds SiLU to max(x, 0)."""

ROUTINGS = {
    "distinct": "indices = torch.rand({T}, {E}, generator=g).argsort(-1)[:, :{K}]",
    "any": "indices = torch.randint({E}, ({T}, {K}), generator=g)",
    "one": "indices = torch.full(({T}, {K}), {chosen})",
    # Every token has some expert twice, and not the same one.
    "repeated": "indices = torch.randint({E}, ({T}, {K}), generator=g); "
    "indices[:, -1] = indices[:, 0]",
    "one a token": "indices = torch.randint({E}, ({T}, 1), generator=g).repeat(1, {K})",
    # Experts that are left idle are some in the middle, the first or the last.
    "few": "busy = torch.randperm({E}, generator=g)[:{busy}]; "
    "indices = busy[torch.rand({T}, {busy}, generator=g).argsort(-1)[:, :{K}]]",
    "last": "indices = torch.rand({T}, {E}, generator=g).argsort(-1)[:, :{K}]; "
    "indices[::2, 0] = {E} - 1",
    "in turn": "indices = torch.arange({T} * {K}).view({T}, {K}) * {stride} % {E}",
}
SENTINELS = {
    "none": "",
    "slots": "indices[torch.rand({T}, {K}, generator=g) < 0.3] = {E}; indices[0, -1] = {E}",
    "tokens": "indices[1::3] = {E}",
    "both": "indices[torch.rand({T}, {K}, generator=g) < 0.3] = {E}; indices[1::3] = {E}",
    "all": "indices[:] = {E}",
}
"""Lines that make some slots have no expert."""
WEIGHTS = {
    "spread": "weights = 0.2 + torch.rand({T}, {K}, generator=g)",
    "far from one": "weights = torch.tensor([0.1, 0.5, 2, -0.7, 3])"
    "[torch.randint(5, ({T}, {K}), generator=g)]",
    "some zero": "weights = torch.tensor([0, 0.5, 2])[torch.randint(3, ({T}, {K}), generator=g)]",
    "even": "weights = torch.full(({T}, {K}), 1 / {K})",
    "one": "weights = torch.ones({T}, {K})",
}
INTEGER_WEIGHTS = WEIGHTS | {
    "spread": "weights = torch.tensor([0.5, 2, 4, -1])[torch.randint(4, ({T}, {K}), generator=g)]",
    "some zero": "weights = torch.tensor([0.0, 2, 4])[torch.randint(3, ({T}, {K}), generator=g)]",
}


@dataclass(frozen=True, kw_only=True)
class ExpertsCase:
    """Tokens that are routed, experts, and what their weights look like."""

    tokens: int = 9
    hidden: int = 24
    intermediate: int = 16
    experts: int = 5
    slots: int = 2
    layout: str = "concatenated"
    transposed: bool = False
    activation: str = "silu"
    weight_on_input: bool = False
    routing: str = "distinct"
    sentinels: str = "none"
    weighting: str = "spread"
    wide_weights: bool = False
    """Whether weights are in float32 beside 16-bit inputs."""
    gate_scale: float = 3.0
    """How much larger the gate's weights are than those of up."""
    integers: bool = False
    dtype: str = "float32"
    seed: int = 0

    def __repr__(self) -> str:
        """The sizes, and whatever is not at its default."""
        return shown_case(self, always=5)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set()
        if 2 * self.intermediate == self.hidden:
            equal.add("2 intermediate = hidden")
        if self.intermediate == self.hidden:
            equal.add("intermediate = hidden")
        if self.tokens < 2:
            equal.add("less than two tokens")
        if self.slots == 1:
            equal.add("one slot")
        if self.slots == self.experts:
            equal.add("every expert")
        if self.experts == 1:
            equal.add("one expert")
        if self.weighting == "one":
            equal.add("weights of one")
        if self.sentinels == "all":
            equal.add("nothing but sentinels")
        if self.gate_scale == 1:
            equal.add("gate like up")
        inner = (self.tokens, self.experts)
        if len({*inner, self.hidden}) < 3 or len({*inner, self.intermediate}) < 3:
            equal.add("equal sizes")
        return frozenset(equal)

    @property
    def chosen(self) -> int:
        """An expert: the one that a rule about one of them is about."""
        return self.seed % self.experts

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the output."""
        return self.tokens, self.hidden

    def call(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Call:
        """The call, with floating inputs of ``dtype`` on ``device``."""
        lines = [f"g = torch.Generator().manual_seed({self.seed})"]
        lines += self._integers() if self.integers else self._normal()
        lines += self._routed()
        if self.layout == "interleaved":
            lines.append("gate_up_proj = torch.stack([gate, up], 2).flatten(1, 2)")
        else:
            lines.append("gate_up_proj = torch.cat([gate, up], 1)")
        if self.transposed:
            both = "gate_up_proj.mT.contiguous(), down_proj.mT.contiguous()"
            lines.append(f"gate_up_proj, down_proj = {both}")
        if dtype != torch.float32:
            names = [name for name in FLOATING if name != "weights" or not self.wide_weights]
            listed = ", ".join(names)
            lines.append(f"{listed} = (x.to({dtype}) for x in ({listed}))")
        if device != "cpu":
            listed = ", ".join(ARGUMENTS)
            lines.append(f"{listed} = (x.to('{device}') for x in ({listed}))")
        return Call("experts", tuple(lines), ARGUMENTS, self.options(), dtype, self)

    def _normal(self) -> list[str]:
        """Lines that draw hidden, gate, up and down."""
        shape = f"{self.experts}, {self.intermediate}, {self.hidden}"
        return [
            "r = lambda *shape: torch.randn(shape, generator=g)",
            f"hidden = r({self.tokens}, {self.hidden})",
            f"gate, up = (s * r({shape}) / {self.hidden} ** 0.5 for s in ({self.gate_scale:g}, 1))",
            f"down_proj = r({self.experts}, {self.hidden}, {self.intermediate})"
            f" / {self.intermediate} ** 0.5",
        ]

    def _integers(self) -> list[str]:
        """The same in integers."""
        shape = f"{self.experts}, {self.intermediate}, {self.hidden}"
        return [
            "r = lambda *shape: torch.randint(-2, 3, shape, generator=g).float()",
            f"hidden = r({self.tokens}, {self.hidden})",
            f"gate, up = {GATE_UNIT} * r({shape}), r({shape})",
            f"down_proj = r({self.experts}, {self.hidden}, {self.intermediate})",
        ]

    def _routed(self) -> list[str]:
        """Lines that make indices and weights."""
        sizes = {
            "T": self.tokens,
            "E": self.experts,
            "K": self.slots,
            "chosen": self.chosen,
            "busy": max(self.slots, self.experts // 2),
            "stride": self.experts - 1,
        }
        weights = (INTEGER_WEIGHTS if self.integers else WEIGHTS)[self.weighting]
        made = (ROUTINGS[self.routing], SENTINELS[self.sentinels], weights)
        return [line.format(**sizes) for line in made if line]

    def options(self) -> tuple[tuple[str, str], ...]:
        """The options of the contract, as source text."""
        default = ExpertsCase()
        names = ("layout", "transposed", "activation", "weight_on_input")
        values = {name: getattr(self, name) for name in names}
        given = {n: repr(value) for n, value in values.items() if value != getattr(default, n)}
        return tuple(given.items())


# Strategies

# Multiples of 8: kernels that take rows of 16 bytes alone take them. Other widths have a rule.
HIDDEN = (16, 24, 32, 40)
INTERMEDIATE = (8, 16, 24)
PAIRS = tuple((h, i) for h in HIDDEN for i in INTERMEDIATE if h not in (i, 2 * i))
ODD_PAIRS = ((7, 5), (9, 11), (13, 6), (10, 3), (15, 17), (12, 13), (25, 9))
HALF_PAIRS = ((16, 8), (32, 16), (48, 24))
SQUARE_PAIRS = ((8, 8), (16, 16), (24, 24))
TOKENS = (7, 9, 11, 13)
EXPERTS = (4, 5, 6)


def experts_cases(
    pairs: tuple[tuple[int, int], ...] = PAIRS, **fixed: object
) -> SearchStrategy[ExpertsCase]:
    """Cases with one of these pairs of hidden and intermediate; a strategy or value fixes a field."""
    return _experts_cases(pairs, fixed)


def integer_cases(
    pairs: tuple[tuple[int, int], ...] = PAIRS, **fixed: object
) -> SearchStrategy[ExpertsCase]:
    """The same with integers."""
    return _experts_cases(pairs, {"integers": True, **fixed})


@st.composite
def _experts_cases(
    draw: st.DrawFn, pairs: tuple[tuple[int, int], ...], fixed: Mapping[str, object]
) -> ExpertsCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    given["hidden"], given["intermediate"] = draw(st.sampled_from(pairs))
    choices = {"tokens": _TOKENS, "experts": _EXPERTS, "slots": _SLOTS, "seed": _SEEDS}
    if not given.get("integers"):
        choices["dtype"] = _DTYPES
    for name, choice in choices.items():
        if name not in given:
            given[name] = draw(choice)
    if given["slots"] == 0:
        given["slots"] = given["experts"]
    return ExpertsCase(**given)


_TOKENS, _EXPERTS = st.sampled_from(TOKENS), st.sampled_from(EXPERTS)
_SLOTS = st.sampled_from([2, 2, 3, 1])
_SEEDS = st.integers(0, 2**16)
_DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
EVERY_EXPERT = 0
"""As a number of slots: as many as there are experts."""
