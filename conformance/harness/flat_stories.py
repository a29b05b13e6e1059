"""Stories: what ranks do with a sharded model one after another, on groups of several sizes.

Ranks save in one call and load in another; each has its own rows of a batch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conformance.harness.calls import Call, Course, course
from conformance.harness.failures import ConformanceFailure, Declined, TimedOut, failing_at
from conformance.harness.flat_checkpoint_cases import ROWS, CheckpointCase
from conformance.harness.flat_folders import files_of
from conformance.harness.flat_oracle import MAX_NORM
from conformance.harness.flat_programs import load_optimizers
from conformance.harness.flat_subject import ByName, Driver, make
from conformance.harness.rank_pool import on_ranks
from conformance.harness.subject import Subject, bitwise_equal, first_line

# On the ranks


@dataclass(frozen=True)
class Material:
    """What the model of a call is made of, and the batches that it is fed with."""

    modules: list[nn.Module]
    options: dict[str, Any]
    inputs: list[Tensor]
    upstream: list[Tensor]

    @classmethod
    def of(cls, call: Call) -> Material:
        """That of a call."""
        [modules], options = call.values()
        return cls(modules, options, call.named("inputs")[0], call.named("upstream")[0])


class Session:
    """A model on one rank, and what can be done with it: every method is a step of a story."""

    def __init__(self, subject: Subject, material: Material) -> None:
        import torch.distributed as dist

        there = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        self.making = subject, material.modules, material.options
        self.inputs, self.upstream = material.inputs, material.upstream
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


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether all tensors of ``two`` are the same in ``one``, bit for bit."""
    return all(bitwise_equal(one[name], two[name]) for name in two)


def act(subject: Subject, material: Material, steps: tuple[tuple[Any, ...], ...]) -> list[Any]:
    """Make a model and do one step after another; what those that give something gave."""
    session = Session(subject, material)
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
        self.told: list[tuple[int, Call, tuple[str, ...]]] = []
        """How many ranks did what with a model that a call makes; none where lines did it."""

    def on(self, ranks: int, *steps: tuple[Any, ...], of: Call | None = None) -> list[Any]:
        """Do the steps on so many ranks, with a new model, and give what each rank gives.

        A single thing that is given is not put in a list. ``of`` is a call that makes another model.
        """
        made = of or self.base
        self.told.append((ranks, made, tuple(map(told, steps))))
        self.call = written(self.told)
        load_optimizers()
        with failing_at(self.call):
            gave = on_ranks(self.subject, ranks, act, Material.of(made), steps)
        gave = [[unpacked(thing) for thing in each] for each in gave]
        return [each[0] if len(each) == 1 else each for each in gave]

    def tell(self, *lines: str) -> None:
        """What was done between, as lines, which know ``folder``."""
        self.told.append((0, self.base, lines))

    def loads(self, ranks: int, *steps: tuple[Any, ...], of: Call | None = None) -> list[Any]:
        """The same with a model that is made with other parameters."""
        return self.on(ranks, *steps, of=of or self.other)


OTHER_VALUES = "for p in parameters.values(): p.data = 1.25 * p.data + 0.125"
"""A line after which a model has other parameters: what is loaded must not have been there before."""


# As lines

PROGRAM = """\
import copy, pathlib, tempfile, torch.distributed as dist, torch.multiprocessing as mp
made = tempfile.TemporaryDirectory()
folder = pathlib.Path(made.name)
def started(rank, ranks, act, place):
    if ranks > 1: dist.init_process_group('gloo', f'file://{place}/meet', None, ranks, rank)
    out, own, seen = model(), slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks), []
    def backward(n, last=True, factor=1.0):
        loss = (out.forward(inputs[0][n][own]).float() * upstream[0][n][own]).sum()
        out.backward(loss * factor * ranks, last=last)
ATTEMPT
    exec(act, globals(), locals())
    torch.save(seen, f'{place}/{rank}')
def on(ranks, act):
    place = tempfile.mkdtemp(dir=made.name)
    mp.start_processes(started, (ranks, act, place), ranks, start_method='fork')
    return [torch.load(f'{place}/{rank}') for rank in range(ranks)]
"""
"""What does something on so many ranks, forked, and gives what each of them has seen.

It is long because one group of processes saves a checkpoint, and another one loads it.
"""
ATTEMPT = """\
    def attempt(path):
        try: out.load(path)
        except BaseException as error: return f'{type(error).__name__}: {error}'"""

PARAMETERS = "seen.append({n: p.detach().clone() for n, p in out.full_parameters().items()})"
ACTS = {
    "make": "out = model()",
    "backward": "backward({})",
    "step": "out.step()",
    "train": "backward({}); out.step()",
    "train_clipped": "backward({}); "
    f"hasattr(out, 'clip_gradients') and out.clip_gradients({MAX_NORM}); out.step()",
    "coast": "backward({}, factor=0.0); out.step()",
    "outputs": "seen.append(out.forward(inputs[0][{}][own]).detach().clone())",
    "parameters": PARAMETERS,
    "set_parameters": "out.load_parameters({})",
    "save": "out.save({})",
    "load": "out.load({})",
    "try_load": "attempt({})",
    "attempt": "seen.append(attempt({}))",
    "invalidate": "hasattr(out, 'invalidate') and out.invalidate()",
    "spoil": "ranks > 1 and dist.barrier(); "
    "rank or [p.write_bytes(bytes(9)) for p in (folder / {}).rglob('*') if p.is_file()]; "
    "ranks > 1 and dist.barrier()",
}
"""The steps of a story as Python, on a rank, with their first argument; ``backward`` with all."""


def told(step: tuple[Any, ...]) -> str:
    """A step as Python."""
    name, *arguments = step
    first = ", ".join(map(as_source, arguments if name == "backward" else arguments[:1]))
    return ACTS[name].replace("{}", first) if name in ACTS else f"pass  # {name}"


def as_source(value: Any) -> str:
    """An argument of a step: a number, a place, or other values of the parameters."""
    if isinstance(value, Path):
        parts = value.parts
        root = max(i for i, part in enumerate(parts) if part.startswith("conformance-checkpoints-"))
        return f"str(folder / {'/'.join(parts[root + 1 :])!r})"
    if isinstance(value, Mapping):
        return "{n: (p.detach() + 0.25) * 1.7 for n, p in parameters.items()}"
    return repr(value)


def written(story: list[tuple[int, Call, tuple[str, ...]]]) -> Course:
    """A story as lines: the last of them leaves in ``out`` what the ranks have seen, in turn."""
    first = story[0][1]
    attempted = any("attempt(" in act for _, _, acts in story for act in acts)
    program = PROGRAM.replace("ATTEMPT\n", f"{ATTEMPT}\n" if attempted else "")
    lines: list[str] = program.replace("ROWS", str(ROWS)).splitlines()
    known, model = first.lines, ""
    for number, (ranks, made, acts) in enumerate(story):
        if not ranks:
            lines += acts
            continue
        further = made.lines[: len(known)] == known
        lines += made.lines[len(known) :] if further else made.lines
        known = made.lines
        options = "".join(f", {name}={source}" for name, source in made.options)
        maker = f"model = lambda: flat_shards(copy.deepcopy(modules){options})"
        lines += [maker] if maker != model else []
        model = maker
        act = f"on({ranks}, {'; '.join(acts)!r})"
        if number < len(story) - 1:
            lines.append(f"seen_{number} = {act}" if "seen" in act else act)
    return course(first, *lines, result=act)
