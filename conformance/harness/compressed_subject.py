"""A compressed model of the implementation, asked so that nothing goes unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.compressed_cases import VOCAB, CompressedCall
from conformance.harness.failures import ConformanceFailure, Declined, failing_at
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, changes_caught, errors_named


def load(compressed_checkpoint: Subject, call: CompressedCall) -> Loaded:
    """The model of the call's folder."""
    (source,), options = call.values()
    with failing_at(call):
        model = compressed_checkpoint(source, **options)
    for name in ("logits", "parameters"):
        if not callable(getattr(model, name, None)):
            summary = f"gives a {type(model).__name__} without a method {name}"
            raise ConformanceFailure("wrong type", summary, call=call)
    return Loaded(model, call)


class Loaded:
    """A model of the implementation."""

    def __init__(self, model: Any, call: CompressedCall) -> None:
        self.model = model
        self.call = call
        self.done: list[str] = []
        """What was done with the model ``out`` since, as lines."""

    def logits(self) -> Tensor:
        """Logits of the call's ids, of the right shape."""
        ids = self.call.named("ids")
        call = replace(self.call, done=".logits(ids)")
        with failing_at(call), errors_named("logits"), changes_caught([ids]):
            found = self.model.logits(ids)
        shape = (*ids.shape, VOCAB)
        if not isinstance(found, Tensor) or found.shape != shape:
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConformanceFailure("wrong shape", f"logits are {what}, not {shape}", call=call)
        return found.detach()

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, itself."""
        call = replace(self.call, done=".parameters()")
        with failing_at(call), errors_named("parameters"):
            found = self.model.parameters()
            if not isinstance(found, Mapping):
                summary = f"parameters() gives a {type(found).__name__}, expected a mapping"
                raise ConformanceFailure("wrong type", summary, call=call)
            return dict(found)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all parameters."""
        return {name: each.detach().cpu().clone() for name, each in self.parameters().items()}

    def save(self, directory: str, format: str) -> None:
        """Save; declined by a model that cannot."""
        with self._doing(saved_as(format)), errors_named("save"):
            self._offered("save")(directory, format=format)

    def export(self, directory: str) -> None:
        """Export; declined by a model that cannot."""
        with self._doing("out.export(folder.name + '/saved')"), errors_named("export"):
            self._offered("export")(directory)

    @contextmanager
    def _doing(self, line: str) -> Iterator[None]:
        """What is done now as a line: it is the last one of a failure that is raised meanwhile."""
        self.done.append(line)
        try:
            with failing_at(self.call):
                yield
        except ConformanceFailure as failure:
            failure.shown_by = self.shown()
            raise

    def _offered(self, name: str) -> Callable[..., Any]:
        method = getattr(self.model, name, None)
        if not callable(method):
            raise Declined(f"has no method {name}")
        return method

    def change(self, pick: Callable[[str], bool]) -> None:
        """Change the parameters with such names in place, each element otherwise.

        The lines of a failure change all of them alike.
        """
        generator = torch.Generator().manual_seed(self.call.case.seed + 1)
        with torch.no_grad():
            for name, each in self.parameters().items():
                if pick(name):
                    random = torch.randn(each.shape, generator=generator)
                    each.mul_((1 + 0.2 * random).to(each))
        self.done.append("for p in out.parameters().values(): p.data.mul_(1.25)")

    def shown(self, *looks: str) -> str:
        """Lines that do what was done with the model, and look at what came of it."""
        return "\n".join((*self.done, *looks))

    def wrong(self, kind: str, summary: str, *looks: str) -> ConformanceFailure:
        """A failure of this model, which these lines see."""
        looks = looks or ("print(out)",)
        return ConformanceFailure(kind, summary, call=self.call, shown_by=self.shown(*looks))


def saved_as(format: str) -> str:
    """The line that saves the model."""
    return f"out.save(folder.name + '/saved', format={format!r})"


def counted() -> None:
    """Count one comparison of the exact lane."""
    current_tally().comparisons["exact"] += 1
