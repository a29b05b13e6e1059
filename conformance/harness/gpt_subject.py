"""An implementation's checkpoint reader and its model, called so that nothing goes unseen."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import course
from conformance.harness.compare import assert_tensor
from conformance.harness.failures import ConformanceFailure, Declined, failing_at
from conformance.harness.gpt_cases import GPTCall
from conformance.harness.subject import Subject, changes_caught, errors_named

FACTS = (
    "checkpoint_format",
    "vocab_size",
    "padded_vocab_size",
    "model_dim",
    "num_layers",
    "num_heads",
    "head_dim",
    "scalars_size",
    "scalars_padding",
)

MOST_EARLIER = 5
"""How many calls of a model a failure tells beside the last."""


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """``torch.empty`` gives NaN in here, so that a weight that nothing was loaded into shows."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # what torch.utils.deterministic goes by
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def has_methods(thing: object, names: tuple[str, ...], what: str, call: GPTCall) -> None:
    """Fail unless ``thing`` has these methods."""
    for name in names:
        if not callable(getattr(thing, name, None)):
            summary = f"{what} is a {type(thing).__name__} without a method {name}"
            raise ConformanceFailure("wrong type", summary, call=call)


def open_reader(gpt_checkpoint: Subject, call: GPTCall) -> Any:
    """The reader of the call's checkpoint."""
    (source,), options = call.values()
    with failing_at(replace(call, done="")):
        reader = gpt_checkpoint(source, **options)
    has_methods(reader, ("inspect", "load"), "gpt_checkpoint(...)", replace(call, done=""))
    return reader


def inspected(gpt_checkpoint: Subject, call: GPTCall) -> Mapping[str, Any]:
    """What ``inspect()`` says."""
    call = replace(call, done=".inspect()")
    reader = open_reader(gpt_checkpoint, call)
    with failing_at(call), errors_named("inspect()"), uninitialised_memory_is_nan():
        facts = reader.inspect()
    if not isinstance(facts, Mapping):
        found = type(facts).__name__
        raise ConformanceFailure("wrong type", f"inspect() gives {found}, not a mapping", call=call)
    return facts


def load(gpt_checkpoint: Subject, call: GPTCall) -> Loaded:
    """The model of the call's checkpoint."""
    call = replace(call, done=".load()")
    with uninitialised_memory_is_nan(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a loader may say that padding is not as it is written
        reader = open_reader(gpt_checkpoint, call)
        with failing_at(call), errors_named("load()"):
            model = reader.load()
    has_methods(model, ("features", "logits"), "load()", call)
    return Loaded(model, call)


class Loaded:
    """A model of the implementation."""

    def __init__(self, model: Any, call: GPTCall) -> None:
        self.model = model
        self.call = call
        self.last = call
        """The latest call of ``features`` or ``logits``, as it was made."""
        self.course: list[str] = []
        """All of them, as source text after the model."""

    def features(self, ids: Tensor | None = None, **masks: Any) -> Tensor:
        """Features [batch, tokens, model_dim] of the call's ids, or of others."""
        return self._run("features", ids, masks)

    def logits(self, ids: Tensor | None = None, **masks: Any) -> Tensor:
        """Logits [batch, tokens, rows of the head] of the call's ids, or of others."""
        return self._run("logits", ids, masks)

    def state(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint; declined by a model that does not give them."""
        call = replace(self.call, done=".load().state()")
        with failing_at(call), errors_named("state()"):
            state = self._offered("state")()
        if not isinstance(state, Mapping):
            found = type(state).__name__
            raise ConformanceFailure(
                "wrong type", f"state() gives {found}, not a mapping", call=call
            )
        return dict(state)

    def save(self, path: str) -> None:
        """Write the checkpoint; declined by a model that does not."""
        call = replace(self.call, done=f".load().save({path!r})")
        with failing_at(call), errors_named("save()"):
            self._offered("save")(path)

    @contextmanager
    def course_shown(self) -> Iterator[None]:
        """A failure in here is shown after the other calls of this model, which may be its cause."""
        try:
            yield
        except ConformanceFailure as failure:
            *earlier, last = dict.fromkeys(self.course)
            if failure.call in (self.last, self.call) and earlier:
                made = f"model = {replace(self.call, done='.load()').source()}"
                calls = (f"model{each}" for each in earlier[-MOST_EARLIER:])
                failure.call = course(self.call, made, *calls, result=f"model{last}")
            raise

    def _offered(self, name: str) -> Callable[..., Any]:
        method = getattr(self.model, name, None)
        if not callable(method):
            raise Declined(f"the model has no method {name}")
        return method

    def _run(self, name: str, ids: Tensor | None, masks: Mapping[str, Any]) -> Tensor:
        call = self.call
        ids = call.named("ids") if ids is None else ids
        written = "".join(f", {option}={_written(value)}" for option, value in masks.items())
        self.last = call = replace(call, done=f".load().{name}({_written(ids, call)}{written})")
        self.course.append(call.done.removeprefix(".load()"))
        method = getattr(self.model, name)
        decline_unless_taken(method, masks)
        watched = changes_caught([ids, *masks.values()])
        with failing_at(call), errors_named(f"{name}()"), torch.no_grad(), watched:
            output = method(ids, **masks)
        config = call.case.config()
        width = config.model_dim if name == "features" else config.padded_vocab_size
        shape = (*ids.shape, width)
        dtype = call.dtype
        if name == "logits":
            dtype = torch.promote_types(dtype, torch.float32)
        assert_tensor(output, shape, dtype, ids.device, call=call, name=name)
        return output


def _written(value: Any, call: GPTCall | None = None) -> str:
    """A value as source text; the ids of the call under their name."""
    if not isinstance(value, Tensor):
        return repr(value)
    if call is not None and value is call.named("ids"):
        return "ids"
    return f"torch.tensor({value.tolist()})"


def decline_unless_taken(method: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Decline when a method does not take an option."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return
    names = {p.name for p in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    for name in options:
        if name not in names:
            raise Declined(f"{method.__name__} does not take {name!r}")
