"""Cases of flat layouts: parameters, ranks, and ranks to go on with, drawn by Hypothesis.

No two parameters have the same number of elements. Totals are drawn on both sides of where padding
begins: a whole number of 32 elements a rank, one more, one less, and so few that shards stay empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, shown_case
from conformance.harness.qwen2_cases import as_strategy

NAMES = (
    "head.weight",
    "blocks.1.mlp.bias",
    "embedding.weight",
    "norm.weight",
    "blocks.0.qkv.weight",
    "scale",
    "blocks.1.mlp.weight",
    "blocks.0.qkv.bias",
    "blocks.10.norm.weight",
    "blocks.2.norm.weight",
)
"""In an order that no sorting of names gives."""
PAD_TO = 32
TAILS = ("any", "whole", "one more", "one less")
"""How many elements there are, beside a whole number of 32 a rank."""

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayoutCase:
    """Parameters in the order given, and over how many ranks they are laid out."""

    shapes: tuple[Shape, ...] = ((3,), (5,), (4, 10))
    world: int = 2
    """Data-parallel ranks. (No ``ranks``: those would be processes, and here there are none.)"""
    tensor_world: int = 1
    """Tensor-parallel ranks."""
    dims: tuple[int | None, ...] = ()
    """The axis of each parameter that tensor-parallel ranks split; without any, none is."""
    decay: tuple[bool, ...] | None = None
    sequence: tuple[bool, ...] = ()
    to: tuple[int, int] | None = None
    """The ranks of another layout, which shards are made for: data-parallel, tensor-parallel."""
    dtype: str = "float32"
    seed: int = 0

    def __repr__(self) -> str:
        """The parameters, the ranks, and whatever is not at its default."""
        return shown_case(self, always=2)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set()
        if self.world == 1:
            equal.add("one rank")
        if self.count % (PAD_TO * self.world) == 0:
            equal.add("no padding")
        if len(self.shapes) < 2:
            equal.add("one parameter")
        if self.to is not None and self.world == self.to[0]:
            equal.add("as many ranks")
        return frozenset(equal)

    @property
    def parameters(self) -> dict[str, Shape]:
        """Names and whole shapes."""
        return dict(zip(NAMES, self.shapes))

    @property
    def split(self) -> dict[str, int]:
        """The axes that tensor-parallel ranks split, by name."""
        dims = self.dims or (None,) * len(self.shapes)
        return {name: dim for name, dim in zip(self.parameters, dims) if dim is not None}

    @property
    def count(self) -> int:
        """Elements of all parameters, of one tensor-parallel rank."""
        split = self.split
        return sum(
            math.prod(shape) // (self.tensor_world if name in split else 1)
            for name, shape in self.parameters.items()
        )

    @property
    def chosen(self) -> str:
        """The parameter that a rule about one of them is about: any that has elements."""
        names = [name for name, shape in self.parameters.items() if math.prod(shape)]
        return names[self.seed % len(names)]

    @property
    def indivisible(self) -> list[str]:
        """The parameters with an axis that tensor-parallel ranks do not divide."""
        return [
            name
            for name, dim in self.split.items()
            if self.parameters[name][dim] % self.tensor_world
        ]

    def call(self, *edits: str, **options: str) -> Call:
        """The call that makes the layout; ``edits`` are lines behind ``parameters``."""
        given = {"ranks": str(self.world)}
        if self.tensor_world > 1:
            given["tensor_ranks"] = str(self.tensor_world)
        if self.dims:
            given["tensor_dims"] = "dims"
        if self.decay is not None:
            given["weight_decay"] = repr(dict(zip(self.parameters, self.decay)))
        if self.sequence:
            chosen = [name for name, is_so in zip(self.parameters, self.sequence) if is_so]
            given["sequence_parallel"] = repr(chosen)
        lines = [f"parameters = {self.parameters!r}"]
        if self.dims:
            lines.append(f"dims = {self.split!r}")
        return Call(
            "flat_layout",
            (*lines, *edits),
            ("parameters",),
            tuple((given | options).items()),
            case=self,
        )

    def numbered(self) -> tuple[str, ...]:
        """Lines that make ``values``: every element has its own number, from 1 on."""
        return (
            "values, count = {}, 1",
            "for name, shape in parameters.items():",
            "    size = torch.Size(shape).numel()",
            f"    values[name] = torch.arange(count, count + size, dtype=torch.{self.dtype})"
            ".view(shape)",
            "    count += size",
        )

    def random(self) -> tuple[str, ...]:
        """Lines that make random ``values``."""
        return (
            f"g = torch.Generator().manual_seed({self.seed})",
            f"values = {{name: torch.randn(shape, generator=g).to(torch.{self.dtype})"
            " for name, shape in parameters.items()}",
        )


# Strategies

VECTORS = st.integers(1, 60).map(lambda n: (n,))
MATRICES = st.tuples(st.integers(2, 9), st.integers(3, 13))
CUBES = st.tuples(st.integers(2, 4), st.integers(2, 5), st.integers(3, 6))
SHAPES = st.one_of(VECTORS, MATRICES, MATRICES, CUBES, st.sampled_from([(), (0, 3), (4, 0)]))
FEW = st.one_of(st.integers(1, 9).map(lambda n: (n,)), st.just((2, 5)), st.just(()))
WORLDS = st.sampled_from([2, 3, 4, 5, 7, 8])


def layout_cases(
    shape: SearchStrategy[Shape] = SHAPES,
    *,
    least: int = 2,
    most: int = 6,
    tail: str | SearchStrategy[str] = "any",
    **fixed: object,
) -> SearchStrategy[LayoutCase]:
    """Cases with parameters of such a shape; a strategy or a value fixes a field.

    ``tail``: how many elements there are beside a whole number of 32 a rank, one of ``TAILS``; a
    last parameter is added to that end.
    """
    return _layout_cases(shape, (least, most), tail, fixed)


@st.composite
def _layout_cases(
    draw: st.DrawFn,
    shape: SearchStrategy[Shape],
    numbers: tuple[int, int],
    tail: str | SearchStrategy[str],
    fixed: Mapping[str, object],
) -> LayoutCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    given.setdefault("world", draw(WORLDS))
    given.setdefault("seed", draw(st.integers(0, 2**16)))
    if "shapes" not in given:
        listed = st.lists(shape, min_size=numbers[0], max_size=numbers[1], unique_by=math.prod)
        given["shapes"] = tuple(draw(listed))
    return ending(LayoutCase(**given), draw(as_strategy(tail)))


def ending(case: LayoutCase, tail: str) -> LayoutCase:
    """The case with a last parameter, of such a size that the total ends as it is told to."""
    if tail == "any":
        return case
    unit = PAD_TO * case.world
    more = (1 if tail == "one more" else -1 if tail == "one less" else 0) - case.count
    sizes = {math.prod(shape) for shape in case.shapes}
    size = more % unit or unit
    while size in sizes:
        size += unit
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    return LayoutCase(**(values | {"shapes": (*case.shapes, (size,))}))


TENSOR_WORLDS = st.sampled_from([2, 3])


def split_cases(
    tensor_world: SearchStrategy[int] | int = TENSOR_WORLDS, **fixed: object
) -> SearchStrategy[LayoutCase]:
    """Cases with parameters split along outer and inner axes, and whole ones among them."""
    return _split_cases(as_strategy(tensor_world), fixed)


DIVIDED = 6
"""Axes that are split have a multiple of it: one, two and three ranks divide them."""


@st.composite
def _split_cases(
    draw: st.DrawFn, tensor_world: SearchStrategy[int], fixed: Mapping[str, object]
) -> LayoutCase:
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    kinds = ["outer", "inner", "whole", *draw(MORE_KINDS)]
    drawn, seen = [], set()
    for kind in draw(st.permutations(kinds)):
        shape, dim = draw(SPLIT_SHAPES[kind])
        if dim is not None:
            shape = (*shape[:dim], shape[dim] * DIVIDED, *shape[dim + 1 :])
        while math.prod(shape) in seen:
            at = 0 if dim != 0 else len(shape) - 1
            longer = DIVIDED if at == dim else 1
            shape = (*shape[:at], shape[at] + longer, *shape[at + 1 :])
        seen.add(math.prod(shape))
        drawn.append((shape, dim))
    return LayoutCase(
        shapes=tuple(shape for shape, _ in drawn),
        dims=tuple(dim for _, dim in drawn),
        tensor_world=draw(tensor_world),
        world=given.pop("world", draw(st.sampled_from([1, 2, 3]))),
        seed=draw(st.integers(0, 2**16)),
        **given,
    )


MORE_KINDS = st.lists(st.sampled_from(["outer", "inner", "whole"]), max_size=2)
SPLIT_SHAPES = {
    "outer": st.tuples(st.tuples(st.integers(1, 2), st.integers(3, 7)) | st.just((1,)), st.just(0)),
    "inner": st.one_of(
        st.tuples(st.tuples(st.integers(2, 7), st.just(1)), st.just(1)),
        st.tuples(st.tuples(st.integers(2, 3), st.just(1), st.integers(2, 4)), st.just(1)),
    ),
    "whole": st.tuples(VECTORS | MATRICES, st.none()),
}


def sorted_cases(splits: bool = True, **fixed: object) -> SearchStrategy[LayoutCase]:
    """Cases whose parameters are sorted: every mixture of decay, split and sequence parallel."""
    return _sorted_cases(splits, fixed)


@st.composite
def _sorted_cases(draw: st.DrawFn, splits: bool, fixed: Mapping[str, object]) -> LayoutCase:
    number = draw(st.integers(6, 10))
    shapes = tuple(draw(st.permutations([(2 * i + 2, 3) for i in range(number)])))
    # Both kinds are there, and not the ones behind the others: sorting changes the order.
    decay = [True, False, *draw(booleans(number - 3)), False]
    dims: tuple[int | None, ...] = ()
    sequence: tuple[bool, ...] = ()
    if splits:
        dims = tuple(0 if split else None for split in draw(booleans(number)))
        sequence = tuple(draw(booleans(number)))
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    tensor = draw(st.sampled_from([1, 2])) if splits else 1
    return LayoutCase(
        shapes=shapes,
        dims=dims,
        decay=tuple(decay),
        sequence=sequence,
        tensor_world=tensor,
        world=draw(st.sampled_from([1, 2, 3])),
        **given,
    )


def booleans(number: int) -> SearchStrategy[list[bool]]:
    """A list of so many."""
    return st.lists(st.booleans(), min_size=number, max_size=number)
