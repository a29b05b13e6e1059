"""Checks of what a compressed model exports: an ordinary checkpoint, read by transformers too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from conformance.harness.compare import assert_close_to
from conformance.harness.compressed_cases import CompressedCase
from conformance.harness.compressed_checks import assert_same_weights, truth_of
from conformance.harness.compressed_files import (
    experts_of,
    exported_name,
    files_in,
    read_exported,
)
from conformance.harness.compressed_oracle import expected_logits, logits_of_transformers
from conformance.harness.compressed_saved import FILES, is_factor, loaded_from, own, place
from conformance.harness.compressed_subject import Loaded, counted
from conformance.harness.core_cases import PROJECTIONS
from conformance.harness.subject import Subject
from conformance.harness.tolerance import Expectation, expect

READ = (
    "places = [p for p in os.scandir(folder.name + '/saved') if p.name.endswith('.safetensors')]",
    "found = {n: t for p in places for n, t in safetensors.torch.load_file(p.path).items()}",
)
"""Lines that read all tensors of an export."""
NAMES = (*READ, "print(sorted(found))")


def printing(name: str) -> tuple[str, ...]:
    """Lines that show one of them."""
    return (*READ, f"print(found[{name!r}])")


def showing(loaded: Loaded) -> Callable[[str], str]:
    """What gives the lines that show a tensor of what a model has exported."""
    return lambda name: loaded.shown(*printing(name))


def exported(loaded: Loaded, target: Path) -> dict[str, Tensor]:
    """The tensors of an export."""
    loaded.export(str(target))
    try:
        return read_exported(target)
    except Exception as error:
        summary = f"what was exported cannot be read: {type(error).__name__}: {error}"
        raise loaded.wrong("unreadable", summary, FILES) from error


def assert_exported_names(subject: Subject, case: CompressedCase) -> None:
    """The names in the files are exactly the original's, and nothing of the compression is left."""
    loaded = loaded_from(subject, case)
    with place() as target:
        found = set(exported(loaded, target))
        files = files_in(target)
    counted()
    expected = set(case.other_shapes()) | {
        exported_name(case, layer, expert, projection)
        for layer in case.expert_layers
        for expert in range(case.experts)
        for projection in PROJECTIONS
    }
    if case.tied:
        found.discard("lm_head.weight")
    for name in sorted(expected ^ found):
        what = "is missing" if name in expected else "is not of the original"
        raise loaded.wrong("wrong names", f"{name} {what}", *NAMES)
    for name in ("compression_config.json", "compressed_metadata.json"):
        if name in files:
            summary = f"an export with {name} passes for a compressed folder"
            raise loaded.wrong("stale file", summary, FILES)


def reconstruction(value: Tensor, dtype: torch.dtype) -> Expectation:
    """A weight that was reconstructed: computed in float32 at least, and rounded once to its dtype.

    The noise of an element of (I + U Vᵀ) C (I + U Vᵀ) is taken as the root mean square of the weight.
    """
    noise = value.square().mean().sqrt() + value.abs()
    if dtype == torch.float32:
        return expect(value, [], noise, dtype)
    return expect(value, [value.to(dtype)], torch.zeros_like(value), dtype)


def assert_exported_experts(
    subject: Subject, case: CompressedCase, *, change: bool = False
) -> None:
    """Every expert is written as what its factors make, each under its own name, in one dtype."""
    loaded = loaded_from(subject, case)
    if change:
        loaded.change(lambda name: True)
    weights = own(loaded)
    dtype = weights["model.norm.weight"].dtype
    with place() as target:
        found = exported(loaded, target)
    for name, value in experts_of(weights, case).items():
        if name not in found:
            raise loaded.wrong("wrong names", f"{name} is missing", *NAMES)
        if found[name].dtype != dtype or found[name].shape != value.shape:
            what = f"{found[name].dtype} {list(found[name].shape)}"
            summary = f"{name} is {what}, expected {dtype} {list(value.shape)}"
            raise loaded.wrong("wrong dtype or shape", summary, *printing(name))
        call = replace(loaded.call, dtype=dtype)
        assert_close_to(found[name], reconstruction(value, dtype), call, name=name)


def assert_exported_others(subject: Subject, case: CompressedCase) -> None:
    """Every weight that is not of an expert is exported bit for bit, as it is now."""
    loaded = loaded_from(subject, case)
    loaded.change(lambda name: not is_factor(name))
    expected = {name: each for name, each in own(loaded).items() if not is_factor(name)}
    with place() as target:
        found = exported(loaded, target)
    found = {name: found[name] for name in expected if name in found}
    assert_same_weights(found, expected, loaded.call, "the export", showing(loaded))


def assert_exported_function(subject: Subject, case: CompressedCase, *, change: bool) -> None:
    """transformers loads the export without a missing or unknown weight; its logits are the model's."""
    loaded = loaded_from(subject, case)
    expectation = truth_of(loaded.call, torch.float32)
    ids = loaded.call.named("ids")
    if change:
        loaded.change(lambda name: True)
        expectation = expected_logits(case, own(loaded), ids, torch.float32)
    with place() as target:
        loaded.export(str(target))
        try:
            logits, problems = logits_of_transformers(target, ids)
        except Exception as error:
            summary = f"transformers cannot load it: {type(error).__name__}: {str(error)[:200]}"
            raise loaded.wrong("unreadable", summary, FILES) from error
    counted()
    for kind, names in problems.items():
        if names:
            raise loaded.wrong("wrong names", f"transformers finds {kind}: {names[0]}", *NAMES)
    assert_close_to(logits, expectation, loaded.call, name="logits of the export")


def assert_export_over_older(subject: Subject, case: CompressedCase) -> None:
    """An export over an older one with more layers is the new one alone."""
    old = loaded_from(subject, replace(case, layers=case.layers + 1, dense=()))
    loaded = loaded_from(subject, case)
    with place() as target:
        old.export(str(target))
        found = exported(loaded, target)
        names = {name for name in files_in(target) if name.endswith(".safetensors")}
        index = target / "model.safetensors.index.json"
        used = {"model.safetensors"}
        if index.exists():
            used = set(json.loads(index.read_text())["weight_map"].values())
    counted()
    for name in sorted(names - used):
        raise loaded.wrong("stale file", f"{name} is of the export before", FILES)
    beyond = [n for n in found if n.startswith(f"model.layers.{case.layers}.")]
    if beyond:
        raise loaded.wrong("stale file", f"{beyond[0]} is of the export before", FILES)
    expected = {n: t for n, t in own(loaded).items() if not is_factor(n)}
    found = {n: found[n] for n in expected if n in found}
    assert_same_weights(found, expected, loaded.call, "the later export", showing(loaded))
