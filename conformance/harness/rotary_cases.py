"""Cases of rotary embedding: sizes, options and a seed, drawn by Hypothesis, and their call."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, shown_case
from reference_impl.rotary import LAYOUTS, Rotary, default_frequencies

# The first of each, to which cases shrink, tells most bugs from the right answer.
BATCHES = (2, 3, 5)
HEADS = (3, 4, 6, 2)
WIDTHS = (8, 12, 10, 16, 36, 64)
THETAS = (500.0, 5e5, 1e6, 160000.0)
DTYPES = ("float32", "bfloat16", "float16")
POSITIONS = ("sequence", "offset", "per-row", "shuffled", "repeated", "left-padded", "far")
MEMORY = ("contiguous", "transposed", "expanded", "expanded-heads", "fused", "offset")
RULES = ("linear", "dynamic", "yarn", "llama3", "longrope")

FARTHEST = 2**17
"""Positions stay below this, the context length of current models."""

Pairs = tuple[tuple[str, Any], ...]
"""A table as a hashable tuple of its items."""


@dataclass(frozen=True, kw_only=True)
class RotaryCase:
    """One call of rotary embedding."""

    batch: int = 2
    heads: int = 3
    tokens: int = 5
    head_dim: int = 8
    dtype: str = "float32"
    seed: int = 0
    theta: float | None = 500.0
    """None is left out of the call."""
    layout: str = "half"
    rotary_dim: int | None = None
    scaling: Pairs | None = None
    layers: tuple[tuple[str, Pairs | None], ...] | None = None
    layer_type: str | None = None
    positions: str = "sequence"
    """``sequence`` from 0; ``offset``: from ``start``; ``per-row``: each row from elsewhere;
    ``shuffled``; ``repeated``: the same position several times; ``left-padded``: each row from 0
    behind its padding, which is at 0; ``far``: as per-row, beyond what 16 bits can count."""
    start: int = 0
    memory: str = "contiguous"
    """``transposed`` ([batch, tokens, heads, width] in memory), ``expanded`` (stride 0 over the
    batch), ``expanded-heads``, ``fused`` (a slice of a QKV buffer) or ``offset`` (inside a larger
    storage)."""

    def __repr__(self) -> str:
        """The sizes, and whatever else is not at its default."""
        return shown_case(self, always=7)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        sizes = {"batch": self.batch, "heads": self.heads, "tokens": self.tokens}
        equal = {f"{a} = {b}" for a, b in itertools.combinations(sizes, 2) if sizes[a] == sizes[b]}
        equal |= {f"one of {name}" for name, size in sizes.items() if size == 1}
        if self.layers is None:
            if self.theta in (None, 10000.0):
                equal.add("theta = 10000")
            if (self.rotary_dim or self.head_dim) == 2:
                equal.add("one pair of channels")
        if self.scaling is not None:
            equal |= self._confusable_scaling()
        if self.largest_position() == 0:
            equal.add("only position 0")
        return frozenset(equal)

    def _confusable_scaling(self) -> set[str]:
        scaling, width = dict(self.scaling), self.rotary_dim or self.head_dim
        theta, length = self.theta or 10000.0, self.largest_position() + 1
        frequencies, factor = Rotary().frequencies(width, theta, self.layout, scaling, length)
        ratio = frequencies / default_frequencies(width, theta)
        if factor == 1 and bool((ratio == 1).all()):
            return {"scaling changes nothing"}
        if scaling["rope_type"] == "llama3":
            slow, fast = ratio * scaling["factor"] <= 1 + 1e-9, ratio >= 1 - 1e-9
            if not (slow.any() and fast.any() and (~slow & ~fast).any()):
                return {"a band without a pair"}
        return set()

    def position_rows(self) -> list[list[int]]:
        """The positions of each batch row."""
        random, tokens = Random(self.seed), self.tokens
        rows = []
        for row in range(self.batch):
            if self.positions in ("sequence", "offset"):
                rows.append([self.start + t for t in range(tokens)])
            elif self.positions in ("per-row", "far"):
                first = self.start + row * random.randint(1, 2 * tokens)
                rows.append([first + t for t in range(tokens)])
            elif self.positions == "shuffled":
                rows.append([self.start + p for p in random.sample(range(4 * tokens), tokens)])
            elif self.positions == "repeated":
                few = random.sample(range(1, 4 * tokens), max(1, tokens // 2))
                rows.append([self.start + random.choice(few) for _ in range(tokens)])
            else:  # left-padded, a different amount in each row
                padding = (row + self.seed) % tokens
                rows.append([max(t - padding, 0) for t in range(tokens)])
        return rows

    def largest_position(self) -> int:
        """The largest position of the call."""
        return max(map(max, self.position_rows()))

    def options(self) -> dict[str, str]:
        """The options of the call as source text."""
        options = {}
        if self.layers is not None:
            layers = {name: None if t is None else table(t) for name, t in self.layers}
            return {"layers": repr(layers), "layer_type": repr(self.layer_type)}
        if self.theta is not None:
            options["theta"] = repr(self.theta)
        if self.layout != "half":
            options["layout"] = repr(self.layout)
        if self.rotary_dim is not None:
            options["rotary_dim"] = repr(self.rotary_dim)
        if self.scaling is not None:
            options["scaling"] = repr(table(self.scaling))
        return options

    def input_lines(self, dtype: torch.dtype, device: str = "cpu") -> list[str]:
        """The lines that build ``x`` and ``positions``."""
        lines = [
            f"g = torch.Generator().manual_seed({self.seed})",
            f"x = torch.randn({self._drawn_shape()}, generator=g)",
            self._positions_line(),
        ]
        if dtype != torch.float32:
            lines.append(f"x = x.to({dtype})")
        if device != "cpu":
            lines.append(f"x, positions = (t.to('{device}') for t in (x, positions))")
        return lines + self._memory_lines()

    def call(self, dtype: torch.dtype, device: str = "cpu") -> Call:
        """The call, with inputs of ``dtype`` on ``device``."""
        lines = tuple(self.input_lines(dtype, device))
        return Call("rotary", lines, ("x", "positions"), tuple(self.options().items()), dtype, self)

    def _drawn_shape(self) -> tuple[int, ...]:
        batch = 1 if self.memory == "expanded" else self.batch
        heads = 1 if self.memory == "expanded-heads" else self.heads
        return batch, heads, self.tokens, self.head_dim

    def _positions_line(self) -> str:
        if self.positions in ("sequence", "offset"):
            span = f"{self.start}, {self.start + self.tokens}"
            return f"positions = torch.arange({span}).repeat({self.batch}, 1)"
        if self.positions in ("per-row", "far"):
            first = [row[:1] for row in self.position_rows()]
            return f"positions = torch.tensor({first}) + torch.arange({self.tokens})"
        return f"positions = torch.tensor({self.position_rows()})"

    def _memory_lines(self) -> list[str]:
        if self.memory == "transposed":
            return ["x = x.transpose(1, 2).contiguous().transpose(1, 2)"]
        if self.memory == "expanded":
            return [f"x = x.expand({self.batch}, -1, -1, -1)"]
        if self.memory == "expanded-heads":
            return [f"x = x.expand(-1, {self.heads}, -1, -1)"]
        if self.memory == "fused":  # [batch, tokens, heads * width] as a QKV projection leaves
            return [
                "rows = x.transpose(1, 2).flatten(2)",
                "x = torch.cat([rows, rows], dim=-1)[..., rows.shape[-1]:]"
                f".unflatten(-1, ({self.heads}, -1)).transpose(1, 2)",
            ]
        if self.memory == "offset":
            return ["x = torch.nn.functional.pad(x, (3, 1, 2, 1))[..., 2:-1, 3:-1]"]
        return []


def table(pairs: Pairs) -> dict[str, Any]:
    """The table of which ``pairs`` are the items, as a JSON file holds it."""
    return {
        name: table(value)
        if name == "scaling" and value is not None
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in pairs
    }


@st.composite
def rotary_cases(
    draw: st.DrawFn,
    *,
    rule: str | SearchStrategy | None = None,
    reach: str = "any",
    keys: Mapping[str, Any] | None = None,
    partial: bool | None = None,
    layout: str | SearchStrategy = "half",
    positions: str | SearchStrategy = "sequence",
    widths: tuple[int, ...] = WIDTHS,
    thetas: tuple[float, ...] = THETAS,
    dtypes: tuple[str, ...] = DTYPES,
    telling_only: bool = False,
    **options: Any,
) -> RotaryCase:
    """Cases with ``options`` (fields of RotaryCase, each a value or a strategy).

    ``rule`` is the rope_type of the scaling table and ``keys`` what the table holds besides or
    instead of what is drawn; ``reach`` says whether a call is ``beyond`` or ``within`` the trained
    length of dynamic and LongRoPE scaling. ``partial`` rotates fewer channels than there are (None:
    sometimes). Three cases in four have sizes that cannot be confused; the others are convenient.
    """
    layout, positions, rule = (_draw(draw, value) for value in (layout, positions, rule))
    convenient = not telling_only and draw(st.integers(0, 3)) == 3
    tokens = draw(st.integers(5, 17))
    if convenient:
        batch, heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, tokens]))
        tokens = draw(st.sampled_from([tokens, 1])) if reach == "any" else tokens
    else:
        heads = draw(st.sampled_from([h for h in HEADS if h != tokens]))
        batch = draw(st.sampled_from([b for b in BATCHES if b not in (heads, tokens)]))
    multiple = 4 if layout == "half-truncated" else 2
    fits = [w for w in widths if w % multiple == 0]
    head_dim = draw(st.sampled_from(fits))
    # Scaling rules distinguish fast pairs from slow ones: four pairs show it.
    fewest = 4 if rule is None else 8
    rotary_dims = [r for r in range(fewest, head_dim, multiple) if r != head_dim]
    if partial is None:
        partial = bool(rotary_dims) and draw(st.integers(0, 3)) == 3
    elif partial and not rotary_dims:
        head_dim = max(fits)
        rotary_dims = list(range(fewest, head_dim, multiple))
    tokens = _draw(draw, options.pop("tokens", tokens))
    case = RotaryCase(
        batch=batch,
        heads=heads,
        tokens=tokens,
        head_dim=head_dim,
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
        theta=draw(st.sampled_from((*thetas, 10000.0, None) if convenient else thetas)),
        layout=layout,
        rotary_dim=draw(st.sampled_from(rotary_dims)) if partial else None,
        positions=positions,
        start=_draw_start(draw, positions, tokens, batch),
        **{name: _draw(draw, option) for name, option in options.items()},
    )
    if rule is None or layout == "half-truncated":
        return case
    return _with(case, scaling=_draw_scaling(draw, rule, case, reach, keys or {}))


def _with(case: RotaryCase, **changes: Any) -> RotaryCase:
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    return RotaryCase(**{**values, **changes})


def _draw_start(draw: st.DrawFn, positions: str, tokens: int, batch: int) -> int:
    if positions in ("sequence", "left-padded"):
        return 0
    if positions == "far":  # float16 counts to 2048
        return draw(st.integers(2049, FARTHEST - tokens * (2 * batch + 1)))
    return draw(st.integers(1 if positions in ("offset", "per-row") else 0, 100))


def _draw_scaling(
    draw: st.DrawFn, rule: str, case: RotaryCase, reach: str, keys: Mapping[str, Any]
) -> Pairs:
    scaling = {"rope_type": rule}
    if rule == "default":
        return tuple(scaling.items())
    factors = (8.0, 4.0, 2.5, 32.0)
    scaling["factor"] = draw(st.sampled_from(factors))
    longest = case.largest_position()
    if rule in ("dynamic", "longrope"):
        # From 4 tokens on, so that the logarithm of the trained length is not close to 0.
        within = st.integers(max(4, longest + 1), max(4, longest + 1) + 20)
        beyond = st.integers(4, max(4, longest))
        lengths = {"within": within, "beyond": beyond, "any": beyond | within}[reach]
        scaling["original_max_position_embeddings"] = draw(lengths)
    elif rule in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = draw(st.sampled_from((64, 256, 40, 4096)))
    if rule == "llama3":
        scaling["low_freq_factor"] = draw(st.sampled_from((1.0, 0.5)))
        scaling["high_freq_factor"] = draw(st.sampled_from((4.0, 2.5)))
    if rule == "longrope":
        random, pairs = Random(case.seed + 1), (case.rotary_dim or case.head_dim) // 2
        scaling["short_factor"] = tuple(round(random.uniform(1, 2), 2) for _ in range(pairs))
        scaling["long_factor"] = tuple(round(random.uniform(2.5, 30), 2) for _ in range(pairs))
    scaling |= {name: _draw(draw, value) for name, value in keys.items()}
    return tuple(scaling.items())


@st.composite
def layered_cases(
    draw: st.DrawFn,
    *,
    differ: str = "both",
    rules: tuple[str, ...] = ("linear", "yarn"),
    keys: dict[str, Any] | None = None,
    **options: Any,
) -> RotaryCase:
    """Cases with a table of options for each of three types of layer, for one of the types.

    ``rules`` are the scaling rules and ``keys`` what their tables must hold. Tables of ``local``
    and ``global`` layers differ in ``theta``, ``scaling`` or ``both``, or in ``rotary_dim``; layers
    of the type ``none`` do not rotate.
    """
    case = draw(rotary_cases(**options))
    thetas = draw(st.permutations(THETAS))
    scaling = _draw_scaling(draw, draw(st.sampled_from(rules)), case, "any", keys or {})
    local: dict[str, Any] = {"theta": thetas[0]}
    distant: dict[str, Any] = {"theta": thetas[1] if differ in ("theta", "both") else thetas[0]}
    if differ in ("scaling", "both"):
        distant["scaling"] = scaling
    if differ == "rotary_dim":
        widths = draw(st.permutations(range(4, case.head_dim + 1, 2)))
        local["rotary_dim"], distant["rotary_dim"] = widths[:2]
    tables = {"local": tuple(local.items()), "global": tuple(distant.items()), "none": None}
    order = draw(st.permutations(list(tables)))
    return _with(
        case,
        theta=None,
        rotary_dim=None,
        layers=tuple((name, tables[name]) for name in order),
        layer_type=draw(st.sampled_from(("local", "global"))),
    )


def any_layout() -> SearchStrategy[str]:
    """Any of the four layouts."""
    return st.sampled_from(LAYOUTS)


def any_positions() -> SearchStrategy[str]:
    """Any kind of positions."""
    return st.sampled_from(POSITIONS)


def _draw(draw: st.DrawFn, value: Any) -> Any:
    return draw(value) if isinstance(value, SearchStrategy) else value
