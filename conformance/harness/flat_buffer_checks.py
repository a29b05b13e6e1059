"""Checks of the flat design: buffers and what is in them when, shards, and padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call
from conformance.harness.compare import assert_identical
from conformance.harness.failures import ConformanceFailure
from conformance.harness.flat_cases import FlatCase
from conformance.harness.flat_checks import assert_refused, assert_same, assert_value, initial
from conformance.harness.flat_oracle import whole
from conformance.harness.flat_programs import (
    HELD,
    READ,
    RESTORE,
    STALE,
    Program,
    attempt,
    training,
)
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject

EACH = "for name in parameters:"
TRY = """held = {}
for name in parameters:
    try: held[name] = out.parameter(name).detach().clone()
    except Exception: held[name] = None"""
"""Lines that leave in ``held`` what each parameter is, or None where reading it is an error."""
DOUBLE = "out.get_shard('weights').data.mul_(2)"
"""Changes the model behind the back of its buffers, exactly."""


def agree(condition: bool, kind: str, summary: str, call: Call) -> None:
    """Count one exact comparison, which fails with a summary."""
    current_tally().comparisons["exact"] += 1
    if not condition:
        raise ConformanceFailure(kind, summary, call=call)


def assert_held(
    held: dict[str, Any],
    expected: dict[str, Tensor],
    call: Call,
    *,
    rank: int,
    when: str,
    or_error: bool = False,
) -> None:
    """Parameters are the expected ones in the compute dtype; with ``or_error``, or cannot be read."""
    for name, found in held.items():
        if name not in expected:
            summary = f"full_parameters() of rank {rank} {when} lacks {name}"
            raise ConformanceFailure("missing weight", summary, call=call)
        if found is None and or_error:
            current_tally().comparisons["exact"] += 1
            continue
        about = f"parameter({name!r}) of rank {rank}"
        assert_same(found, expected[name].to(call.dtype), call, about, when)


# Parameters in buffers


def assert_current_or_error(
    flat_shards: Subject, call: Call, *lines: str, when: str, loaded: bool = False
) -> None:
    """After these lines a parameter of a module is the current one, or cannot be read.

    Current is what ``full_parameters()`` says, which for the start or for a load is known.
    """
    program = Program(call, (*lines, TRY, READ))
    ran = program.run(flat_shards, "held", "read")
    with program.failing():
        for rank, each in enumerate(ran):
            expected = call.named("values") if loaded else each["read"]
            assert_held(each["held"], expected, call, rank=rank, when=when, or_error=True)


def assert_restored(flat_shards: Subject, call: Call, *lines: str, loaded: bool = False) -> None:
    """After these lines and a restore the modules' parameters are those of the model."""
    program = Program(call, (*lines, RESTORE, HELD))
    ran = program.run(flat_shards, "held")
    expected = call.named("values") if loaded else initial(call)
    with program.failing():
        for rank, each in enumerate(ran):
            assert_held(each["held"], expected, call, rank=rank, when="after a restore")


def assert_views(flat_shards: Subject, case: FlatCase) -> None:
    """The parameters of modules lie in the buffers, without a gap or an overlap."""
    lines = (
        RESTORE,
        "memory = {b.untyped_storage().data_ptr() for b in out.buffers()}",
        "storage = lambda name: out.parameter(name).untyped_storage().data_ptr()",
        "outside = [name for name in parameters if storage(name) not in memory]",
        "for buffer in out.buffers(): buffer.data.fill_(3)",
        HELD,
    )
    program = Program(case.call(), lines)
    ran = program.run(flat_shards, "outside", "held")
    with program.failing():
        for rank, each in enumerate(ran):
            outside = each["outside"]
            agree(
                not outside,
                "a copy",
                f"on rank {rank} {outside[:1]} are in no buffer",
                program.call,
            )
            for name, value in each["held"].items():
                because = f"{name} of rank {rank} and a buffer that was filled with 3"
                assert_identical(value, torch.full_like(value, 3), program.call, because=because)


def assert_edit_is_lost(flat_shards: Subject, case: FlatCase) -> None:
    """An edit of a restored parameter changes no shard, and is gone after the next restore."""
    call = case.call()
    edit = f"{EACH} out.parameter(name).data.fill_(7)"
    program = Program(call, (RESTORE, edit, READ, STALE, RESTORE, HELD))
    ran = program.run(flat_shards, "read", "held")
    with program.failing():
        for rank, each in enumerate(ran):
            for name, value in initial(call).items():
                about = f"{name} of rank {rank} in full_parameters()"
                assert_same(each["read"][name], value, call, about, "after an edit in the buffer")
            assert_held(each["held"], initial(call), call, rank=rank, when="after an edit")


def assert_restore_is_idempotent(flat_shards: Subject, case: FlatCase) -> None:
    """A second restore does nothing, even if the shard has changed; after invalidate it gathers."""
    call = case.call()
    again = HELD.replace("held", "again")
    program = Program(call, (RESTORE, DOUBLE, RESTORE, HELD, STALE, RESTORE, again))
    until_held = replace(program, lines=program.lines[:4])
    ran = program.run(flat_shards, "held", "again")
    doubled = {name: 2 * value for name, value in initial(call).items()}
    for rank, each in enumerate(ran):
        with until_held.failing():
            assert_held(each["held"], initial(call), call, rank=rank, when="after two restores")
        with program.failing():
            when = "after the shard was doubled, invalidate and restore"
            assert_held(each["again"], doubled, call, rank=rank, when=when)


def assert_shards_kept(flat_shards: Subject, case: FlatCase) -> None:
    """Restoring and computing leave the shard as it was, bit for bit."""
    lines = (
        "before = out.get_shard('weights').detach().clone()",
        RESTORE,
        "out.forward(inputs[rank][0])",
        "after = out.get_shard('weights')",
    )
    program = Program(case.call(), lines)
    ran = program.run(flat_shards, "before", "after")
    with program.failing():
        for rank, each in enumerate(ran):
            because = f"get_shard('weights') of rank {rank} after restore and forward"
            assert_identical(each["after"], each["before"], program.call, because=because)


# Stages


def assert_stages(flat_shards: Subject, case: FlatCase) -> None:
    """Stages that are restored one after another give the output of the whole model."""
    call = case.call()
    lines = [STALE, "y = inputs[rank][0]"]
    for stage in range(case.stages):
        lines += [f"out.restore_stage({stage})", f"y = out.forward_stage({stage}, y)"]
    program = Program(call, tuple(lines))
    ran = program.run(flat_shards, "y")
    with program.failing():
        for rank, each in enumerate(ran):
            expectation = whole(call).expectation(f"outputs {rank} 0")
            assert_value(each["y"], expectation, call, f"output 0 of rank {rank}")


def assert_stage_refuses(flat_shards: Subject, case: FlatCase) -> None:
    """After invalidate no stage computes before it is restored."""
    compute = "out.forward_stage(0, inputs[rank][0])"
    lines = (STALE, attempt(compute, "first"), RESTORE, compute, STALE, attempt(compute, "second"))
    program = Program(case.call(), lines)
    ran = program.run(flat_shards, "first", "second")
    with program.failing():
        for when in ("first", "second"):
            errors = [each[when] for each in ran]
            assert_refused(errors, program.call, f"the {when} forward_stage() after invalidate()")


def assert_lost_or_right(flat_shards: Subject, case: FlatCase) -> None:
    """Where stages share a buffer, a stage that lost it says so: no stage has another's numbers."""
    call = case.call()
    lines = [STALE, "out.restore_stage(0)", "first = out.forward_stage(0, inputs[rank][0])"]
    lines += [f"out.restore_stage({stage})" for stage in range(1, case.stages)]
    lines += [
        attempt("again = out.forward_stage(0, inputs[rank][0])", "lost"),
        "again = first if lost else again",
        TRY,
    ]
    program = Program(call, tuple(lines))
    ran = program.run(flat_shards, "first", "again", "held")
    with program.failing():
        for rank, each in enumerate(ran):
            because = f"forward_stage(0) of rank {rank} after later stages were restored"
            assert_identical(each["again"], each["first"], call, because=because)
            when = "after all stages were restored in turn"
            assert_held(each["held"], initial(call), call, rank=rank, when=when, or_error=True)


# Shards


def assert_shard_is_the_model(flat_shards: Subject, case: FlatCase) -> None:
    """What is written to a shard is in the model at once."""
    call = case.call()
    program = Program(call, (DOUBLE, READ))
    ran = program.run(flat_shards, "read")
    with program.failing():
        for rank, each in enumerate(ran):
            for name, value in initial(call).items():
                about = f"{name} of rank {rank}"
                assert_same(each["read"][name], 2 * value, call, about, "after the shard doubled")


def assert_split(flat_shards: Subject, case: FlatCase) -> None:
    """What the ranks' shards hold of a parameter is, in rank order, the parameter; as views."""
    call = case.call()
    lines = ("parts = out.split_shard('weights')", DOUBLE, "shard = out.get_shard('weights')")
    program = Program(call, lines)
    ran = program.run(flat_shards, "parts", "shard")
    with program.failing():
        for name, value in initial(call).items():
            held = [each["parts"][name] for each in ran if name in each["parts"]]
            found = torch.cat([part.reshape(-1) for part in held]) if held else torch.empty(0)
            about = f"split_shard('weights') of all ranks, {name}"
            assert_same(found, 2 * value.reshape(-1), call, about, "after the shard doubled")
        for rank, each in enumerate(ran):
            parts, shard = list(each["parts"].values()), each["shard"]
            agree(shard.ndim == 1, "wrong shape", f"the shard of rank {rank} is not flat", call)
            because = f"the elements of the shard of rank {rank} and its parts in order"
            whole_of_parts = torch.cat([part.reshape(-1) for part in parts])
            assert_identical(shard[shard != 0], whole_of_parts, call, because=because)


def assert_order(flat_shards: Subject, case: FlatCase) -> None:
    """A shard has the modules in turn, of each first what trains."""
    call = case.call()
    program = Program(call, ("names = list(out.split_shard('weights'))",))
    ran = program.run(flat_shards, "names")
    frozen = set(case.frozen_names())
    with program.failing():
        for rank, each in enumerate(ran):
            keys = [(int(name.split(".")[0]), name in frozen) for name in each["names"]]
            summary = f"split_shard('weights') of rank {rank} has the order {each['names']}"
            agree(keys == sorted(keys), "wrong order", summary, call)


def assert_padding_stays_zero(flat_shards: Subject, case: FlatCase) -> None:
    """After steps, whatever was in the buffers, a shard has nothing but zeros beside its parts."""
    call = case.call()
    count = "torch.count_nonzero"
    poison = "for buffer in out.buffers(): buffer.data.fill_(5)"
    lines = (
        poison,
        *training(case),
        f"found = int({count}(out.get_shard('weights')))",
        f"expected = sum(int({count}(p)) for p in out.split_shard('weights').values())",
    )
    program = Program(call, lines)
    ran = program.run(flat_shards, "found", "expected")
    with program.failing():
        for rank, each in enumerate(ran):
            found, expected = each["found"], each["expected"]
            summary = f"the shard of rank {rank} has {found} elements that are not zero, its parts"
            agree(found == expected, "padding", f"{summary} have {expected}", call)


def assert_frozen_shards(flat_shards: Subject, case: FlatCase) -> None:
    """Of frozen parameters there are weights, and nothing in the shard of gradients."""
    call = case.call()
    lines = (
        "weights, grads = out.split_shard('weights'), out.split_shard('grads')",
        "sizes = [{name: p.numel() for name, p in split.items()} for split in (weights, grads)]",
    )
    program = Program(call, lines)
    ran = program.run(flat_shards, "sizes")
    shapes = {name: value.numel() for name, value in initial(call).items()}
    with program.failing():
        for which, names in enumerate((case.names(), case.trained_names())):
            shard = ("weights", "grads")[which]
            total = {name: sum(each["sizes"][which].get(name, 0) for each in ran) for name in names}
            for name in names:
                summary = f"the {shard} shards hold {total[name]} elements of {name}"
                fits = total[name] == shapes[name]
                agree(fits, "wrong elements", f"{summary}, which has {shapes[name]}", call)
        for rank, each in enumerate(ran):
            held = [n for n in case.frozen_names() if each["sizes"][1].get(n, 0)]
            summary = f"the grads shard of rank {rank} holds {held}, which are frozen"
            agree(not held, "wrong elements", summary, call)


def assert_gradients_are_shorter(flat_shards: Subject, case: FlatCase) -> None:
    """Where little trains, the shard of gradients is shorter than that of weights."""
    lines = ("length, whole = (out.get_shard(name).numel() for name in ('grads', 'weights'))",)
    program = Program(case.call(), lines)
    ran = program.run(flat_shards, "length", "whole")
    with program.failing():
        for rank, each in enumerate(ran):
            found, weights = each["length"], each["whole"]
            summary = f"get_shard('grads') of rank {rank} has {found} elements, weights {weights}"
            agree(0 < found < weights, "wrong elements", summary, program.call)


def assert_unknown_shard(flat_shards: Subject, case: FlatCase, name: str, **options: str) -> None:
    """A shard that there is not is a KeyError."""
    lines = (
        f"try: out.get_shard({name!r}); error = None\n"
        "except Exception as problem: error = problem.__cause__ or problem",
        "raised = isinstance(error, KeyError)",
        "error = repr(error)",
    )
    program = Program(case.call(**options), lines)
    ran = program.run(flat_shards, "raised", "error")
    with program.failing():
        for rank, each in enumerate(ran):
            summary = f"get_shard({name!r}) of rank {rank} ends with {each['error'][:100]}"
            agree(each["raised"], "accepted", f"{summary}, expected KeyError", program.call)
