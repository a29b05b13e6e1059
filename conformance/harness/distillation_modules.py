"""Distillation of modules: what mode each is run in, and whose parameters have gradients.

The models are an embedding, a module that gives more in training mode (what dropout does, without
chance), and a linear head, so that the mode of either pass is in the value of the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_identical
from conformance.harness.differentiated import Differentiated, differentiate
from conformance.harness.distillation_cases import (
    ALPHAS,
    ANY_DIVERGENCE,
    DistillationCase,
    distillation_cases,
)
from conformance.harness.distillation_checks import assert_zero, checked
from conformance.harness.distillation_oracle import loss_of, ones_for
from conformance.harness.failures import ConformanceFailure, failing_at
from conformance.harness.lanes import EXACT
from conformance.harness.memo import remembered
from conformance.harness.qwen2_cases import as_strategy
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, errors_named

WIDTH = 6
LOUDER = 1.75
"""How much more a model gives in training mode."""


@dataclass(frozen=True, kw_only=True)
class ModuleCase:
    """Two models, and what their logits are distilled with."""

    of: DistillationCase
    """Sizes, labels and options."""
    shared: bool = False
    """Whether the models have the embedding, and the module that knows its mode, in common."""
    student_trains: bool = True
    teacher_trains: bool = True
    dropout: bool = False
    """Whether the teacher has dropout besides."""

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        return self.of.confusable()

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return self.of.seed

    def call(self, device: str = "cpu") -> Call:
        """The call, with modules of float32 on ``device``."""
        case, vocab = self.of, self.of.vocab
        common = ", common" if self.shared else ""
        dropout = "dropout=0.5" if self.dropout else ""
        arguments = ", ".join(part for part in (common.strip(", "), dropout) if part)
        lines = [
            "nn = torch.nn",
            "class Louder(nn.Module):",
            f"    def forward(self, x): return {LOUDER} * x if self.training else x",
            f"g = torch.Generator().manual_seed({case.seed})",
            "def model(common=None, dropout=0.0):",
            f"    first = common or nn.Sequential(nn.Embedding({vocab}, {WIDTH}), Louder())",
            f"    made = nn.Sequential(first, nn.Dropout(dropout), nn.Linear({WIDTH}, {vocab}))",
            "    for p in made.parameters(): nn.init.normal_(p, generator=g)",
            "    return made",
            "student = model()",
            "common = student[0]",
            f"teacher = model({arguments})",
            f"teacher.train({self.teacher_trains})",
            f"student.train({self.student_trains})",
            f"ids = torch.randint({vocab}, ({case.batch}, {case.tokens}), generator=g)",
            *case.label_lines(),
        ]
        if device != "cpu":
            lines += [
                f"student, teacher = student.to('{device}'), teacher.to('{device}')",
                f"ids, labels = ids.to('{device}'), labels.to('{device}')",
            ]
        return Call(
            "distillation_loss",
            tuple(lines),
            ("student", "teacher", "labels"),
            (*case.options().items(), ("ids", "ids")),
            torch.float32,
            self,
        )


def module_cases(**fixed: Any) -> SearchStrategy[ModuleCase]:
    """Cases in which a strategy or a value fixes a field."""
    return _module_cases(fixed)


@st.composite
def _module_cases(draw: st.DrawFn, fixed: Mapping[str, Any]) -> ModuleCase:
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    return ModuleCase(of=draw(OF_MODULES), **given)


OF_MODULES = distillation_cases(
    alpha=ALPHAS.filter(bool), divergence=ANY_DIVERGENCE, temperature=st.sampled_from([1.0, 2.0])
)

# Running


@dataclass(frozen=True)
class Models:
    """The arguments of a call, its models copied: an implementation may leave them changed."""

    student: nn.Module
    teacher: nn.Module
    labels: Tensor
    options: dict[str, Any]

    def own_parameters(self) -> dict[str, Tensor]:
        """The student's, by name."""
        return dict(self.student.named_parameters())

    def of_teacher_alone(self) -> dict[str, Tensor]:
        """The teacher's that are not the student's, by name."""
        shared = {id(p) for p in self.student.parameters()}
        return {n: p for n, p in self.teacher.named_parameters() if id(p) not in shared}


def models_of(call: Call) -> Models:
    """The models copied together, so that what they share stays shared."""
    (student, teacher, labels), options = call.values()
    return Models(*copy.deepcopy((student, teacher)), labels, options)


def loss_of_models(distillation_loss: Subject, models: Models, call: Call) -> Tensor:
    """The loss, checked to be a scalar."""
    with failing_at(call):
        found = distillation_loss(models.student, models.teacher, models.labels, **models.options)
        return checked(found, call)


def gradients_of(loss: Tensor, parameters: Mapping[str, Tensor], call: Call) -> dict[str, Tensor]:
    """The gradient of each parameter, zeros where there is none, on the CPU."""
    if not loss.requires_grad:
        raise ConformanceFailure("no gradient", "the loss has no gradient", call=call)
    with failing_at(call), errors_named("the backward pass"):
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: (torch.zeros_like(parameter) if gradient is None else gradient).cpu()
        for (name, parameter), gradient in zip(parameters.items(), found)
    }


# The oracle

EMBEDDING, WEIGHT, BIAS = "0.0.weight", "2.weight", "2.bias"


@remembered
def expected_of_models(call: Call) -> Differentiated:
    """The loss and the gradients of the student's parameters, in float64.

    The models are written out: rows of a table, times what the mode is worth, times a matrix.
    """
    case: ModuleCase = call.case
    models = models_of(call)
    ids, labels = models.options["ids"].cpu(), models.labels.cpu()
    loss = loss_of(labels.clone(), models.options)
    inputs = {name: p.detach().cpu() for name, p in models.student.named_parameters()}
    inputs |= {f"teacher {n}": p.detach().cpu() for n, p in models.teacher.named_parameters()}
    ones = ones_for(labels, case.of.vocab, torch.float32)
    inputs |= ones
    louder = LOUDER if case.student_trains else 1.0

    def function(**given: Tensor) -> tuple[Tensor]:
        student = louder * given[EMBEDDING][ids] @ given[WEIGHT].T + given[BIAS]
        table, weight, bias = (given[f"teacher {n}"].detach() for n in (EMBEDDING, WEIGHT, BIAS))
        rounding = {name: given[name] for name in ones}
        return loss(student=student, teacher=table[ids] @ weight.T + bias, **rounding)

    return differentiate(function, inputs, torch.float32, case.seed)


# Checks


def assert_modules(distillation_loss: Subject, case: ModuleCase) -> None:
    """The loss and the gradients of all of the student's parameters are the oracle's."""
    call = case.call(distillation_loss.device)
    models, oracle = models_of(call), expected_of_models(call)
    loss = loss_of_models(distillation_loss, models, call)
    expectation = oracle.expectation("output 0")
    assert_close_to(loss.reshape(1), expectation, call, name="loss", source="out.reshape(1)")
    weighted = loss * float(oracle.upstream[0])
    for name, gradient in gradients_of(weighted, models.own_parameters(), call).items():
        assert_close_to(gradient, oracle.expectation(name), call, name=f"gradient of {name}")


def assert_teacher_alone_untouched(distillation_loss: Subject, case: ModuleCase) -> None:
    """Parameters that are the teacher's alone have no gradient."""
    call = case.call(distillation_loss.device)
    models = models_of(call)
    loss = loss_of_models(distillation_loss, models, call)
    for name, gradient in gradients_of(loss, models.of_teacher_alone(), call).items():
        assert_zero(gradient, call, f"the gradient of the teacher's {name}")


def drawn_modes(seed: int) -> tuple[str, ...]:
    """Lines that set the mode of every part of both models, and keep them by name in ``before``."""
    return (
        "models = nn.ModuleDict({'student': student, 'teacher': teacher})",
        "named = {name: module for name, module in models.named_modules() if name}",
        f"draws = torch.Generator().manual_seed({seed})",
        "before = {name: bool(torch.rand((), generator=draws) < 0.5) for name in named}",
        "for name, mode in before.items(): named[name].training = mode",
    )


def assert_modes_kept(distillation_loss: Subject, case: ModuleCase) -> None:
    """Every module has the mode it had; some parts have another one than their model."""
    call = case.call(distillation_loss.device).then(*drawn_modes(case.seed))
    models = models_of(call)
    modules = nn.ModuleDict({"student": models.student, "teacher": models.teacher})
    named, before = dict(modules.named_modules()), call.named("before")
    loss_of_models(distillation_loss, models, call)
    current_tally().comparisons[EXACT] += 1
    changed = [name for name, mode in before.items() if named[name].training != mode]
    if changed:
        mode = "training" if named[changed[0]].training else "evaluation"
        summary = f"{changed[0]} is left in {mode} mode; {len(changed)} modules have another mode"
        differ = "[n for n, mode in before.items() if named[n].training != mode]"
        shown = f"print('in another mode:', {differ}, '- expected none')"
        raise ConformanceFailure("changed mode", summary, call=call, shown_by=shown)


def assert_same_twice(distillation_loss: Subject, case: ModuleCase) -> None:
    """Two calls on the same models give the same bits."""
    call = case.call(distillation_loss.device)
    models = models_of(call)
    first, second = (loss_of_models(distillation_loss, models, call) for _ in range(2))
    assert_identical(
        second.detach(), first.detach(), call, because="a second call with the same models"
    )
