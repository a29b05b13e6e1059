"""Checks of sharded models: parameters, outputs, gradients, clipping, steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.failures import ConformanceFailure
from conformance.harness.flat_cases import FlatCase
from conformance.harness.flat_oracle import MAX_NORM, whole
from conformance.harness.flat_programs import (
    GRADIENTS,
    LOAD,
    READ,
    VALUES,
    Program,
    attempt,
    backward,
    evaluate,
    showing,
    training,
)
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, bitwise_equal
from conformance.harness.tolerance import Expectation

CPU = torch.device("cpu")
CLIP = f"norm = float(out.clip_gradients({MAX_NORM}))"


# What is expected


def initial(call: Call) -> dict[str, Tensor]:
    """The parameters that the call's model is made with."""
    return {name: p.detach() for name, p in call.named("parameters").items()}


def made_of(call: Call, values: str = "values") -> Call:
    """The same call with other initial parameters, which a line of it has made."""
    return call.then(f"for name, p in parameters.items(): p.data = {values}[name]")


# Parameters


def assert_parameters(
    found: list[dict[str, Tensor]], expected: dict[str, Tensor], call: Call, *, when: str
) -> None:
    """Every rank has every parameter, and no other, bit for bit.

    What is expected may have been read from another model.
    """
    if not expected:
        summary = f"parameters {when} are compared with those of a model that has none"
        raise ConformanceFailure("missing weight", summary, call=call)
    for rank, parameters in enumerate(found):
        where = f"full_parameters() of rank {rank} {when}"
        assert_names(parameters, list(expected), call, where)
        for name, value in expected.items():
            assert_same(parameters[name], value, call, f"{name} of rank {rank}", when)


def assert_names(found: Any, names: list[str], call: Call, where: str) -> None:
    """A mapping with these names and no others."""
    if not isinstance(found, Mapping):
        raise ConformanceFailure("wrong type", f"{where} is {found}, not a mapping", call=call)
    for name in names:
        if name not in found:
            have = ", ".join(found) or "nothing"
            raise ConformanceFailure("missing weight", f"{where} lacks {name}: {have}", call=call)
    unknown = found.keys() - set(names)
    if unknown:
        raise ConformanceFailure("unknown weight", f"{where} has {min(unknown)}", call=call)


def assert_same(found: Any, expected: Tensor, call: Call, name: str, when: str) -> None:
    """A tensor with the expected shape, dtype and bits."""
    assert_tensor(found, tuple(expected.shape), expected.dtype, CPU, call=call, name=name)
    if expected.numel():
        assert_identical(found, expected, call, because=f"{name} {when}")


def assert_read(
    flat_shards: Subject,
    call: Call,
    *lines: str,
    when: str,
    expected: dict[str, Tensor] | None = None,
) -> None:
    """After these lines every rank reads the expected parameters; default: the initial ones."""
    program = Program(call, (*lines, READ))
    found = [each["read"] for each in program.run(flat_shards, "read")]
    with program.failing():
        assert_parameters(found, expected or initial(call), call, when=when)


def assert_loaded(flat_shards: Subject, case: FlatCase, *lines: str, reading: str = READ) -> None:
    """After a load and these lines every rank reads what was loaded."""
    program = Program(case.call(VALUES), (LOAD, *lines, reading))
    found = [each["read"] for each in program.run(flat_shards, "read")]
    with program.failing():
        expected = program.call.named("values")
        assert_parameters(found, expected, program.call, when="after load_parameters")


def assert_load_refused(flat_shards: Subject, case: FlatCase, change: str, *named: str) -> None:
    """A load of changed values is refused on every rank, by name, and has changed nothing."""
    call = case.call(VALUES, change)
    program = Program(call, (attempt("out.load_parameters(values)"), READ))
    ran = program.run(flat_shards, "refused", "read")
    with program.failing():
        assert_refused([each["refused"] for each in ran], call, "load_parameters", *named)
        found = [each["read"] for each in ran]
        assert_parameters(found, initial(call), call, when="after a load that was refused")


def assert_refused(errors: list[str | None], call: Call, what: str, *named: str) -> None:
    """Every rank has had an exception, whose text has the names."""
    for rank, error in enumerate(errors):
        current_tally().comparisons["exact"] += 1
        if error is None:
            summary = f"{what} of rank {rank} raises no exception"
            raise ConformanceFailure("accepted", summary, call=call)
        for name in named:
            if name not in error:
                summary = f"the error of {what} on rank {rank} does not name {name}: {error[:200]}"
                raise ConformanceFailure("unclear error", summary, call=call)


def assert_values(
    read: list[dict[str, Any]],
    expectations: Mapping[str, Expectation],
    call: Call,
    what: str,
) -> None:
    """Every rank has these float32 tensors by name; ``what`` has places for name and rank.

    What has the bits of the first rank's is not measured again.
    """
    for name, expectation in expectations.items():
        for rank, each in enumerate(read):
            found, first = each[name], read[0][name]
            if rank and isinstance(found, Tensor) and bitwise_equal(found, first):
                current_tally().comparisons["exact"] += 1
                continue
            with showing(f"read[{name!r}]"):
                assert_value(found, expectation, call, what.format(name, rank), torch.float32)


# Outputs


def assert_value(
    found: Any, expectation: Expectation, call: Call, name: str, dtype: torch.dtype | None = None
) -> None:
    """A tensor of the expected shape in a dtype, that of the call by default, within the limits."""
    shape = tuple(expectation.value.shape)
    assert_tensor(found, shape, dtype or call.dtype, CPU, call=call, name=name)
    assert_close_to(found, expectation, call, name=name)


def assert_forward(
    flat_shards: Subject, call: Call, *lines: str, of: Call | None = None, step: int = 0
) -> None:
    """After these lines every rank has the outputs of the whole model for its batches of a step.

    ``of`` is the call that makes the whole model, if it is another.
    """
    case: FlatCase = call.case
    program = Program(call, (*lines, evaluate(case, step)))
    ran = program.run(flat_shards, "outputs")
    expected = whole(of or call)
    with program.failing():
        for rank, each in enumerate(ran):
            for number, output in enumerate(each["outputs"], step * case.micro_batches):
                expectation = expected.expectation(f"outputs {rank} {number}")
                with showing(f"outputs[{number - step * case.micro_batches}]"):
                    assert_value(output, expectation, call, f"output {number} of rank {rank}")


def assert_twice(flat_shards: Subject, case: FlatCase) -> None:
    """A second forward pass over the same batches gives the same bits on every rank."""
    call = case.call()
    program = Program(call, (evaluate(case), "first = outputs", evaluate(case)))
    ran = program.run(flat_shards, "first", "outputs")
    with program.failing():
        for rank, each in enumerate(ran):
            for number, (one, two) in enumerate(zip(each["first"], each["outputs"])):
                assert_same(two, one, call, f"output {number} of rank {rank}", "of a second call")


# Gradients


def assert_gradients(
    flat_shards: Subject,
    call: Call,
    *lines: str,
    step: int = 0,
    like: str = "gradient",
) -> None:
    """After these lines every rank reads the gradients of a step, of all parameters that train.

    With ``like="clipped"`` they are those of the whole model after clipping.
    """
    program = Program(call, (*lines, GRADIENTS))
    ran = program.run(flat_shards, "read")
    expected = whole(call, like == "clipped")
    with program.failing():
        names = call.case.trained_names()
        for rank, each in enumerate(ran):
            assert_names(each["read"], names, call, f"full_gradients() of rank {rank}")
        expectations = {name: expected.expectation(f"{like} {name} {step}") for name in names}
        read = [each["read"] for each in ran]
        assert_values(read, expectations, call, "gradient of {} on rank {}")


def assert_step_gradients(flat_shards: Subject, case: FlatCase, *edits: str) -> None:
    """The gradients of the first step are those of the whole model."""
    assert_gradients(flat_shards, case.call(*edits), backward(case))


def assert_missing_gradient_named(flat_shards: Subject, case: FlatCase) -> None:
    """Without leave for it, a parameter without a gradient is named on every rank."""
    call = case.call(allow_no_grad="False")
    [name] = [name for name in case.names() if name.endswith("unused")]
    loss = "(out.forward(inputs[rank][0]).float() * upstream[rank][0]).sum()"
    program = Program(call, (attempt(f"out.backward({loss})"),))
    errors = [each["refused"] for each in program.run(flat_shards, "refused")]
    with program.failing():
        assert_refused(errors, call, "backward()", name)


def assert_missing_anywhere_named(flat_shards: Subject, case: FlatCase) -> None:
    """Where one rank lacks a gradient every rank says so; where none does, none."""
    call = case.call(allow_no_grad="False")
    [name] = [name for name in case.names() if name.endswith("unused")]
    program = Program(call, (attempt(backward(case)),))
    errors = [each["refused"] for each in program.run(flat_shards, "refused")]
    model = nn.Sequential(*call.named("modules"))
    lacking = [rank for rank in range(case.ranks) if not uses(model, name, call, rank)]
    with program.failing():
        if lacking:
            assert_refused(errors, call, f"backward(), which rank {lacking[0]} must refuse,", name)
        elif any(errors):
            summary = f"backward() raises although every gradient came: {errors[0]}"
            raise ConformanceFailure("refused", summary, call=call)


def uses(model: nn.Module, name: str, call: Call, rank: int) -> bool:
    """Whether the first batch of a rank has a gradient for a parameter."""
    with torch.enable_grad():
        out = model(call.named("inputs")[rank][0])
        found = torch.autograd.grad(out.sum(), [model.get_parameter(name)], allow_unused=True)
    return found[0] is not None


# Clipping


def assert_norm(flat_shards: Subject, case: FlatCase) -> None:
    """Clipping gives the norm of all gradients together, the same on every rank."""
    call = case.call()
    program = Program(call, (backward(case), CLIP))
    ran = program.run(flat_shards, "norm")
    expectation = whole(call, True).expectation("norm 0")
    with program.failing():
        for rank, each in enumerate(ran):
            found = torch.tensor([each["norm"]], dtype=torch.float64)
            assert_value(found, expectation, call, f"norm on rank {rank}", torch.float64)
            because = f"the norm on rank {rank} and that on rank 0"
            first = torch.tensor([ran[0]["norm"]], dtype=torch.float64)
            assert_identical(found, first, call, because=because)


def assert_clipped(flat_shards: Subject, case: FlatCase) -> None:
    """Gradients after clipping are those of the whole model after clipping."""
    assert_gradients(flat_shards, case.call(), backward(case), CLIP, like="clipped")


def assert_not_clipped(flat_shards: Subject, case: FlatCase) -> None:
    """With a limit above the norm gradients keep their bits."""
    call = case.call()
    lines = (backward(case), "before = out.full_gradients()", "out.clip_gradients(1e6)", GRADIENTS)
    program = Program(call, lines)
    ran = program.run(flat_shards, "before", "read")
    with program.failing():
        for rank, each in enumerate(ran):
            for name, gradient in each["before"].items():
                about = f"gradient of {name} on rank {rank}"
                assert_same(each["read"][name], gradient, call, about, "below the limit")


# Steps


def assert_trained(flat_shards: Subject, call: Call, *between: str, clipped: bool = False) -> None:
    """After all steps every rank reads the parameters of the whole model; frozen ones bit for bit.

    ``between`` are lines before each update.
    """
    case: FlatCase = call.case
    before = (CLIP, *between) if clipped else between
    program = Program(call, (*training(case, *before), READ))
    ran = program.run(flat_shards, "read")
    expected, start = whole(call, clipped), initial(call)
    with program.failing():
        for rank, each in enumerate(ran):
            assert_names(each["read"], list(start), call, f"full_parameters() of rank {rank}")
            for name in case.frozen_names():
                about = f"{name} on rank {rank} after {case.steps} steps"
                assert_same(each["read"][name], start[name], call, about, "although it is frozen")
        expectations = {
            name: expected.expectation(f"parameter {name} {case.steps}")
            for name in case.trained_names()
        }
        read = [each["read"] for each in ran]
        assert_values(read, expectations, call, f"{{}} on rank {{}} after {case.steps} steps")


def assert_changes(flat_shards: Subject, case: FlatCase) -> None:
    """What all steps changed, the difference from the initial parameters, is as precise as it was."""
    call = case.call()
    program = Program(call, (*training(case), READ))
    ran = program.run(flat_shards, "read")
    expected, start = whole(call), initial(call)
    with program.failing():
        for rank, each in enumerate(ran):
            for name in case.trained_names():
                change = each["read"][name].to(torch.float64) - start[name]
                about = f"change of {name} on rank {rank}"
                expectation = expected.expectation(f"change {name}")
                assert_value(change, expectation, call, about, torch.float64)


def assert_ranks_agree(flat_shards: Subject, case: FlatCase) -> None:
    """After all steps every rank reads the same bits."""
    call = case.call()
    program = Program(call, (*training(case), READ))
    ran = program.run(flat_shards, "read")
    with program.failing():
        found = [each["read"] for each in ran]
        assert_parameters(found, found[0], call, when="and of rank 0")
