"""Cases of sharded models: modules, what is tied and frozen, ranks, and what they are trained on.

The modules are an embedding with a norm, gated blocks, and a norm with a head: enough to have
parameters of one axis and of two, and sizes that no number of ranks divides. Every rank has inputs of
its own.
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

WORLDS = (2, 3, 4)
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
ADAMW = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}
PLAIN_SGD = {"name": "sgd", "lr": 0.05}
ALIGNMENT = 32
"""Elements that shards are padded to in the reference: models of fewer leave ranks without any."""


@dataclass(frozen=True, kw_only=True)
class FlatCase:
    """A model, the ranks that share it, and a few batches for each of them."""

    ranks: int = 2
    vocab: int = 23
    width: int = 10
    hidden: int = 14
    blocks: int = 1
    tied: bool = False
    """Whether the head is the embedding."""
    tiny: bool = False
    """A single linear layer of few elements: most ranks have nothing."""
    frozen: tuple[int, ...] = ()
    """Numbers of the parameters that do not train, among :meth:`names`, counted round."""
    unused: bool = False
    """Whether there is a parameter that no output depends on."""
    sometimes: bool = False
    """Whether that parameter is added to the outputs of some batches, and of others not."""
    optimizer: Mapping[str, Any] | None = None
    buffers: int | None = None
    compute: str = "float32"
    micro_batches: int = 2
    steps: int = 2
    """Batches of each rank: ``steps * micro_batches``."""
    batch: int = 3
    tokens: int = 5
    seed: int = 0
    extra: tuple[tuple[str, int], ...] = ()
    """Numbers that one requirement alone draws."""

    def __repr__(self) -> str:
        """The ranks, and whatever is not at its default."""
        return shown_case(self, always=1)

    def __hash__(self) -> int:
        """Of what is shown: an optimizer is a mapping."""
        return hash(repr(self))

    @property
    def drawn(self) -> dict[str, int]:
        """The numbers of ``extra`` by name."""
        return dict(self.extra)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set()
        if self.ranks == 1:
            equal.add("one rank")
        if self.tiny:
            equal.add("few elements")
        if self.optimizer and self.steps < 2:
            equal.add("one step")
        return frozenset(equal)

    # Parameters

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its name in ``nn.Sequential(*modules)``; tied ones once."""
        vocab, width, hidden = self.vocab, self.width, self.hidden
        if self.tiny:
            made = {"0.0.weight": (3, 2), "0.0.bias": (3,)}
            return made | ({"0.unused": (2,)} if self.unused else {})
        made = {"0.0.weight": (vocab, width), "0.1.weight": (width,), "0.1.bias": (width,)}
        for block in range(1, self.blocks + 1):
            made |= {f"{block}.0.weight": (hidden, width), f"{block}.0.bias": (hidden,)}
            made |= {f"{block}.2.weight": (width, hidden), f"{block}.2.bias": (width,)}
            if self.unused and block == 1:
                # A parameter of a module itself comes before those of its parts.
                made = {"0.0.weight": made.pop("0.0.weight")} | made
        last = self.blocks + 1
        made |= {f"{last}.0.weight": (width,), f"{last}.0.bias": (width,)}
        if not self.tied:
            made[f"{last}.1.weight"] = (vocab, width)
        made[f"{last}.1.bias"] = (vocab,)
        if self.unused:
            made["1.unused"] = (hidden, 2)
        return made

    def names(self) -> list[str]:
        """Names of all parameters, tied ones once, in no order that means anything."""
        return list(self.shapes())

    def frozen_names(self) -> list[str]:
        """Names of those that do not train."""
        names = self.names()
        return sorted({names[number % len(names)] for number in self.frozen})

    def trained_names(self) -> list[str]:
        """Names of those that train."""
        frozen = set(self.frozen_names())
        return [name for name in self.names() if name not in frozen]

    @property
    def stages(self) -> int:
        """How many modules there are."""
        return 1 if self.tiny else self.blocks + 2

    # Source text

    def module_lines(self) -> list[str]:
        """Python that makes ``modules``."""
        vocab, width, hidden = self.vocab, self.width, self.hidden
        if self.tiny:
            lines = ["modules = [nn.Sequential(nn.Linear(2, 3))]"]
        else:
            there, back = f"nn.Linear({width}, {hidden})", f"nn.Linear({hidden}, {width})"
            block = f"nn.Sequential({there}, nn.GELU(), {back})"
            lines = [
                f"modules = [nn.Sequential(nn.Embedding({vocab}, {width}), nn.LayerNorm({width}))]",
                f"modules += [{block} for _ in range({self.blocks})]",
                f"modules += [nn.Sequential(nn.LayerNorm({width}), nn.Linear({width}, {vocab}))]",
            ]
        if self.unused:
            place, shape = (0, "2") if self.tiny else (1, f"{hidden}, 2")
            given = f"nn.Parameter(torch.empty({shape}))"
            lines.append(f"modules[{place}].register_parameter('unused', {given})")
        if self.sometimes:
            lines += SOMETIMES
        if self.tied:
            lines.append("modules[-1][1].weight = modules[0][0].weight")
        lines += [
            "parameters = dict(nn.Sequential(*modules).named_parameters())",
            "for p in parameters.values(): p.data = 0.5 * r(*p.shape)",
        ]
        if self.frozen:
            lines.append(
                f"for name in {self.frozen_names()}: parameters[name].requires_grad_(False)"
            )
        return lines

    def input_lines(self) -> list[str]:
        """Python that makes ``inputs`` and ``upstream``, of each rank a list of batches."""
        leading = f"{self.batch}, {self.tokens}"
        each = f"for _ in range({self.steps * self.micro_batches})] for _ in range({self.ranks})]"
        x = f"torch.randint({self.vocab}, ({leading}), generator=g)"
        x, out = (f"r({leading}, 2)", 3) if self.tiny else (x, self.vocab)
        return [
            f"inputs = [[{x} {each}",
            # The loss is the sum of output times upstream: its gradient does not vanish.
            f"upstream = [[r({leading}, {out}) / {self.batch * self.tokens} {each}",
        ]

    def call(self, *edits: str, **options: str) -> Call:
        """The call that makes the model; ``edits`` are lines that change what the others made."""
        alone = ("rank = 0",) if self.ranks == 1 else ()  # of several, the group says which
        lines = (
            "nn = torch.nn",
            *alone,
            f"g = torch.Generator().manual_seed({self.seed})",
            "r = lambda *shape: torch.randn(shape, generator=g)",
            *self.module_lines(),
            *self.input_lines(),
            *edits,
        )
        given = self.options() | options
        dtype = getattr(torch, self.compute)
        return Call("flat_shards", lines, ("modules",), tuple(given.items()), dtype, self)

    def options(self) -> dict[str, str]:
        """The options of the contract that the case needs, as source text."""
        given = {}
        if self.optimizer is not None:
            given["optimizer"] = repr(dict(self.optimizer))
        if self.compute != "float32":
            given["compute_dtype"] = f"torch.{self.compute}"
        if self.buffers is not None:
            given["buffers"] = str(self.buffers)
        return given


def flat_cases(ranks: tuple[int, ...] = WORLDS, **fixed: Any) -> SearchStrategy[FlatCase]:
    """Cases on any of ``ranks``; a strategy or a value fixes a field."""
    return _flat_cases(ranks, fixed)


@st.composite
def _flat_cases(draw: st.DrawFn, ranks: tuple[int, ...], fixed: Mapping[str, Any]) -> FlatCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    if given.get("tiny"):
        given["tied"] = False
    choices = {
        "ranks": st.sampled_from(ranks),
        "vocab": st.integers(17, 29),
        "width": st.sampled_from([10, 7, 13]),
        "hidden": st.sampled_from([14, 9, 11]),
        "blocks": st.sampled_from([1, 2]),
        "tied": st.booleans(),
        "frozen": FROZEN,
        "seed": st.integers(0, 2**16),
    }
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in given}
    return FlatCase(**given, **drawn)


SOMETIMES = (
    "class Sometimes(nn.Sequential):",
    "    def forward(self, x):",
    "        y = super().forward(x)",
    "        return y + x * self.unused.sum() if x[0, 0, 0] > x[0, 1, 0] else y",
    "modules[1].__class__ = Sometimes",
)
"""Lines after which a module adds its ``unused`` parameter for about half of all batches."""

FROZEN = st.one_of(
    st.just(()), st.lists(st.integers(0, 20), min_size=1, max_size=4, unique=True).map(tuple)
)
"""Which parameters are frozen: often none, or some."""
