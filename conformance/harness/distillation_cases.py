"""Cases of distillation: sizes, which labels are learnt, and how the loss is weighted.

Each row of a batch learns a span of its labels: a prompt in front and padding behind are ignored. Rows
have spans of different lengths, so that a mean over rows is not one over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, dtype_name, shown_case
from conformance.harness.qwen2_cases import as_strategy

IGNORED = -100
"""The label of what is not to be learnt."""
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")

Span = tuple[int, int]
"""The first label of a row that is learnt, and the first behind it that is not."""


@dataclass(frozen=True, kw_only=True)
class DistillationCase:
    """Logits, labels and options of one call."""

    batch: int = 3
    tokens: int = 7
    vocab: int = 13
    spans: tuple[Span, ...] = ((1, 6), (3, 7), (0, 3))
    """Of every row."""
    alpha: float = 1.0
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    num_items: int = 0
    """``num_items_in_batch``; 0 leaves it out."""
    padding: int = 0
    """Columns of padding behind the vocabulary."""
    top: int = 0
    """Columns of the teacher that are given; 0 gives it whole."""
    likeliest: bool = False
    """Whether these are the likeliest ones, in their order."""
    scale: float = 2.0
    """Of the student's logits."""
    dtype: str = "float32"
    seed: int = 0

    def __repr__(self) -> str:
        """The sizes and the spans, and whatever is not at its default."""
        return shown_case(self, always=5)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set()
        sizes = {"batch": self.batch, "tokens": self.tokens, "vocab": self.vocab}
        if len(set(sizes.values())) < len(sizes):
            equal.add("equal sizes")
        if self.valid in {*sizes.values(), self.tokens - 1, self.batch * (self.tokens - 1), 1}:
            equal.add("a number of targets that is another number")
        if all(end == self.tokens for _, end in self.spans):
            equal.add("nothing is padded")
        if all(first <= 1 for first, _ in self.spans):
            equal.add("no prompt")
        if len({self.valid_of(span) for span in self.spans}) < 2:
            equal.add("rows alike")
        return frozenset(equal)

    @property
    def valid(self) -> int:
        """Targets that are learnt."""
        return sum(self.valid_of(span) for span in self.spans)

    def valid_of(self, span: Span) -> int:
        """Targets of a row that are learnt: the first label is none."""
        first, end = span
        return max(0, end - max(first, 1))

    @property
    def columns(self) -> int:
        """Of the logits: the vocabulary and its padding."""
        return self.vocab + self.padding

    def options(self) -> dict[str, str]:
        """The options of the contract, as source text, where they are not at their default."""
        given = {"alpha": repr(self.alpha)}
        if self.temperature != 1:
            given["temperature"] = repr(self.temperature)
        if self.divergence != "forward_kl" and self.alpha:
            given["divergence"] = repr(self.divergence)
        if self.divergence == "jsd" and self.alpha:
            given["beta"] = repr(self.beta)
        if self.num_items:
            given["num_items_in_batch"] = str(self.num_items)
        if self.padding:
            given["vocab_size"] = str(self.vocab)
        if self.top:
            given |= {"teacher_indices": "indices", "teacher_logsumexp": "logsumexp"}
        return given

    def label_lines(self) -> list[str]:
        """Python that makes ``labels``."""
        return [
            f"labels = torch.randint({self.vocab}, ({self.batch}, {self.tokens}), generator=g)",
            f"for row, (first, end) in zip(labels, {self.spans}):",
            f"    row[:first], row[end:] = {IGNORED}, {IGNORED}",
        ]

    def top_lines(self) -> list[str]:
        """Python that makes ``indices`` and ``logsumexp``, and a teacher of these columns alone.

        They are any columns in any order, without the likeliest one, so that what the others have
        together is well above rounding; or the likeliest ones, as in a cache.
        """
        tempered = "teacher" if self.temperature == 1 else f"(teacher / {self.temperature})"
        lines = [
            f"whole = {tempered}[..., :{self.vocab}].double()",
            "logsumexp = torch.logsumexp(whole, -1).float()",
        ]
        if self.likeliest:
            lines.append(f"indices = whole.topk({self.top}).indices")
        else:
            lines += [
                "order = torch.rand(whole.shape, generator=g)",
                "order = order.scatter(-1, whole.argmax(-1, keepdim=True), 2.0)",
                f"indices = order.argsort(-1)[..., :{self.top}]",
            ]
        return [*lines, "teacher = teacher.gather(-1, indices)"]

    def call(self, dtype: torch.dtype, device: str = "cpu", *edits: str, **options: str) -> Call:
        """The call with logits of ``dtype``; ``edits`` are lines behind those that make them."""
        shape = f"{self.batch}, {self.tokens}, {self.columns}"
        lines = [
            f"g = torch.Generator().manual_seed({self.seed})",
            "r = lambda *shape: torch.randn(shape, generator=g)",
            f"student, teacher = {self.scale:g} * r({shape}), 2.5 * r({shape})",
            *self.label_lines(),
            *edits,
        ]
        if dtype != torch.float32:
            typed = f"to(torch.{dtype_name(dtype)})"
            lines.append(f"student, teacher = student.{typed}, teacher.{typed}")
        if self.top:
            lines += self.top_lines()
        if device != "cpu":
            names = ["student", "teacher", "labels", *(["indices", "logsumexp"] * bool(self.top))]
            lines += [f"{name} = {name}.to('{device}')" for name in names]
        lines.append("student.requires_grad_()")
        return Call(
            "distillation_loss",
            tuple(lines),
            ("student", "teacher", "labels"),
            tuple((self.options() | options).items()),
            dtype,
            self,
        )


# Strategies

ALPHAS = st.sampled_from([1.0, 0.0, 0.3, 1.0, 0.0])
"""Of rules about either term and both: who offers one of them alone is held to it."""
BETAS = st.sampled_from([0.1, 0.5, 0.9])
TEMPERATURES = st.sampled_from([0.5, 1.5, 2.0, 3.0, 5.0])
ANY_DIVERGENCE = st.sampled_from(DIVERGENCES)
SIXTEEN_BITS = st.sampled_from(["bfloat16", "float16"])
SOME, ALL = -1, -2
"""Columns of the teacher: some are drawn, or all are given."""
BATCHES = st.integers(2, 4)
LENGTHS = st.integers(5, 9)
VOCABULARIES = st.integers(11, 29)
SEEDS = st.integers(0, 2**16)


def distillation_cases(**fixed: Any) -> SearchStrategy[DistillationCase]:
    """Cases in which a strategy or a value fixes a field."""
    return _distillation_cases(fixed)


@st.composite
def _distillation_cases(draw: st.DrawFn, fixed: Mapping[str, Any]) -> DistillationCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    tokens = given.setdefault("tokens", draw(LENGTHS))
    batch = given.setdefault("batch", draw(BATCHES))
    given.setdefault("vocab", draw(VOCABULARIES))
    if "spans" not in given:
        kinds = [PROMPTED[tokens], PADDED[tokens], SPANS[tokens], SPANS[tokens]][:batch]
        given["spans"] = tuple(draw(kind) for kind in kinds)
    if given.get("top") == SOME:
        given["top"] = draw(st.integers(2, given["vocab"] - 4))
    elif given.get("top") == ALL:
        given["top"] = given["vocab"]
    given.setdefault("seed", draw(SEEDS))
    return DistillationCase(**given)


def spans(
    tokens: int, *, prompt: int = 0, padding: int = 0, least: int = 0
) -> SearchStrategy[Span]:
    """Spans of a row that ignore so many labels in front and behind, and learn so many targets."""
    found = [
        (first, end)
        for first in range(prompt, tokens)
        for end in range(first + 1, tokens + 1 - padding)
        if end - max(first, 1) >= least
    ]
    return st.sampled_from(found)


ALL_LENGTHS = range(5, 10)
PROMPTED = {tokens: spans(tokens, prompt=2, least=1) for tokens in ALL_LENGTHS}
PADDED = {tokens: spans(tokens, padding=1, least=2) for tokens in ALL_LENGTHS}
SPANS = {tokens: spans(tokens) for tokens in ALL_LENGTHS}
"""Of the first row, of the second, and of any other, which may have no target."""

EVERY = distillation_cases(alpha=ALPHAS, divergence=ANY_DIVERGENCE)
"""Both terms, and each alone, at temperature 1."""
TEMPERED = distillation_cases(
    alpha=ALPHAS, divergence=ANY_DIVERGENCE, beta=BETAS, temperature=TEMPERATURES
)
ANYTHING = distillation_cases(
    alpha=st.sampled_from([0.3, 1.0, 0.0, 0.8]),
    divergence=ANY_DIVERGENCE,
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    num_items=st.sampled_from([0, 31]),
    padding=st.sampled_from([0, 0, 3]),
    top=st.sampled_from([0, 0, SOME]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)


WITHOUT_TARGETS = st.sampled_from([(0, 0), (0, 1)])
"""Spans without a target: the first label is not that of any position."""


@st.composite
def _with_masked_row(draw: st.DrawFn, fixed: Mapping[str, Any]) -> DistillationCase:
    case = draw(distillation_cases(**fixed))
    rows = list(case.spans)
    rows.insert(draw(st.integers(0, case.batch)), draw(WITHOUT_TARGETS))
    case = replace(case, batch=len(rows), spans=tuple(rows))
    assume(not case.confusable())  # a row more may make two sizes equal
    return case


def with_masked_row(**fixed: Any) -> SearchStrategy[DistillationCase]:
    """Cases in which one row of several has no target."""
    return _with_masked_row(fixed)


@st.composite
def _fully_masked(draw: st.DrawFn, fixed: Mapping[str, Any]) -> DistillationCase:
    case = draw(distillation_cases(**fixed))
    return replace(case, spans=tuple(draw(WITHOUT_TARGETS) for _ in range(case.batch)))


def fully_masked(**fixed: Any) -> SearchStrategy[DistillationCase]:
    """Cases without any target."""
    return _fully_masked(fixed)


@st.composite
def _one_target(draw: st.DrawFn, fixed: Mapping[str, Any]) -> DistillationCase:
    case = draw(distillation_cases(**fixed))
    at, row = draw(st.integers(1, case.tokens - 2)), draw(st.integers(0, case.batch - 1))
    rows = tuple((at, at + 1) if r == row else (0, 0) for r in range(case.batch))
    return replace(case, spans=rows)


def one_target(**fixed: Any) -> SearchStrategy[DistillationCase]:
    """Cases in which one label of the batch is learnt."""
    return _one_target(fixed)
