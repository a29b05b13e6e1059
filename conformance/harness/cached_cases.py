"""Cases of cached attention: sizes, a schedule of steps and options, drawn by Hypothesis."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, shown_case
from conformance.harness.rotary_cases import DTYPES, THETAS, Pairs, table

GROUPED_HEADS = ((4, 2), (6, 2), (6, 3))
OTHER_HEADS = ((3, 3), (4, 1), (1, 1))
WIDTHS = (8, 12, 16)
WINDOWS = st.integers(1, 4)


@dataclass(frozen=True, kw_only=True)
class CachedCase:
    """A sequence of steps of one cache."""

    batch: int = 3
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    schedule: tuple[int, ...] = (5, 1, 1)
    """Tokens of each step."""
    dtype: str = "float32"
    seed: int = 0
    theta: float = 500.0
    layout: str = "half"
    rotary_dim: int | None = None
    scaling: Pairs | None = None
    window: int | None = None
    """Tokens to the left that a query sees besides its own."""
    scale: float | None = None
    sinks: bool = False
    padded: str | None = None
    """``left`` or ``right``: the first step of each row begins or ends with padding, of a different
    length in each row. ``ended``: rows end in the midst of later steps, have padding while others
    go on, and go on themselves in a later step."""

    def __repr__(self) -> str:
        """The sizes, and whatever else is not at its default."""
        return shown_case(self, always=8)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        sizes = {
            "batch": self.batch,
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "tokens": sum(self.schedule),
        }
        equal = {f"{a} = {b}" for a, b in itertools.combinations(sizes, 2) if sizes[a] == sizes[b]}
        equal |= {f"one of {name}" for name in ("batch", "kv_heads") if sizes[name] == 1}
        if len(self.schedule) == 1:
            equal.add("a single step")
        if self.window is not None and self.window >= sum(self.schedule) - 1:
            equal.add("window covers every key")
        if self.padded and all(begin == end for begin, end in self.padding_slots()):
            equal.add("no padding")
        if self.theta == 10000.0:
            equal.add("theta = 10000")
        return frozenset(equal)

    def padding(self) -> list[int]:
        """How many tokens of the first step are padding in each row."""
        if self.padded not in ("left", "right"):
            return [0] * self.batch
        return [(row + self.seed) % self.schedule[0] for row in range(self.batch)]

    def padding_slots(self) -> list[tuple[int, int]]:
        """The first slot of each row's padding, and the one behind it."""
        first = self.schedule[0]
        if self.padded == "ended":
            return self._ended_slots()
        if self.padded == "right":
            return [(first - n, first) for n in self.padding()]
        return [(0, n) for n in self.padding()]

    def _ended_slots(self) -> list[tuple[int, int]]:
        random, ends = Random(self.seed), list(itertools.accumulate(self.schedule))
        slots = []
        for row in range(self.batch):
            resumed = random.choice(ends[1:-1])
            goes_on = self.batch > 1 and row == self.seed % self.batch
            slots.append((resumed if goes_on else random.randrange(ends[0], resumed), resumed))
        return slots

    def rotary_options(self) -> dict[str, Any]:
        """The options of the rotary embedding."""
        options: dict[str, Any] = {"theta": self.theta}
        if self.layout != "half":
            options["layout"] = self.layout
        if self.rotary_dim is not None:
            options["rotary_dim"] = self.rotary_dim
        if self.scaling is not None:
            options["scaling"] = table(self.scaling)
        return options

    def call(self, dtype: torch.dtype, device: str = "cpu") -> CachedCall:
        """All steps of one cache, with inputs of ``dtype`` on ``device``."""
        tokens = sum(self.schedule)
        shapes = [
            (self.batch, self.q_heads, tokens, self.head_dim),
            (self.batch, self.kv_heads, tokens, self.head_dim),
            (self.batch, self.kv_heads, tokens, self.value_dim),
        ]
        ends = list(itertools.accumulate(self.schedule))
        lines = [
            f"g = torch.Generator().manual_seed({self.seed})",
            f"q, k, v = (torch.randn(s, generator=g) for s in {shapes})",
            f"steps = {list(zip([0, *ends], ends))}",
        ]
        if dtype != torch.float32:
            lines.append(f"q, k, v = (x.to({dtype}) for x in (q, k, v))")
        moved, options = ["q", "k", "v"], {"rotary": repr(self.rotary_options())}
        if self.padded:
            begin, end = ([[slot] for slot in slots] for slots in zip(*self.padding_slots()))
            lines += [
                f"slot = torch.arange({tokens})",
                f"key_valid = (slot < torch.tensor({begin})) | (slot >= torch.tensor({end}))",
            ]
            moved.append("key_valid")
        if self.window is not None:
            options["window"] = repr((self.window, 0))
        if self.scale is not None:
            options["scale"] = repr(self.scale)
        if self.sinks:
            lines.append(f"sinks = (torch.randn({self.q_heads}, generator=g) + 0.5).to({dtype})")
            options["sinks"] = "sinks"
            moved.append("sinks")
        if device != "cpu":
            names = ", ".join(moved)
            lines.append(f"{names} = (x.to('{device}') for x in ({names}))")
        return CachedCall("cached_attention", tuple(lines), (), tuple(options.items()), dtype, self)


@dataclass(frozen=True)
class CachedCall(Call):
    """All steps of one cache as a call; its result is the concatenated output of the steps."""

    def source(self) -> str:
        """Making the cache and calling it step by step, as one expression."""
        parts = [f"{name}[:, :, a:b]" for name in ("q", "k", "v")]
        if self.case.padded:
            parts.append("key_valid=key_valid[:, a:b]")
        loop = f"torch.cat([step({', '.join(parts)}) for a, b in steps], dim=2)"
        return f"(lambda step: {loop})({super().source()})"


@st.composite
def cached_cases(
    draw: st.DrawFn,
    *,
    schedule: str = "mixed",
    windowed: bool | SearchStrategy = False,
    windows: SearchStrategy[int] = WINDOWS,
    rule: str | SearchStrategy | None = None,
    partial: bool = False,
    value_width: str = "equal",
    **options: Any,
) -> CachedCase:
    """Cases with ``options`` (fields of CachedCase, each a value or a strategy).

    ``schedule`` is ``mixed`` (steps of one and of several tokens), ``ones`` or ``threes`` (a first
    step of several tokens, then steps of that many), ``single`` or ``past-128`` (a first step of
    about 128 tokens, then steps of one and three). A window is shorter than the sequence and
    crossed several times; ``windows`` are the tokens that it reaches back. ``rule`` is ``linear``,
    ``yarn``, ``yarn-scores`` (with mscale_all_dim) or ``llama3``. Three cases in four have sizes
    that cannot be confused.
    """
    convenient = draw(st.integers(0, 3)) == 3
    q_heads, kv_heads = draw(st.sampled_from(OTHER_HEADS if convenient else GROUPED_HEADS))
    taken = {q_heads, kv_heads}
    batch = 1 if convenient else draw(st.sampled_from([b for b in (3, 2, 5) if b not in taken]))
    windowed, rule = _draw(draw, windowed), _draw(draw, rule)
    head_dim = draw(st.sampled_from(WIDTHS))
    values = [w for w in (4, 8, 12, 20) if w != head_dim]
    case = CachedCase(
        batch=batch,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=draw(st.sampled_from(values)) if value_width == "different" else head_dim,
        schedule=_draw_schedule(draw, schedule),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
        theta=draw(st.sampled_from((*THETAS, 10000.0) if convenient else THETAS)),
        window=draw(windows) if windowed else None,
        rotary_dim=4 if partial else None,
        scaling=_draw_scaling(draw, rule),
        **{name: _draw(draw, option) for name, option in options.items()},
    )
    if case.padded in ("left", "right") and case.schedule[0] == 1:
        case = replace(case, schedule=(batch + 1, *case.schedule[1:]))
    return case


def _draw_schedule(draw: st.DrawFn, kind: str) -> tuple[int, ...]:
    if kind == "past-128":
        return (draw(st.sampled_from((126, 128, 127, 131, 129))), 1, 3, 1, 3)
    first = draw(st.sampled_from((5, 6, 1, 9)))
    if kind == "single":
        return (first + 6,)  # more tokens than rows or heads
    if kind in ("ones", "threes"):
        size = 1 if kind == "ones" else 3
        return (first, *[size] * draw(st.integers(4, 8)))
    # From the seed, so that a long schedule costs one draw.
    random, steps = Random(draw(st.integers(0, 2**16))), draw(st.integers(4, 8))
    return (first, *(random.choice((1, 3, 1, 2, 5, 7)) for _ in range(steps)))


def _draw_scaling(draw: st.DrawFn, rule: str | None) -> Pairs | None:
    if rule is None:
        return None
    factor = draw(st.sampled_from((8.0, 4.0, 40.0)))
    scaling: dict[str, Any] = {"rope_type": rule, "factor": factor}
    if rule != "linear":
        scaling["original_max_position_embeddings"] = draw(st.sampled_from((64, 256)))
    if rule == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rule == "yarn-scores":
        scaling["rope_type"] = "yarn"
        scaling["mscale_all_dim"] = draw(st.sampled_from((1.0, 0.707)))
        scaling["mscale"] = draw(st.sampled_from((1.0, 0.5)))
    return tuple(scaling.items())


def _draw(draw: st.DrawFn, value: Any) -> Any:
    return draw(value) if isinstance(value, SearchStrategy) else value
