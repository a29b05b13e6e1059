"""Checks of checkpoints of sharded models: what is loaded is what was saved, on any ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.failures import ConformanceFailure
from conformance.harness.flat_cases import SGD
from conformance.harness.flat_checkpoint_cases import CheckpointCase
from conformance.harness.flat_checks import assert_names, assert_parameters, initial
from conformance.harness.flat_folders import folder
from conformance.harness.flat_oracle import whole
from conformance.harness.flat_stories import OTHER_VALUES, Story
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, bitwise_equal


def assert_alike(
    found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], call: Call, *, because: str
) -> None:
    """Each rank has the parameters that are expected of it, bit for bit."""
    for rank, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_parameters([one], other, call, when=f"of rank {rank} {because}")


def assert_steps(
    found: list[dict[str, Tensor]], story: Story, steps: int, *, clipped: bool
) -> None:
    """Every rank has the parameters that one process has after so many steps."""
    expected = whole(story.base, clipped)
    for rank, parameters in enumerate(found):
        for name in story.case.names():
            if name not in parameters:
                summary = f"full_parameters() of rank {rank} lacks {name}"
                raise ConformanceFailure("missing weight", summary, call=story.call)
            expectation = expected.expectation(f"parameter {name} {steps}")
            what = f"{name} of rank {rank}"
            shape, cpu = tuple(expectation.value.shape), torch.device("cpu")
            assert_tensor(parameters[name], shape, torch.float32, cpu, call=story.call, name=what)
            assert_close_to(parameters[name], expectation, story.call, name=what)


# Parameters


def assert_round_trip(
    flat_shards: Subject, case: CheckpointCase, *, onto: tuple[int, ...] = ()
) -> None:
    """What was saved is loaded, bit for bit, on ``onto``, default: the case's number of ranks."""
    story = Story(flat_shards, case)
    with folder() as place:
        saved = story.on(case.saved_on, ("train", 0), ("parameters",), ("save", place / "one"))
        for ranks in onto or (case.loaded_on,):
            found = story.loads(ranks, ("load", place / "one"), ("parameters",))
            assert_parameters(found, saved[0], story.call, when="after loading")


def assert_saved_again(flat_shards: Subject, case: CheckpointCase) -> None:
    """A checkpoint that is loaded on other ranks and saved there is the same on the first ranks."""
    story = Story(flat_shards, case)
    one, two = case.saved_on, case.loaded_on
    with folder() as place:
        saved = story.on(one, ("train", 0), ("save", place / "one"), ("train", 1), ("parameters",))
        story.loads(two, ("load", place / "one"), ("save", place / "two"))
        found = story.loads(one, ("load", place / "two"), ("train", 1), ("parameters",))
        assert_alike(found, saved, story.call, because="after a detour over other ranks")


def assert_outputs_after(flat_shards: Subject, case: CheckpointCase) -> None:
    """Right after loading every rank's outputs are those of one process with what was saved."""
    story = Story(flat_shards, case)
    with folder() as place:
        [saved, *_] = story.on(
            case.saved_on, ("train", 0), ("parameters",), ("save", place / "one")
        )
        stale = (("outputs", 1), ("load", place / "one"), ("outputs", 1))
        found = story.loads(case.loaded_on, *stale)
        clean = (("set_parameters", saved), ("outputs", 1))
        expected = story.loads(case.loaded_on, *clean)
        for rank, ((before, after), right) in enumerate(zip(found, expected)):
            because = f"output of rank {rank} after loading, and of a model with what was saved"
            assert_identical(after, right, story.call, because=because)
            if bitwise_equal(before, after):
                summary = f"outputs of rank {rank} are those of before loading"
                raise ConformanceFailure("stale", summary, call=story.call)


def assert_stored_values(flat_shards: Subject, case: CheckpointCase) -> None:
    """What is saved are the parameters, whether or not they are anywhere but in the shards."""
    story = Story(flat_shards, case)
    expected = initial(story.base)
    other = {name: (value + 0.25) * 1.7 for name, value in expected.items()}
    with folder() as place:
        story.on(
            case.saved_on,
            ("save", place / "new"),
            ("set_parameters", other),
            ("save", place / "set"),
            ("outputs", 0),
            ("invalidate",),
            ("save", place / "stale"),
        )
        for names in (("new", "set"), ("stale",)):
            steps = [(("load", place / name), ("parameters",)) for name in names]
            found = story.loads(case.loaded_on, *(step for pair in steps for step in pair))
            if names == ("stale",):
                when = "saved from stale buffers"
                assert_parameters(found, other, story.call, when=when)
                continue
            for new, changed in found:
                assert_parameters([new], expected, story.call, when="saved by a new model")
                when = "saved after load_parameters()"
                assert_parameters([changed], other, story.call, when=when)


def assert_nested(flat_shards: Subject, case: CheckpointCase) -> None:
    """A directory that is not there is made, with those that it is in."""
    story = Story(flat_shards, case)
    with folder() as place:
        directory = place / "runs of today" / "step-1.0"
        saved = story.on(case.saved_on, ("parameters",), ("save", directory))
        if not directory.is_dir():
            summary = f"save() made no directory {directory.name}"
            raise ConformanceFailure("not written", summary, call=story.call)
        found = story.loads(case.loaded_on, ("load", directory), ("parameters",))
        assert_parameters(found, saved[0], story.call, when="after loading")


def assert_not_finite_kept(flat_shards: Subject, case: CheckpointCase) -> None:
    """NaN in a parameter is an error somewhere, or is there again after loading; never a number."""
    names = case.names()
    name = names[case.drawn["which"] % len(names)]
    value = ("nan", "inf")[case.drawn["value"]]
    story = Story(flat_shards, case, f"parameters[{name!r}].data.view(-1)[-1] = torch.{value}")
    expected = initial(story.base)
    with folder() as place:
        try:
            story.on(case.saved_on, ("save", place / "one"))
            steps = ("load", place / "one"), ("parameters",)
            found = story.on(case.loaded_on, *steps, of=case.call(OTHER_VALUES))
        except ConformanceFailure as failure:
            if not failure.kind.startswith("raised"):
                raise
            current_tally().comparisons["exact"] += 1
            return
        expected = without_infinity(expected)
        found = [without_infinity(parameters) for parameters in found]
        assert_parameters(found, expected, story.call, when="after loading")


def without_infinity(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with NaN for whatever is not finite: a step without gradients makes that of it."""
    return {name: x.masked_fill(~x.isfinite(), torch.nan) for name, x in parameters.items()}


# Optimizer


def assert_step_after(flat_shards: Subject, case: CheckpointCase) -> None:
    """A step after loading on other ranks is the next step of one process, clipping included."""
    story = Story(flat_shards, case)
    last = case.steps - 1
    with folder() as place:
        early = [("train_clipped", number) for number in range(last)]
        story.on(case.saved_on, *early, ("save", place / "one"))
        late = (("load", place / "one"), ("train_clipped", last), ("parameters",))
        found = story.loads(case.loaded_on, *late)
        clipped = found[0][0]
        assert_steps([parameters for _, parameters in found], story, case.steps, clipped=clipped)


def assert_resumed(flat_shards: Subject, case: CheckpointCase) -> None:
    """An interrupted run is the uninterrupted one, bit for bit, on as many ranks."""
    story = Story(flat_shards, case)
    half = case.steps // 2
    early = [("train_clipped", number) for number in range(half)]
    late = [("train_clipped", number) for number in range(half, case.steps)]
    with folder() as place:
        whole_run = (*early, ("save", place / "one"), *late, ("parameters",))
        through = story.on(case.saved_on, *whole_run)
        resumed = story.loads(case.saved_on, ("load", place / "one"), *late, ("parameters",))
        expected = [gave[-1] for gave in through]
        because = f"after {case.steps} steps, interrupted after {half}"
        assert_alike([gave[-1] for gave in resumed], expected, story.call, because=because)


def assert_other_frozen(flat_shards: Subject, case: CheckpointCase) -> None:
    """With other parameters frozen all weights are there, and the state of those that trained.

    The step after loading has gradients of zero. A parameter then goes on by its momentum, which is
    known from the step before, and decays; one that was frozen has no momentum.
    """
    other = replace(case, frozen=(case.drawn["one"], case.drawn["two"]))
    story, loading = Story(flat_shards, case), other.call(OTHER_VALUES)
    first = initial(story.base)
    with folder() as place:
        steps = (("train", 0), ("parameters",), ("save", place / "one"))
        [saved, *_] = story.on(case.saved_on, *steps)
        steps = (("load", place / "one"), ("parameters",), ("coast", 1), ("parameters",))
        found = story.loads(case.loaded_on, *steps, of=loading)
        assert_names(saved, list(first), story.call, "full_parameters() of what is saved")
        assert_parameters([f for f, _ in found], saved, story.call, when="after loading")
        for rank, (_, parameters) in enumerate(found):
            for name, value in parameters.items():
                trained = name not in case.frozen_names()
                moves = name not in other.frozen_names()
                expected = coasted(first[name], saved[name], trained=trained) if moves else None
                where = f"{name} of rank {rank}"
                if expected is None:
                    because = f"{where}, which is frozen, after a step"
                    assert_identical(value, saved[name], story.call, because=because)
                else:
                    assert_near(value, expected, story.call, where, trained=trained)


def coasted(before: Tensor, after: Tensor, *, trained: bool) -> Tensor:
    """A parameter after a step of SGD without a gradient, in float64.

    ``before`` and ``after`` are what it was before and after the step that filled the momentum.
    """
    before, after = before.double(), after.double()
    moved = SGD["momentum"] * (after - before) if trained else torch.zeros_like(after)
    decay = SGD["weight_decay"] if after.ndim > 1 else 0.0
    return after + moved - SGD["lr"] * decay * after


def assert_near(value: Tensor, expected: Tensor, call: Call, where: str, *, trained: bool) -> None:
    """Within the rounding of float32: a step rounds four numbers of the size of the parameter."""
    current_tally().comparisons["exact"] += 1
    bound = 4 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    error = float((value.double() - expected).abs().max())
    if not error <= bound:  # NaN is not
        state = "its momentum" if trained else "no momentum: it was frozen"
        summary = f"{where} is {error:.3g} off after a step with gradients of zero and {state}"
        raise ConformanceFailure("wrong state", summary, call=call)


# What loading and saving leave alone


def assert_replaces(flat_shards: Subject, case: CheckpointCase, *used: tuple[Any, ...]) -> None:
    """A model that was used is, after loading, one that is new and has loaded.

    ``used`` are the steps that it made after the first.
    """
    story = Story(flat_shards, case)
    with folder() as place:
        story.on(case.saved_on, ("train", 0), ("save", place / "one"))
        late = (("load", place / "one"), ("train", 1), ("parameters",))
        clean = story.loads(case.loaded_on, *late)
        found = story.loads(case.loaded_on, ("train", 1), *used, ("invalidate",), *late)
        found = [gave[-1] if isinstance(gave, list) else gave for gave in found]
        because = "of a model that was used before it loaded"
        assert_alike(found, clean, story.call, because=because)


def assert_loaded_twice(flat_shards: Subject, case: CheckpointCase) -> None:
    """Loading a checkpoint twice, or another one first, is loading it."""
    story = Story(flat_shards, case)
    with folder() as place:
        one, two = place / "one", place / "two"
        story.on(case.saved_on, ("train", 0), ("save", one), ("train", 1), ("save", two))
        late = (("load", one), ("train", 1), ("parameters",))
        clean = story.loads(case.loaded_on, *late)
        twice = story.loads(case.loaded_on, ("load", one), *late)
        other = story.loads(case.loaded_on, ("load", two), *late)
        assert_alike(twice, clean, story.call, because="after loading twice")
        assert_alike(other, clean, story.call, because="after loading another checkpoint first")


def assert_save_changes_nothing(flat_shards: Subject, case: CheckpointCase) -> None:
    """A run in which checkpoints are saved at any time is the run without them."""
    story = Story(flat_shards, case)
    ranks = case.saved_on
    plain = story.on(ranks, ("train", 0), ("train", 1), ("outputs", 0), ("parameters",))
    with folder() as place:
        found = story.on(
            ranks,
            ("save", place / "one"),
            ("backward", 0),
            ("save", place / "two"),
            ("step",),
            ("save", place / "three"),
            ("train", 1),
            ("save", place / "four"),
            ("outputs", 0),
            ("parameters",),
        )
        for rank, ((output, parameters), (right, expected)) in enumerate(zip(found, plain)):
            because = f"output of rank {rank} after saving"
            assert_identical(output, right, story.call, because=because)
            when = f"of rank {rank} after saving"
            assert_parameters([parameters], expected, story.call, when=when)


def assert_overwritten(flat_shards: Subject, case: CheckpointCase) -> None:
    """A directory that held a checkpoint of other ranks holds the latest one."""
    story = Story(flat_shards, case)
    one, two = case.saved_on, case.loaded_on
    with folder() as place:
        first, second = place / "one", place / "two"
        story.on(one, ("train", 0), ("save", first))
        late = (("load", first), ("train", 1), ("save", second), ("save", first), ("parameters",))
        saved = story.on(two, *late)
        for ranks in sorted({one, two}):
            steps = (("load", first), ("parameters",), ("train", 0), ("parameters",))
            found = story.loads(ranks, *steps)
            clean = story.loads(ranks, ("load", second), ("train", 0), ("parameters",))
            loaded = [parameters for parameters, _ in found]
            assert_parameters(loaded, saved[0], story.call, when="after loading")
            because = "of the second checkpoint in a directory"
            assert_alike([later for _, later in found], clean, story.call, because=because)


def assert_two_directories(flat_shards: Subject, case: CheckpointCase) -> None:
    """Checkpoints in two directories are two."""
    story = Story(flat_shards, case)
    with folder() as place:
        one, two = place / "one", place / "one-2"
        steps = ("train", 0), ("parameters",), ("save", one)
        more = ("train", 1), ("parameters",), ("save", two)
        saved = story.on(case.saved_on, *steps, *more)
        loads = ("load", one), ("parameters",), ("load", two), ("parameters",)
        for gave in story.loads(case.loaded_on, *loads):
            for found, expected, name in zip(gave, saved[0], ("first", "second")):
                when = f"of the {name} directory"
                assert_parameters([found], expected, story.call, when=when)


def assert_files_not_needed(flat_shards: Subject, case: CheckpointCase) -> None:
    """What was loaded stays when the files change or go."""
    story = Story(flat_shards, case)
    with folder() as place:
        save = ("train", 0), ("save", place / "one")
        story.on(case.saved_on, *save)
        late = ("train", 1), ("outputs", 0), ("parameters",)
        clean = story.loads(case.loaded_on, ("load", place / "one"), *late)
        found = story.loads(
            case.loaded_on, ("load", place / "one"), ("spoil", place / "one"), *late
        )
        for rank, ((output, parameters), (right, expected)) in enumerate(zip(found, clean)):
            when = f"of rank {rank} when the files are gone"
            assert_identical(output, right, story.call, because=f"output {when}")
            assert_parameters([parameters], expected, story.call, when=when)


def assert_inference(flat_shards: Subject, case: CheckpointCase) -> None:
    """A model that does not train takes the parameters of a checkpoint of training."""
    story = Story(flat_shards, case)
    inference = case.call(OTHER_VALUES, training="False").without("optimizer")
    with folder() as place:
        steps = ("train", 0), ("parameters",), ("save", place / "one")
        [saved, *_] = story.on(case.saved_on, *steps)
        loads = ("load", place / "one"), ("parameters",), ("outputs", 1)
        found = story.loads(case.loaded_on, *loads, of=inference)
        training = story.loads(case.loaded_on, ("load", place / "one"), ("outputs", 1))
        for rank, ((parameters, output), right) in enumerate(zip(found, training)):
            assert_parameters([parameters], saved, story.call, when=f"of rank {rank}")
            because = f"output of rank {rank} of a model for inference"
            assert_identical(output, right, story.call, because=because)
