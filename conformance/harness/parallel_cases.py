"""Cases of parallel layers: kinds, sizes, ranks and inputs, drawn by Hypothesis.

Full weights are the same on every rank. Inputs are those of each rank: parts of one tensor where the
layer's input is split, the same tensor on the ranks of a group where it is not, and another in each
group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, dtype_name, shown_case
from conformance.harness.qwen2_cases import as_strategy, fits

KINDS = (
    "column",
    "row",
    "qkv",
    "gate_up",
    "mlp",
    "embedding",
    "head",
    "norm",
    "cross_entropy",
)
WORLDS = (2, 3, 4)
HEADS = ((4, 2, 6), (6, 3, 5), (6, 2, 8), (8, 2, 6), (8, 4, 3), (12, 4, 4), (3, 3, 7), (4, 1, 6))
"""Query heads, key/value heads, head width."""
IGNORED = -100
"""The target that has no loss."""


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One layer, and what its ranks are called with."""

    kind: str
    ranks: int = 2
    """Of the world; its groups have ``group_size`` each, or all are one."""
    group_size: int | None = None
    width_in: int = 20
    width_out: int = 28
    """Output width; of a vocabulary the number of tokens, of a gated MLP the intermediate width."""
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 6
    layout: str = "separate"
    bias: bool = True
    gather_output: bool = False
    input_is_parallel: bool = True
    reduce_results: bool = True
    label_smoothing: float = 0.0
    eps: float = 1e-5
    leading: tuple[int, ...] = (2, 5)
    """Axes of the input before the last one."""
    scale: float = 1.0
    """Factor on inputs; of the loss, on logits."""
    spread: bool = False
    """Whether the channels of the input have very different sizes."""
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __repr__(self) -> str:
        """The kind, the ranks, and whatever is not at its default."""
        return shown_case(self, always=2)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set()
        if self.ranks == 1:
            equal.add("one rank")
        if self.size == 1 and self.ranks > 1:
            equal.add("groups of one")
        if self.kind == "qkv" and self.kv_heads in (1, self.heads):
            equal.add("one map of heads")
        if not self.bias and self.kind in ("column", "row", "qkv"):
            equal.add("no bias")
        return frozenset(equal)

    @property
    def size(self) -> int:
        """Ranks of a group."""
        return self.group_size or self.ranks

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.ranks // self.size

    @property
    def vocab_rows(self) -> int:
        """Vocabulary rows of a rank, padding included."""
        return -(-self.width_out // self.size)

    def weight_lines(self) -> list[str]:
        """Python that makes ``weights``."""
        inner, outer = self.width_in, self.width_out
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.kind in ("column", "row"):
            made = {"weight": f"w({outer}, {inner})", "bias": f"r({outer})"}
        elif self.kind == "qkv" and self.layout == "separate":
            rows = {"q": q, "k": kv, "v": kv}
            made = {f"{name}.weight": f"w({size}, {inner})" for name, size in rows.items()}
            made |= {f"{name}.bias": f"r({size})" for name, size in rows.items()}
        elif self.kind == "qkv":
            made = {"weight": f"w({q + 2 * kv}, {inner})", "bias": f"r({q + 2 * kv})"}
        elif self.kind == "gate_up" and self.layout != "separate":
            made = {"weight": f"w({2 * outer}, {inner})"}
        elif self.kind in ("gate_up", "mlp"):
            made = {f"{name}.weight": f"w({outer}, {inner})" for name in ("gate", "up")}
            if self.kind == "mlp":
                made["down.weight"] = f"w({inner}, {outer})"
        elif self.kind in ("embedding", "head"):
            made = {"weight": f"w({outer}, {inner})"}
        elif self.kind == "norm":
            made = {"weight": f"1 + 0.3 * r({inner})"}
        else:
            made = {}
        if not self.bias:
            made = {name: value for name, value in made.items() if "bias" not in name}
        listed = ", ".join(f"'{name}': {value}" for name, value in made.items())
        return [f"weights = {{{listed}}}"]

    def input_lines(self) -> list[str]:
        """Python that makes ``inputs``: the arguments of each rank's layer."""
        leading = "".join(f"{size}, " for size in self.leading)
        n, groups, inner = self.size, self.groups, self.width_in
        scale = "" if self.scale == 1 else f"{self.scale:g} * "
        if self.kind == "embedding":
            ids = f"torch.randint({self.width_out}, ({leading}), generator=g)"
            return [
                f"whole = [{ids} for _ in range({groups})]",
                f"inputs = [(whole[r // {n}],) for r in range({self.ranks})]",
            ]
        if self.kind == "cross_entropy":
            tokens, rows = self.leading[0], self.vocab_rows
            padded = rows * n - self.width_out
            logits = f"{scale}r({tokens}, {self.width_out})"
            targets = f"torch.randint({self.width_out}, ({tokens},), generator=g)"
            first, last = f"r % {n} * {rows}", f"(r % {n} + 1) * {rows}"
            return [
                f"whole = [{logits} for _ in range({groups})]",
                # What stands in columns of padding is not read.
                f"whole = [torch.nn.functional.pad(x, (0, {padded}), value=50.0) for x in whole]",
                f"targets = [{targets} for _ in range({groups})]",
                f"for t in targets: t[{self.seed % tokens}::4] = {IGNORED}",
                f"parts = [whole[r // {n}][:, {first} : {last}] for r in range({self.ranks})]",
                f"inputs = [(parts[r].clone(), targets[r // {n}]) for r in range({self.ranks})]",
            ]
        lines = [f"whole = [{scale}r({leading}{inner}) for _ in range({groups})]"]
        if self.spread:
            lines.append(f"whole = [x * torch.linspace(0.1, 4, {inner}) for x in whole]")
        split = self.kind == "norm" or (self.kind == "row" and self.input_is_parallel)
        part = f".chunk({n}, -1)[r % {n}].contiguous()" if split else ""
        lines.append(f"inputs = [(whole[r // {n}]{part},) for r in range({self.ranks})]")
        return lines

    def call(self, *edits: str, **options: str) -> LayerCall:
        """The call that makes the layer; ``edits`` are lines that change ``weights``."""
        lines = [
            f"g = torch.Generator().manual_seed({self.seed})",
            "r = lambda *shape: torch.randn(shape, generator=g)",
            "w = lambda *shape: 1.5 * r(*shape) / shape[-1] ** 0.5",
            *self.weight_lines(),
            *edits,
            *self.input_lines(),
        ]
        if self.dtype != torch.float32:
            cast = f"to(torch.{dtype_name(self.dtype)})"
            lines += [
                f"weights = {{k: t.{cast} for k, t in weights.items()}}",
                f"typed = lambda x: x.{cast} if x.is_floating_point() else x",
                "inputs = [tuple(map(typed, each)) for each in inputs]",
            ]
        given = self.options() | options
        return LayerCall(
            "parallel_linear",
            tuple(lines),
            (repr(self.kind), "weights"),
            tuple(given.items()),
            self.dtype,
            self,
        )

    def options(self) -> dict[str, str]:
        """The options of the contract that the kind of layer needs, as source text."""
        given = {}
        if self.group_size is not None:
            given["group_size"] = str(self.group_size)
        if self.kind == "column" and self.gather_output:
            given["gather_output"] = "True"
        if self.kind == "row":
            given |= {} if self.input_is_parallel else {"input_is_parallel": "False"}
            given |= {} if self.reduce_results else {"reduce_results": "False"}
        if self.kind == "qkv":
            given["heads"] = str((self.heads, self.kv_heads))
        if self.layout != "separate":
            given["layout"] = repr(self.layout)
        if self.kind == "cross_entropy":
            given["vocab_size"] = str(self.width_out)
            if self.label_smoothing:
                given["label_smoothing"] = repr(self.label_smoothing)
        if self.kind == "norm":
            given["eps"] = repr(self.eps)
        return given


@dataclass(frozen=True)
class LayerCall(Call):
    """A call that makes a layer, and the call of the layer."""

    applied: bool = True
    """Whether the layer is called; else the result is the layer."""

    def source(self) -> str:
        """Both, on the rank whose number is ``rank``."""
        if not self.applied:
            return super().source()
        rank = 0 if self.case.ranks == 1 else "rank"
        return f"{super().source()}(*inputs[{rank}])"


def layer_cases(kind: str | SearchStrategy[str], **fixed: object) -> SearchStrategy[LayerCase]:
    """Cases of a kind of layer on several ranks; a strategy or a value fixes a field."""
    return _layer_cases(kind, fixed)


@st.composite
def _layer_cases(
    draw: st.DrawFn, kind: str | SearchStrategy[str], fixed: Mapping[str, object]
) -> LayerCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    given["kind"] = draw(as_strategy(kind))
    ranks = given.setdefault("ranks", draw(st.sampled_from(WORLDS)))
    size = given.get("group_size") or ranks
    if given["kind"] == "qkv":
        fitting = [shape for shape in HEADS if fits(shape[0], shape[1], size)]
        shape = draw(st.sampled_from(fitting))
        for name, value in zip(("heads", "kv_heads", "head_dim"), shape):
            given.setdefault(name, value)
    vocabulary = given["kind"] in ("embedding", "head", "cross_entropy")
    choices = {
        "width_in": st.integers(3, 8).map(lambda n: n * size),
        "width_out": st.integers(29, 53)
        if vocabulary
        else st.integers(4, 9).map(lambda n: n * size),
        "leading": st.just((9,)) if given["kind"] == "cross_entropy" else LEADING,
        "seed": st.integers(0, 2**16),
    }
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in given}
    return LayerCase(**given, **drawn)


LEADING = st.sampled_from([(2, 5), (3, 4), (5, 3)])
