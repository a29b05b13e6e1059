"""Checkpoints of sharded models: cases, what ranks do one after another, and the checks.

A batch is twelve rows, of which each of one to four ranks has an equal part, its own: whatever the
number of ranks, a step is that of one process with the whole batch. Ranks save in one call and load
in another, on groups of other sizes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.failures import ConformanceFailure, Declined, TimedOut, failing_at
from conformance.harness.flat_cases import FROZEN, SGD, FlatCase
from conformance.harness.flat_checks import assert_names, assert_parameters, initial
from conformance.harness.flat_oracle import MAX_NORM, whole
from conformance.harness.flat_programs import load_optimizers
from conformance.harness.flat_subject import ByName, Driver, make
from conformance.harness.qwen2_cases import as_strategy
from conformance.harness.rank_pool import PATIENCE, on_ranks, under_torchrun
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, bitwise_equal, first_line

ROWS = 12
"""Rows of a batch: what one, two, three and four ranks divide."""
WORLDS = (1, 2, 3, 4)

# Cases


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckpointCase(FlatCase):
    """A model as one process has it, and the numbers of ranks that save and load it."""

    ranks: int = 1
    micro_batches: int = 1
    batch: int = ROWS
    tokens: int = 3
    saved_on: int = 2
    loaded_on: int = 3

    def __repr__(self) -> str:
        """Who saves and loads, and whatever is not at its default."""
        named = ("saved_on", "loaded_on")
        shown = [f"{name}={getattr(self, name)}" for name in named]
        shown += [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name not in named and getattr(self, field.name) != field.default
        ]
        return f"CheckpointCase({', '.join(shown)})"

    def __hash__(self) -> int:
        """Of what is shown: an optimizer is a mapping."""
        return hash(repr(self))

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = super().confusable() - {"one rank"}
        return equal | ({"one rank"} if self.saved_on == self.loaded_on == 1 else set())

    def call(self, *edits: str, **options: str) -> CheckpointCall:
        """See :meth:`FlatCase.call`."""
        made = super().call(*edits, **options)
        return CheckpointCall(**{field.name: getattr(made, field.name) for field in fields(made)})


@dataclass(frozen=True)
class CheckpointCall(Call):
    """The call that makes a model, and what ranks then did with it."""

    told: tuple[str, ...] = ()

    @property
    def preamble(self) -> tuple[str, ...]:
        """What is to be done with the model, and on how many ranks of torchrun."""
        return tuple(f"# {line}" for line in self.told)


def checkpoint_cases(
    worlds: tuple[tuple[int, int], ...] | None = None, **fixed: Any
) -> SearchStrategy[CheckpointCase]:
    """Cases with an optimizer; a strategy or a value fixes a field.

    ``worlds`` are pairs of numbers of ranks that save and load; default: any.
    """
    return _checkpoint_cases(worlds or tuple(product(WORLDS, WORLDS)), fixed)


def small_cases(
    worlds: tuple[tuple[int, int], ...] = ((2, 3), (3, 2), (1, 2), (2, 1)), **fixed: Any
) -> SearchStrategy[CheckpointCase]:
    """The same for rules about files, which sizes and values matter little to: a few cases."""
    sizes = {name: getattr(CheckpointCase, name) for name in ("vocab", "width", "hidden")}
    small = sizes | {"tied": False, "frozen": (4,), "seed": 1}
    return checkpoint_cases(worlds, **(small | fixed))


@st.composite
def _checkpoint_cases(
    draw: st.DrawFn, worlds: tuple[tuple[int, int], ...], fixed: Mapping[str, Any]
) -> CheckpointCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    given["saved_on"], given["loaded_on"] = draw(st.sampled_from(worlds))
    if given.get("tiny"):
        given["tied"] = False
    choices = {
        "vocab": st.integers(17, 29),
        "width": st.sampled_from([10, 7, 13]),
        "hidden": st.sampled_from([14, 9, 11]),
        "tied": st.booleans(),
        "frozen": FROZEN,
        "optimizer": st.just(SGD),
        "seed": st.integers(0, 2**16),
    }
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in given}
    return CheckpointCase(**given, **drawn)


# On the ranks


class Session:
    """A model on one rank, and what can be done with it: every method is a step of a story."""

    def __init__(
        self,
        subject: Subject,
        modules: list[nn.Module],
        options: dict[str, Any],
        inputs: list[Tensor],
        upstream: list[Tensor],
    ) -> None:
        import torch.distributed as dist

        there = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        self.making = subject, modules, options
        self.inputs, self.upstream = inputs, upstream
        self.make()

    def make(self) -> None:
        """Make a new model in the place of the one that there is."""
        self.driver: Driver = make(*self.making)

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows."""
        rows = len(x) // self.world
        return x[self.rank * rows : (self.rank + 1) * rows].clone()

    def backward(self, number: int, last: bool = True, factor: float = 1.0) -> None:
        """Forward and backward pass of this rank's part of a batch.

        The mean over the ranks is to be the sum over the rows: each rank's part counts for all.
        """
        upstream = self.own(self.upstream[number]) * (factor * self.world)
        self.driver.micro_batch(self.own(self.inputs[number]), upstream, last=last)

    def step(self) -> None:
        """A step of the optimizer."""
        self.driver.step()

    def train(self, number: int) -> None:
        """A whole step with a batch."""
        self.backward(number)
        self.step()

    def train_clipped(self, number: int) -> bool:
        """The same with clipping, where the model has that; whether it has."""
        self.backward(number)
        clips = hasattr(self.driver.model, "clip_gradients")
        if clips:
            self.driver.clip_gradients(MAX_NORM)
        self.step()
        return clips

    def coast(self, number: int) -> None:
        """A step with gradients of zero: what moves is moved by the optimizer's state."""
        self.backward(number, factor=0.0)
        self.step()

    def outputs(self, number: int) -> Tensor:
        """The outputs for this rank's part of a batch."""
        with torch.no_grad():
            return self.driver.forward(self.own(self.inputs[number])).detach().clone()

    def parameters(self) -> dict[str, Tensor]:
        """All parameters."""
        return self.driver.parameters()

    def set_parameters(self, values: dict[str, Tensor]) -> None:
        """Give the model other parameters."""
        self.driver.load_parameters(values)

    def save(self, directory: Path) -> None:
        """Write a checkpoint."""
        with as_exceptions():
            self.driver.save(str(directory))

    def load(self, directory: Path) -> None:
        """Read a checkpoint."""
        with as_exceptions():
            self.driver.load(str(directory))

    def invalidate(self) -> None:
        """Invalidate buffers and fill them with NaN, as far as the model has these methods."""
        if hasattr(self.driver.model, "invalidate"):
            self.driver.invalidate()
        if hasattr(self.driver.model, "buffers"):
            for buffer in self.driver.buffers():
                buffer.detach().fill_(torch.nan)

    def spoil(self, directory: Path) -> None:
        """Overwrite all files of a directory, and remove it."""
        self.wait()
        if self.rank == 0:
            for path in files_of(directory):
                path.write_bytes(b"\xff" * path.stat().st_size)
            shutil.rmtree(directory)
        self.wait()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            torch.distributed.barrier()

    def agree(self, error: str | None) -> None:
        """Fail on every rank where some ranks have an error and others do not."""
        errors = [error]
        if self.world > 1:
            errors *= self.world
            torch.distributed.all_gather_object(errors, error)
        if 0 < errors.count(None) < len(errors):
            loaded = ", ".join(str(rank) for rank, each in enumerate(errors) if each is None)
            problem = next(each for each in errors if each is not None)
            summary = f"of {self.world} ranks only {loaded} can load; another: {problem[:200]}"
            raise ConformanceFailure("ranks disagree", summary)

    def attempt(self, directory: Path, following: int = 1) -> Attempt:
        """Load into a new model what may be refused."""
        self.make()
        error = None
        try:
            with as_exceptions(named=False):
                self.driver.model.load(str(directory))
        except NotImplementedError as declined:
            raise Declined(first_line(declined) or "NotImplementedError") from declined
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        self.agree(error)
        if error is None:
            parameters = self.parameters()
            self.train(following)
            return Attempt(None, parameters, self.parameters())
        return Attempt(error, self.or_refused(self.parameters), self.or_refused(self.outputs, 0))

    def try_load(self, directory: Path) -> None:
        """Load what may be refused, and go on with the same model."""
        with suppress(ConformanceFailure):
            self.load(directory)

    def or_refused(self, method: Callable, *arguments: Any) -> Any:
        """What a method gives, or None where the model refuses to be used."""
        try:
            return method(*arguments)
        except ConformanceFailure as failure:
            if failure.kind.startswith("raised"):
                return None
            raise


@contextmanager
def as_exceptions(*, named: bool = True) -> Iterator[None]:
    """What is raised and no Exception, as that of ``torch.distributed.checkpoint``, becomes one."""
    try:
        yield
    except (Exception, KeyboardInterrupt, TimedOut):
        raise
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".strip()
        if named:
            kind = f"raised {type(error).__name__}"
            raise ConformanceFailure(kind, f"{kind}: {first_line(error) or text}") from error
        raise RuntimeError(text) from error


@dataclass(frozen=True)
class Attempt:
    """What came of loading a checkpoint."""

    error: str | None
    parameters: dict[str, Tensor] | None
    """Those of the model then; None if it refuses to be used."""
    later: Any
    """Parameters after a further step; after an error the model's outputs, or None."""


def act(
    subject: Subject,
    modules: list[nn.Module],
    options: dict[str, Any],
    inputs: list[Tensor],
    upstream: list[Tensor],
    steps: tuple[tuple[Any, ...], ...],
) -> list[Any]:
    """Make a model and do one step after another; what those that give something gave."""
    session = Session(subject, modules, options, inputs, upstream)
    gave = [getattr(session, name)(*arguments) for name, *arguments in steps]
    return [packed(each) for each in gave if each is not None]


def packed(found: Any) -> Any:
    """The same with tensors as arrays, as far as numpy has their dtypes: they travel much faster."""
    if isinstance(found, Tensor):
        return found if found.dtype == torch.bfloat16 else found.cpu().numpy()
    if isinstance(found, dict):
        return {name: packed(each) for name, each in found.items()}
    if isinstance(found, Attempt):
        return Attempt(found.error, packed(found.parameters), packed(found.later))
    return found


def unpacked(found: Any) -> Any:
    """What :func:`packed` had packed; a name that a mapping lacks is a failure, as it was there."""
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found)
    if isinstance(found, dict):
        return ByName((name, unpacked(each)) for name, each in found.items())
    if isinstance(found, Attempt):
        return Attempt(found.error, unpacked(found.parameters), unpacked(found.later))
    return found


# In the test


class Story:
    """What the ranks of several groups do one after another with the model of a case."""

    def __init__(self, flat_shards: Subject, case: CheckpointCase, *edits: str, **options: str):
        self.subject, self.case = flat_shards, case
        self.base = self.call = case.call(*edits, **options)
        self.other = case.call(*edits, OTHER_VALUES, **options)

    def on(self, ranks: int, *steps: tuple[Any, ...], of: Call | None = None) -> list[Any]:
        """Do the steps on so many ranks, with a new model, and give what each rank gives.

        A single thing that is given is not put in a list. ``of`` is a call that makes another model.
        """
        words = ", ".join(map(told, steps))
        model = "" if of is None else "of other parameters: "
        line = f"on {ranks} {'rank' if ranks == 1 else 'ranks'}: {model}{words}"
        self.call = replace(self.call, told=(*self.call.told, line))
        made = of or self.base
        [modules], options = made.values()
        batches = [made.named(name)[0] for name in ("inputs", "upstream")]
        load_optimizers()
        with failing_at(self.call):
            gave = on_ranks(self.subject, ranks, act, modules, options, *batches, steps)
        gave = [[unpacked(thing) for thing in each] for each in gave]
        return [each[0] if len(each) == 1 else each for each in gave]

    def loads(self, ranks: int, *steps: tuple[Any, ...], of: Call | None = None) -> list[Any]:
        """The same with a model that is made with other parameters."""
        return self.on(ranks, *steps, of=of or self.other)


OTHER_VALUES = "for p in parameters.values(): p.data = 1.25 * p.data + 0.125"
"""A line after which a model has other parameters: what is loaded must not have been there before."""


def told(step: tuple[Any, ...]) -> str:
    """A step in words."""
    name, *arguments = step
    shown = [a.name if isinstance(a, Path) else str(a) for a in arguments]
    shown = [text if len(text) < 30 else "…" for text in shown]
    return f"{name}({', '.join(shown)})"


MEMORY = Path("/dev/shm")
"""Where files are memory, as on Linux: to wait for a disk takes longer than all the rest."""


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder, the same for all ranks."""
    if not under_torchrun():
        where = MEMORY if os.access(MEMORY, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="conformance-checkpoints-", dir=where) as name:
            yield Path(name)
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    names = [tempfile.mkdtemp(prefix="conformance-checkpoints-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names)
    try:
        yield Path(names[0])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(names[0], ignore_errors=True)


def done_once(function: Callable, *arguments: Any) -> Any:
    """What a function gives that changes files: under torchrun, where all ranks are here, on one."""
    if not under_torchrun():
        return function(*arguments)
    import torch.distributed as dist

    made = [function(*arguments) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]


def files_of(directory: Path) -> list[Path]:
    """All files of a directory and what is in it."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


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
