"""Checks of distillation losses: values, gradients, and what must not matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_identical
from conformance.harness.distillation_cases import DistillationCase
from conformance.harness.distillation_oracle import (
    expected_gradient,
    expected_loss,
    upstream_of,
)
from conformance.harness.failures import ConformanceFailure, failing_at
from conformance.harness.lanes import EXACT, in_every_lane, lane_of
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, errors_named
from conformance.harness.tolerance import Expectation


@dataclass(frozen=True)
class Ran:
    """What an implementation gives for a call."""

    loss: Tensor
    """[]."""
    gradient: Tensor
    """Of the student's logits, on the CPU."""


def run(distillation_loss: Subject, call: Call, upstream: float = 1.0, **replaced: Any) -> Ran:
    """The loss and the gradient of the student, for a gradient ``upstream`` at the loss.

    ``replaced`` takes the place of arguments of the call.
    """
    (student, teacher, labels), options = call.values()
    student, teacher = replaced.pop("student", student), replaced.pop("teacher", teacher)
    labels, options = replaced.pop("labels", labels), options | replaced
    with failing_at(call):
        loss = checked(distillation_loss(student, teacher, labels, **options), call)
        return Ran(loss.detach(), gradient_of(loss, student, upstream))


def checked(loss: Any, call: Call) -> Tensor:
    """A loss that is a scalar of a floating dtype."""
    lane = lane_of(call.dtype)
    if not isinstance(loss, Tensor):
        found = type(loss).__name__
        raise ConformanceFailure("wrong type", f"the loss is {found}, expected a tensor", lane=lane)
    if loss.ndim or not loss.is_floating_point():
        found = f"shape {list(loss.shape)} and {loss.dtype}"
        raise ConformanceFailure("wrong shape", f"the loss has {found}, expected a scalar")
    return loss


def gradient_of(loss: Tensor, student: Tensor, upstream: float) -> Tensor:
    """The gradient of the student's logits; zeros where the loss does not depend on them."""
    if not loss.requires_grad:
        summary = "the loss has no gradient: nothing connects it to the student"
        raise ConformanceFailure("no gradient", summary)
    weight = torch.tensor(upstream, dtype=loss.dtype, device=loss.device)
    with errors_named("the backward pass"):
        (found,) = torch.autograd.grad(loss, [student], weight, allow_unused=True)
    return (torch.zeros_like(student) if found is None else found).cpu()


# Against the oracle


def assert_loss(ran: Ran, call: Call, expectation: Expectation | None = None) -> None:
    """The loss is the oracle's."""
    expectation = expectation or expected_loss(call)
    assert_close_to(ran.loss.reshape(1), expectation, call, name="loss", source="out.reshape(1)")


def assert_gradient(
    gradient: Tensor, expectation: Expectation, call: Call, upstream: float
) -> None:
    """The gradient of the student's logits [batch, tokens, vocabulary] is the oracle's."""
    weight = f"torch.tensor({upstream!r}, dtype=out.dtype)"
    source = f"torch.autograd.grad(out, student, {weight})[0].flatten(0, 1)"
    assert_close_to(gradient.flatten(0, 1), expectation, call, name="gradient", source=source)


def assert_both(distillation_loss: Subject, call: Call) -> None:
    """Loss and gradient are the oracle's."""
    upstream = upstream_of(call)
    ran = run(distillation_loss, call, upstream)
    assert_loss(ran, call)
    assert_gradient(ran.gradient, expected_gradient(call), call, upstream)


def assert_oracle(
    distillation_loss: Subject, case: DistillationCase, *edits: str, **options: str
) -> None:
    """Loss and gradient are the oracle's, in every lane."""

    def check(call: Call) -> None:
        assert_both(distillation_loss, call)

    in_every_lane(_edited(case, edits, options), check, distillation_loss.device)


@dataclass(frozen=True)
class _Edited:
    """A case whose calls have further lines."""

    case: DistillationCase
    edits: tuple[str, ...]
    options: tuple[tuple[str, str], ...]

    @property
    def dtype(self) -> str:
        return self.case.dtype

    def call(self, dtype: torch.dtype, device: str) -> Call:
        return self.case.call(dtype, device, *self.edits, **dict(self.options))


def _edited(case: DistillationCase, edits: tuple[str, ...], options: dict[str, str]) -> Any:
    return _Edited(case, edits, tuple(options.items())) if edits or options else case


def assert_large(distillation_loss: Subject, case: DistillationCase, *edits: str) -> None:
    """The loss is the oracle's in every lane, and the gradient finite.

    Between distributions that are certain gradients are differences of equal large numbers: what
    rounding leaves of them says nothing.
    """

    def check(call: Call) -> None:
        ran = run(distillation_loss, call)
        assert_loss(ran, call)
        assert_finite(ran, call)

    in_every_lane(_edited(case, edits, {}), check, distillation_loss.device)


def float32(
    distillation_loss: Subject, case: DistillationCase, *edits: str, **options: str
) -> Call:
    """The call in float32 on the device of the implementation."""
    return case.call(torch.float32, distillation_loss.device, *edits, **options)


def oracle_gradient(call: Call) -> Expectation:
    """The oracle's gradient for a gradient of 1 at the loss."""
    return scaled(expected_gradient(call), 1 / upstream_of(call))


def scaled(expectation: Expectation, factor: float) -> Expectation:
    """The expectation of so many times the value; its limits follow."""
    size = abs(factor)
    limits, floor = (
        replace(
            each,
            largest=each.largest * size,
            root_mean_square=each.root_mean_square * size,
            worst_row=each.worst_row * size,
        )
        for each in (expectation.limits, expectation.floor)
    )
    return replace(expectation, value=expectation.value * factor, limits=limits, floor=floor)


# Exactly


def assert_zero(tensor: Tensor, call: Call, what: str) -> None:
    """Every element is exactly 0."""
    current_tally().comparisons[EXACT] += 1
    wrong = (tensor != 0).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        name = f"{what}{list(at)}" if at else what
        summary = f"{name} is {float(tensor[at]):.6g}, expected 0; {len(wrong)} are not"
        shown = "print(torch.autograd.grad(out, student)[0])" if at else "print(out)"
        if what.startswith("the gradient of the teacher's"):
            shown = (
                "out.backward()\nprint([p.grad for p in teacher.parameters()], '- expected none')"
            )
        elif what == "the gradient of the teacher":
            asked = "torch.autograd.grad(out, teacher, allow_unused=True)[0]"
            shown = f"print({asked}, '- expected none')"
        raise ConformanceFailure("not zero", summary, call=call, lane=EXACT, shown_by=shown)


def assert_same(one: Ran, other: Ran, call: Call, because: str) -> None:
    """Both losses, and both gradients, are the same bits."""
    assert_identical(one.loss, other.loss, call, because=because)
    assert_identical(one.gradient, other.gradient, call, because=f"{because}, in the gradient")


def valid_positions(call: Call) -> Tensor:
    """Which positions predict a label that is learnt, bool [batch, tokens] on the CPU."""
    labels = call.named("labels").cpu()
    valid = torch.zeros(labels.shape, dtype=torch.bool)
    valid[:, :-1] = labels[:, 1:] >= 0
    return valid


def assert_positions_do_not_matter(
    distillation_loss: Subject, case: DistillationCase, positions: str, content: str
) -> None:
    """Other logits at these positions change no bit, and the gradient there is exactly 0.

    ``positions`` is Python for a mask [batch, tokens], ``content`` for what is put there.
    """
    call = float32(distillation_loss, case)
    put = [
        f"where = {positions}",
        f"student[where] = {content} * student[where]",
        f"teacher[where] = {content} * teacher[where]",
    ]
    edited = float32(distillation_loss, case, *put)
    before, after = run(distillation_loss, call), run(distillation_loss, edited)
    where = edited.named("where").cpu()
    for ran, of in ((before, call), (after, edited)):
        assert_zero(ran.gradient[where], of, "the gradient of what has no part")
    assert_same(after, before, edited, "logits that have no part were changed")


# Relations


def assert_as(
    distillation_loss: Subject,
    case: DistillationCase,
    *edits: str,
    of_gradient: float = 1.0,
    **options: str,
) -> None:
    """After these edits the loss is what it was, and the gradient so many times what it was.

    The gradient is compared where there was one before: what the edits add has its own rules.
    """
    before = float32(distillation_loss, case)
    after = float32(distillation_loss, case, *edits, **options)
    ran = run(distillation_loss, after)
    assert_loss(ran, after, expected_loss(before))
    expectation = scaled(oracle_gradient(before), of_gradient)
    found = ran.gradient[tuple(slice(size) for size in before.named("student").shape)]
    assert_gradient(found, expectation, after, 1.0)


def assert_vanishes(distillation_loss: Subject, case: DistillationCase, *edits: str) -> None:
    """Loss and gradient are zero, within what rounding does."""
    call = float32(distillation_loss, case, *edits)
    ran = run(distillation_loss, call)
    assert_loss(ran, call, nothing(expected_loss(call)))
    assert_gradient(ran.gradient, nothing(oracle_gradient(call)), call, 1.0)


def nothing(expectation: Expectation) -> Expectation:
    """Zero, within the same limits."""
    return replace(expectation, value=torch.zeros_like(expectation.value), ill_conditioned=False)


def assert_positive(distillation_loss: Subject, case: DistillationCase, *edits: str) -> None:
    """The loss is above zero, and the oracle's."""
    call = float32(distillation_loss, case, *edits)
    ran = run(distillation_loss, call)
    if not float(ran.loss) > 0:
        summary = f"the loss is {float(ran.loss):.6g} although the distributions differ"
        raise ConformanceFailure("wrong values", summary, call=call)
    assert_loss(ran, call)


def assert_swapped(distillation_loss: Subject, case: DistillationCase, **options: Any) -> None:
    """With student and teacher in each other's place, and these options, the loss is the same."""
    call = float32(distillation_loss, case)
    (student, teacher, _), _ = call.values()
    leaf = teacher.detach().clone().requires_grad_()
    ran = run(distillation_loss, call, student=leaf, teacher=student.detach(), **options)
    assert_loss(ran, call)


def assert_disjoint(distillation_loss: Subject, case: DistillationCase) -> None:
    """Of distributions that have nothing in common the divergence is the entropy of its weights."""
    edits = (
        f"even = torch.arange({case.columns}) % 2 == 0",
        "student, teacher = torch.where(even, student, -1e3), torch.where(even, -1e3, teacher)",
    )
    call = float32(distillation_loss, case, *edits)
    ran = run(distillation_loss, call)
    assert_loss(ran, call)
    assert_finite(ran, call)


def assert_finite(ran: Ran, call: Call) -> None:
    """Neither NaN nor infinite, in the loss and its gradient."""
    current_tally().comparisons[EXACT] += 1
    if not bool(torch.isfinite(ran.gradient).all() & torch.isfinite(ran.loss.cpu())):
        summary = f"the loss is {float(ran.loss):.6g}, or its gradient is not finite"
        raise ConformanceFailure("non-finite", summary, call=call)


def assert_nothing_to_learn(distillation_loss: Subject, case: DistillationCase) -> None:
    """Without a target loss and gradient are exactly 0."""
    call = float32(distillation_loss, case)
    ran = run(distillation_loss, call)
    assert_finite(ran, call)
    assert_zero(ran.loss, call, "the loss")
    assert_zero(ran.gradient, call, "the gradient")


def assert_unaffected(
    distillation_loss: Subject, case: DistillationCase, *edits: str, because: str
) -> None:
    """After these edits loss and gradient are the same bits."""
    before = float32(distillation_loss, case)
    after = float32(distillation_loss, case, *edits)
    assert_same(run(distillation_loss, after), run(distillation_loss, before), after, because)


def assert_padding_of_vocabulary(distillation_loss: Subject, case: DistillationCase) -> None:
    """What stands in columns of padding changes no bit, and its gradient is exactly 0."""
    edits = (
        f"student[..., {case.vocab}:] = 40.0",
        f"teacher[..., {case.vocab}:] = torch.linspace(30, 50, {case.padding})",
    )
    assert_unaffected(distillation_loss, case, *edits, because="padding columns were changed")
    call = float32(distillation_loss, case, *edits)
    ran = run(distillation_loss, call)
    assert_zero(ran.gradient[..., case.vocab :], call, "the gradient of a column of padding")
    assert_both(distillation_loss, call)


def assert_limit_of_large_temperatures(distillation_loss: Subject, case: DistillationCase) -> None:
    """T² D tends to half the squared difference of centred logits: its gradient to the difference.

    The remainder of a softmax at x / T is of the order of (x / T)², which leaves 1 / T of it.
    """
    call = float32(distillation_loss, case)
    (student, teacher, _), _ = call.values()
    student, teacher = student.detach().cpu().double(), teacher.cpu().double()
    centred = [x - x.mean(-1, keepdim=True) for x in (student, teacher)]
    difference = (centred[0] - centred[1]) * valid_positions(call)[..., None]
    weight = case.beta * (1 - case.beta) if case.divergence == "jsd" else 1.0
    limit = weight * difference / (case.vocab * case.valid)
    spread = max(float(x.max() - x.min()) for x in (student, teacher))
    remainder = spread**2 / (case.temperature * float(difference.square().mean().sqrt()))
    expectation = replace(oracle_gradient(call), value=limit.flatten(0, 1)).allowing(remainder)
    assert_gradient(run(distillation_loss, call).gradient, expectation, call, 1.0)


def assert_finite_differences(distillation_loss: Subject, case: DistillationCase) -> None:
    """The gradient is what small steps of the loss itself show, along random directions.

    A step of twice the size tells how far off one step is; the rest is rounding of the loss.
    """
    call = case.call(torch.float64, distillation_loss.device)
    (student, *_), _ = call.values()
    generator = torch.Generator().manual_seed(case.seed)
    ran = run(distillation_loss, call)
    precision = torch.finfo(ran.loss.dtype).eps
    noise = float(expected_loss(call, torch.float64).limits.largest)
    noise *= precision / torch.finfo(torch.float64).eps
    step = 4 * precision ** (1 / 3)
    for _ in range(2):
        direction = torch.randn(student.shape, generator=generator, dtype=torch.float64)

        def slope(size: float, direction: Tensor = direction) -> float:
            moved = (size * direction).to(student.device)
            at = [
                run(distillation_loss, call, student=leaf).loss.double().item()
                for leaf in ((student.detach() + sign * moved).requires_grad_() for sign in (1, -1))
            ]
            return (at[0] - at[1]) / (2 * size)

        found, coarse = slope(step), slope(2 * step)
        claimed = float((ran.gradient.double() * direction).sum())
        allowed = abs(found - coarse) + noise / step
        current_tally().comparisons[EXACT] += 1
        if not abs(claimed - found) <= allowed:
            summary = f"along a direction the gradient says {claimed:.9g}, small steps {found:.9g}"
            details = (f"the difference may be {allowed:.3g}",)
            raise ConformanceFailure("wrong values", summary, details=details, call=call)


def assert_teacher_gets_no_gradient(distillation_loss: Subject, case: DistillationCase) -> None:
    """Nothing reaches a teacher whose logits could have a gradient."""
    call = float32(distillation_loss, case).then("teacher.requires_grad_()")
    (student, teacher, labels), options = call.values()
    with failing_at(call):
        loss = checked(distillation_loss(student, teacher, labels, **options), call)
        found = gradient_of(loss, teacher, 1.0) if loss.requires_grad else torch.zeros(())
    assert_zero(found, call, "the gradient of the teacher")


# Some columns of a teacher


def assert_not_above_whole(distillation_loss: Subject, case: DistillationCase) -> None:
    """Some columns do not tell more than all of them."""
    call = float32(distillation_loss, case)
    whole = expected_loss(replace(case, top=0).call(torch.float32))
    found = float(run(distillation_loss, call).loss)
    bound = float(whole.value) + whole.limits.largest
    current_tally().comparisons[EXACT] += 1
    if not found <= bound:
        summary = f"{case.top} columns give {found:.6g}, all of them {float(whole.value):.6g}"
        raise ConformanceFailure("wrong values", summary, call=call)


def assert_as_whole(distillation_loss: Subject, case: DistillationCase) -> None:
    """With all columns the loss and its gradient are those of the whole teacher."""
    call = float32(distillation_loss, case)
    whole = replace(case, top=0).call(torch.float32)
    ran = run(distillation_loss, call)
    assert_loss(ran, call, expected_loss(whole))
    assert_gradient(ran.gradient, oracle_gradient(whole), call, 1.0)


def assert_after(distillation_loss: Subject, case: DistillationCase, *lines: str) -> None:
    """Loss and gradient are the oracle's after further lines, as they are before them."""
    call = float32(distillation_loss, case)
    assert_both(distillation_loss, call)
    assert_both(distillation_loss, call.then(*lines))


def assert_tail_gradient(distillation_loss: Subject, case: DistillationCase) -> None:
    """Columns that the teacher does not give have the oracle's gradient, each its share."""
    call = float32(distillation_loss, case)
    ran = run(distillation_loss, call)
    indices, whole = call.named("indices").cpu(), oracle_gradient(call)
    given = torch.zeros(ran.gradient.shape, dtype=torch.bool).scatter(-1, indices, True)
    tail = torch.where(given.flatten(0, 1), 0, whole.value)
    found = torch.where(given, 0, ran.gradient.double())
    assert_gradient(found, replace(whole, value=tail), call, 1.0)


SLICED = ("teacher_indices", "teacher_logsumexp")
"""Options that have rows, as the logits do."""


def assert_adds_up(
    distillation_loss: Subject, case: DistillationCase, splits: tuple[slice, ...]
) -> None:
    """Losses and gradients of parts, divided by the targets of the whole, add up to the whole's."""
    call = float32(distillation_loss, case)
    (student, teacher, labels), options = call.values()
    items = max(1, case.valid)
    losses, gradients = 0.0, []
    for rows in splits:
        leaf = student.detach()[rows].clone().requires_grad_()
        parts = {"student": leaf, "teacher": teacher[rows], "labels": labels[rows]}
        parts |= {name: options[name][rows] for name in SLICED if name in options}
        ran = run(distillation_loss, call, num_items_in_batch=items, **parts)
        losses += ran.loss.double().cpu()
        gradients.append(ran.gradient)
    with shown_by_parts(call, items, splits):
        assert_loss(Ran(losses, gradients[0]), call)
        assert_gradient(torch.cat(gradients), oracle_gradient(call), call, 1.0)


@contextmanager
def shown_by_parts(call: Call, items: int, splits: tuple[slice, ...]) -> Iterator[None]:
    """A failure in here is shown by the sum over parts, each with so many items in its batch."""
    try:
        yield
    except ConformanceFailure as failure:
        given = dict(call.options) | {"num_items_in_batch": str(items)}
        options = [f"{n}={s}[i:j]" if n in SLICED else f"{n}={s}" for n, s in given.items()]
        parts = [f"{name}[i:j]" for name in call.arguments]
        part = f"{call.contract}({', '.join((*parts, *options))})"
        ends = [(rows.start, rows.stop) for rows in splits]
        failure.shown_by = f"out = sum({part} for i, j in {ends})\n{failure.shown_by}"
        raise


def assert_refused(
    distillation_loss: Subject, case: DistillationCase, *edits: str, **options: str
) -> None:
    """The call raises, whatever it raises."""
    call = float32(distillation_loss, case, *edits, **options)
    (student, teacher, labels), given = call.values()
    current_tally().comparisons[EXACT] += 1
    try:
        with failing_at(call):
            loss = distillation_loss(student, teacher, labels, **given)
    except ConformanceFailure as failure:
        if not failure.kind.startswith("raised "):
            raise
        return
    found = (
        f"{float(loss.detach()):.6g}"
        if isinstance(loss, Tensor) and loss.numel() == 1
        else "a result"
    )
    raise ConformanceFailure("accepted", f"bad input gives {found} and no exception", call=call)
