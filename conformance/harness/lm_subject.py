"""A language model of the implementation, run on every rank of a group by a small program.

A program is a tuple of :class:`Step`: forward passes, looks into caches, generation. It is written in
source text over the names that the lines of a call define, so that a failure prints the very program
that ran. One call of :func:`run` loads the model and runs the whole program on every rank.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conformance.harness.communication import collectives
from conformance.harness.compare import assert_identical, assert_tensor
from conformance.harness.failures import ConformanceFailure, Declined, failing_at
from conformance.harness.file_calls import FileCall
from conformance.harness.gpt_subject import decline_unless_taken, uninitialised_memory_is_nan
from conformance.harness.qwen2_cases import QwenCase
from conformance.harness.rank_pool import on_ranks
from conformance.harness.subject import Subject, bitwise_equal, changes_caught, errors_named

# Programs


@dataclass(frozen=True)
class Step:
    """One thing to do with a model; what it gives has a name."""

    name: str
    method: str
    ids: str = "ids"
    cache: str | None = None
    """The name of an earlier forward pass, whose cache is gone on from or looked into."""
    options: tuple[tuple[str, str], ...] = ()
    counted: bool = False
    """Whether collectives are counted."""

    def source(self) -> str:
        """The step as source text, for a model ``m``."""
        if self.method == "cached":
            return f"m.cached({self.cache}[1])"
        cache = () if self.cache is None else (f"cache={self.cache}[1]",)
        options = (f"{name}={source}" for name, source in self.options)
        return f"m.{self.method}({', '.join((self.ids, *cache, *options))})"

    def ready(self, namespace: dict[str, Any]) -> Ready:
        """The step with values for its source text."""
        options = {name: eval(source, namespace) for name, source in self.options}
        ids = None if self.method == "cached" else eval(self.ids, namespace)
        return Ready(self.name, self.method, ids, self.cache, options, self.counted)


@dataclass(frozen=True)
class Ready:
    """A step whose arguments have been evaluated, to be sent to the ranks."""

    name: str
    method: str
    ids: Tensor | None
    cache: str | None
    options: dict[str, Any]
    counted: bool


def forward(
    ids: str = "ids",
    *,
    name: str = "a",
    cache: str | None = None,
    counted: bool = False,
    **options: str,
) -> Step:
    """A forward pass; options are source text."""
    return Step(name, "forward", ids, cache, tuple(options.items()), counted)


def generate(ids: str = "ids", *, name: str = "a", **options: str) -> Step:
    """Generation; options are source text."""
    return Step(name, "generate", ids, None, tuple(options.items()))


def cached(cache: str, *, name: str = "kv") -> Step:
    """Keys and values of every layer in the cache of a forward pass."""
    return Step(name, "cached", "", cache)


def written(tensor: Tensor) -> str:
    """A tensor as source text."""
    return f"torch.tensor({tensor.tolist()})"


# On the ranks


@dataclass
class Ran:
    """What a program did on one rank, by the names of its steps."""

    outputs: dict[str, Any] = field(default_factory=dict)
    """Logits, tokens, or the keys and values of each layer; the name of the type of anything else."""
    later: dict[str, Any] = field(default_factory=dict)
    """The steps whose output is no longer what it was when it was given."""
    collectives: dict[str, Counter[str]] = field(default_factory=dict)


def run_program(
    subject: Subject, directory: str, options: dict[str, Any], steps: Sequence[Ready], seed: int
) -> Ran:
    """Load the model of ``directory`` on this rank, and take the steps.

    Every rank has random numbers of its own, which go by ``seed``.
    """
    ran, caches, given = Ran(), {}, {}
    with own_random_numbers(seed):
        model = load(subject, directory, options)
        for step in steps:
            output = take_step(model, step, caches, ran)
            given[step.name] = output
            ran.outputs[step.name] = copied(output)
    ran.later = {
        name: copied(output)
        for name, output in given.items()
        if isinstance(output, Tensor) and not bitwise_equal(output, ran.outputs[name])
    }
    return ran


def run_refused(
    subject: Subject, directory: str, options: dict[str, Any], steps: Sequence[Ready], seed: int
) -> Refusal | None:
    """How this rank refuses the model or a step; None where it takes everything."""
    step = None
    with own_random_numbers(seed):
        try:
            model, ran, caches = load(subject, directory, options), Ran(), {}
            for step in steps:
                take_step(model, step, caches, ran)
        except ConformanceFailure as failure:
            error = failure.__cause__
            if not failure.kind.startswith("raised") or error is None:
                raise
            return Refusal(step and step.name, type(error).__name__, str(error))
    return None


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Random numbers of this rank; those of the process go on as they would have."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + rank)
        yield


def load(subject: Subject, directory: str, options: dict[str, Any]) -> Any:
    """The model of a directory."""
    if subject.device != "cpu":
        options = {"device": subject.device, **options}
    with uninitialised_memory_is_nan(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a loader may say which head it takes
        model = subject(directory, **options)
    if not callable(getattr(model, "forward", None)):
        found = type(model).__name__
        summary = f"causal_lm(...) is a {found} without a method forward"
        raise ConformanceFailure("wrong type", summary)
    return model


@dataclass(frozen=True)
class Refusal:
    """An exception of the implementation."""

    step: str | None
    """In which step; None while the model was loaded."""
    type: str
    message: str


def take_step(model: Any, step: Ready, caches: dict[str, Any], ran: Ran) -> Any:
    """Logits, tokens, or keys and values; the cache of a forward pass is put down."""
    method = getattr(model, step.method, None)
    if not callable(method):
        raise Declined(f"the model has no method {step.method}")
    decline_unless_taken(method, step.options)
    options = dict(step.options)
    if step.method == "cached":
        with errors_named("cached()"):
            return method(caches[step.cache])
    if step.cache is not None:
        options["cache"] = caches[step.cache]
    watched = changes_caught([step.ids, *step.options.values()])
    with watched, errors_named(f"{step.method}()"), torch.no_grad():
        if not step.counted:
            output = method(step.ids, **options)
        else:
            with collectives() as counts:
                output = method(step.ids, **options)
            ran.collectives[step.name] = counts
    if step.method != "forward":
        return output
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        found = type(output).__name__
        raise ConformanceFailure("wrong type", f"forward() gives {found}, not logits and a cache")
    logits, caches[step.name] = output
    return logits


def copied(output: Any) -> Any:
    """A copy that can travel; the name of the type of what is neither tensor nor list of them."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    if isinstance(output, (list, tuple)):
        return [copied(each) for each in output]
    return type(output).__name__


# In the test


@dataclass(frozen=True)
class LMCall(FileCall):
    """A call whose result runs a program."""

    steps: tuple[Step, ...] = ()

    def source(self) -> str:
        """The call and the program; with several steps a function of the model ``m``."""
        model = FileCall.source(replace(self, done=""))
        if not self.steps:
            return model
        *earlier, last = self.steps
        result = last.source() + ("[0]" if last.method == "forward" else "")
        if not earlier:
            return model + result.removeprefix("m")
        made = "".join(f"{step.name} := {step.source()}, " for step in earlier)
        return f"(lambda m: ({made}{result})[-1])({model})"


def lm_call(
    case: QwenCase,
    *edits: str,
    dtype: torch.dtype | None = None,
    saved: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
) -> LMCall:
    """The call of a case; ``edits``, ``saved`` and ``config`` as in :meth:`QwenCase.call`.

    Without ``dtype`` none is asked for, and the model has that of ``config.json``.
    """
    asked = {} if dtype is None else {"dtype": str(dtype)}
    plain = case.call("causal_lm", *edits, saved=saved, config=config, **asked)
    fields = {name: getattr(plain, name) for name in ("contract", "lines", "arguments", "options")}
    computed = dtype or getattr(torch, (config or {}).get("dtype") or case.stored)
    return LMCall(**fields, case=case, dtype=computed)


@dataclass(frozen=True)
class Done:
    """What a program did on every rank."""

    call: LMCall
    steps: tuple[Step, ...]
    ran: list[Ran]

    def __getitem__(self, name: str) -> Tensor:
        """What the step gave on the first rank; it is the same on all."""
        return self.ran[0].outputs[name]

    def at(self, name: str) -> LMCall:
        """The call with the program up to a step."""
        names = [step.name for step in self.steps]
        return replace(self.call, steps=self.steps[: names.index(name) + 1])


def run(causal_lm: Subject, call: LMCall, *steps: Step, seed: int = 0, alike: bool = True) -> Done:
    """What the steps give on each rank; logits and tokens are of the right type and shape.

    They are the same on every rank, bit for bit, unless ``alike`` is False.
    """
    done = Done(call, steps, on_every_rank(causal_lm, call, steps, run_program, seed))
    for rank, each in enumerate(done.ran):
        for step in steps:
            at, output = done.at(step.name), each.outputs[step.name]
            check_output(output, step, at, rank)
            if rank and alike and step.method != "cached":
                because = f"rank {rank} has another result than rank 0"
                assert_identical(output, done[step.name], at, because=because)
    return done


def refusals(causal_lm: Subject, call: LMCall, *steps: Step) -> list[Refusal | None]:
    """How each rank refuses the model or a step; None where it takes everything."""
    return on_every_rank(causal_lm, call, steps, run_refused, 0)


def on_every_rank(
    causal_lm: Subject, call: LMCall, steps: tuple[Step, ...], function: Any, seed: int
) -> list[Any]:
    """What ``function`` gives on each rank for the directory of the call and the steps."""
    (directory,), options = call.values()
    ready = [step.ready(call.namespace()) for step in steps]
    with failing_at(replace(call, steps=steps)):
        return on_ranks(causal_lm, call.case.ranks, function, directory, options, ready, seed)


def check_output(output: Any, step: Step, call: LMCall, rank: int) -> None:
    """Logits [batch, tokens, vocab] in the model's dtype; tokens int64 behind the prompts."""
    case, namespace = call.case, call.namespace()
    cpu = torch.device("cpu")
    name = f"of rank {rank}" if case.ranks > 1 else ""
    if step.method == "forward":
        batch, tokens = eval(step.ids, namespace).shape
        shape = (batch, tokens, case.vocab)
        assert_tensor(output, shape, call.dtype, cpu, call=call, name=f"logits {name}".strip())
    if step.method == "generate":
        ids = eval(step.ids, namespace)
        most = eval(dict(step.options)["max_new_tokens"], namespace)
        fits = isinstance(output, Tensor) and output.ndim == 2
        added = output.shape[1] - ids.shape[1] if fits else 0
        expected = (len(ids), ids.shape[1] + min(max(added, 0), most))
        what = f"tokens {name}".strip()
        assert_tensor(output, expected, torch.int64, cpu, call=call, name=what)
        prompts = output[:, : ids.shape[1]]
        assert_identical(prompts, ids, call, because=f"{what} do not begin with the prompts")
