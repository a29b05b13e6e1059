"""An implementation's loader of Qwen2 weights, called once for each rank so that nothing goes unseen.

A loader communicates nothing: the parts of all ranks are loaded one after the other in this process.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from conformance.harness.calls import dtype_name
from conformance.harness.failures import ConformanceFailure, failing_at
from conformance.harness.file_calls import FileCall
from conformance.harness.gpt_subject import uninitialised_memory_is_nan
from conformance.harness.qwen2_cases import QwenCase, qwen_cases
from conformance.harness.subject import Subject

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class LoaderCall(FileCall):
    """A call for one rank, which no other rank has to join."""

    @property
    def preamble(self) -> tuple[str, ...]:
        """Nothing: a rank loads alone."""
        return ()

    def of_rank(self, rank: int, ranks: int | None = None) -> LoaderCall:
        """The same directory for a rank of the case's ranks, or of other ones."""
        number = self.case.ranks if ranks is None else ranks
        given = {} if (rank, number) == (0, 1) else {"rank": str(rank), "ranks": str(number)}
        return replace(self, options=tuple({**given, **dict(self.options)}.items()))

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """What was asked for, or what ``config.json`` says under its new or its old key."""
        asked = dict(self.options).get("dtype")
        if asked is not None:
            return eval(asked, {"torch": torch})
        config = self.named("config")
        return getattr(torch, config.get("dtype") or config["torch_dtype"])

    @property
    def tied(self) -> bool:
        """Whether the configuration makes the embedding the head."""
        return bool(self.named("config").get("tie_word_embeddings", False))


def loader_call(
    case: QwenCase,
    *edits: str,
    saved: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
    device: str = "cpu",
    **options: str,
) -> LoaderCall:
    """The call that loads the case's directory; arguments as in :meth:`QwenCase.call`."""
    call = case.call("weight_loader", *edits, saved=saved, config=config, device=device, **options)
    given = {field.name: getattr(call, field.name) for field in fields(call)}
    lines = tuple(line for line in call.lines if not line.startswith("ids = "))
    return LoaderCall(**given | {"lines": lines})


def loader_cases(**fixed: Any) -> SearchStrategy[QwenCase]:
    """Directories of one or two layers, of any shape, for any ranks that fit."""
    small = {"layers": st.sampled_from([2, 1]), "batch": 2, "tokens": 9, "theta": 1e6}
    return qwen_cases(**({"theta_at": "rope_parameters"} | small | fixed))


def load(weight_loader: Subject, call: LoaderCall) -> dict[str, Tensor]:
    """What a rank holds: finite tensors on the device, in the dtype that was asked for, by name."""
    arguments, options = call.values()
    with failing_at(call), warnings.catch_warnings(), uninitialised_memory_is_nan():
        warnings.simplefilter("ignore")  # a loader may say that it uses a head in spite of a tie
        loaded = weight_loader(*arguments, **options)
    if not isinstance(loaded, Mapping):
        summary = f"weight_loader gives {type(loaded).__name__}, not a mapping of tensors"
        raise ConformanceFailure("wrong type", summary, call=call)
    return {name: checked(name, tensor, call) for name, tensor in loaded.items()}


def checked(name: object, tensor: object, call: LoaderCall) -> Tensor:
    """A tensor that was loaded; fails for another type, dtype or device, and for NaN."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        summary = f"under {name!r} there is {type(tensor).__name__}, not a tensor"
        raise ConformanceFailure("wrong type", summary, call=call)
    expected, device = call.dtype_of_weights, torch.device(eval_device(call))
    shown = f"print(out[{name!r}])"
    if tensor.dtype != expected:
        summary = f"{name} has dtype {dtype_name(tensor.dtype)}, expected {dtype_name(expected)}"
        raise ConformanceFailure("wrong dtype", summary, call=call, shown_by=shown)
    if tensor.device.type != device.type:
        summary = f"{name} is on {tensor.device.type}, expected {device.type}"
        raise ConformanceFailure("wrong device", summary, call=call, shown_by=shown)
    finite = torch.isfinite(tensor.detach())
    if not bool(finite.all()):
        at = (~finite).nonzero()[0].tolist()
        summary = f"{name}{at} is {float(tensor[tuple(at)])}, in {int((~finite).sum())} places"
        summary += ": memory that nothing was loaded into is NaN here"
        raise ConformanceFailure("non-finite", summary, call=call, shown_by=shown)
    return tensor.detach()


def eval_device(call: LoaderCall) -> str:
    """The device that the call asks for."""
    return eval(dict(call.options).get("device", "'cpu'"))


def load_all(weight_loader: Subject, call: LoaderCall) -> list[dict[str, Tensor]]:
    """What each rank holds, in rank order, on the CPU."""
    ranks = range(call.case.ranks)
    return [
        {name: tensor.cpu() for name, tensor in load(weight_loader, call.of_rank(rank)).items()}
        for rank in ranks
    ]
