"""Checks of loading compressed models: the weights that are there, and the function they make."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from conformance.harness.compare import assert_close_to, assert_identical
from conformance.harness.compressed_cases import CompressedCall, CompressedCase
from conformance.harness.compressed_files import digests, true_weights
from conformance.harness.compressed_oracle import expected_logits
from conformance.harness.compressed_subject import Loaded, counted, load
from conformance.harness.failures import ConformanceFailure
from conformance.harness.gpt_honesty import global_state, global_state_restored
from conformance.harness.memo import remembered
from conformance.harness.subject import Subject, bitwise_equal
from conformance.harness.tolerance import Expectation

# Function


@remembered
def truth_of(call: CompressedCall, dtype: torch.dtype) -> Expectation:
    """The logits of what the call's lines put into the folder, rounded to ``dtype``."""
    return expected_logits(call.case, true_weights(call, dtype), call.named("ids"), dtype)


def assert_logits(loaded: Loaded, expectation: Expectation, dtype: torch.dtype) -> None:
    """The logits are what the oracle says."""
    call = replace(loaded.call, done=".logits(ids)", dtype=dtype)
    assert_close_to(loaded.logits(), expectation, call, name="logits")


def assert_function(
    subject: Subject,
    case: CompressedCase,
    *edits: str,
    dtype: torch.dtype = torch.float32,
    late: tuple[str, ...] = (),
    **options: str,
) -> None:
    """The logits of the folder are those of the original model with reconstructed experts."""
    call = case.call(*edits, late=late, device=subject.device, **options)
    assert_logits(load(subject, call), truth_of(call, dtype), dtype)


def assert_function_follows(subject: Subject, case: CompressedCase) -> None:
    """Parameters that are changed in place change the model, all of them alike."""
    call = case.call(device=subject.device)
    loaded = load(subject, call)
    loaded.change(lambda name: True)
    weights = loaded.snapshot()
    expected = expected_logits(case, complete(weights, call), call.named("ids"), torch.float32)
    assert_logits(loaded, expected, torch.float32)
    for name, stored in true_weights(call).items():
        if torch.equal(weights[name], stored):
            raise loaded.wrong("no effect", f"{name} was not changed in place")


# Weights


def complete(found: Mapping[str, Tensor], call: CompressedCall) -> dict[str, Tensor]:
    """Parameters; a tied head may be listed under its own name as well."""
    expected, found = true_weights(call), dict(found)
    if call.case.tied:
        found.pop("lm_head.weight", None)
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or extra:
        names = f"lack {sorted(missing)[:3]}" if missing else f"have {sorted(extra)[:3]} too many"
        shown_by = "print(list(out.parameters()))"
        raise ConformanceFailure("wrong names", f"parameters {names}", call=call, shown_by=shown_by)
    return found


def printed(name: str) -> str:
    """The line that shows a weight of the model."""
    return f"print(out.parameters()[{name!r}])"


def assert_same_weights(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    call: CompressedCall,
    what: str,
    shown_by: Callable[[str], str] = printed,
) -> None:
    """The same names, dtypes and bits; says which tensor a wrong one is instead."""
    counted()
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or extra:
        names = f"without {sorted(missing)[:3]}" if missing else f"with {sorted(extra)[:3]}"
        raise ConformanceFailure("wrong names", f"{what} is {names}", call=call)
    for name, right in expected.items():
        wrong = found[name].detach().cpu()
        if bitwise_equal(wrong, right):
            continue
        raise ConformanceFailure(
            "not identical",
            f"{what}: {name} {difference(wrong, right, expected)}",
            call=call,
            shown_by=shown_by(name),
        )


def difference(wrong: Tensor, right: Tensor, all_of: Mapping[str, Tensor]) -> str:
    """In words, what a tensor is instead of the right one."""
    if wrong.dtype != right.dtype:
        return f"is of {wrong.dtype}, expected {right.dtype}"
    for name, other in all_of.items():
        if bitwise_equal(wrong, other):
            return f"is {name}"
    if wrong.shape != right.shape:
        return f"has shape {list(wrong.shape)}, expected {list(right.shape)}"
    if right.ndim >= 2 and right.shape[-1] == right.shape[-2] and torch.equal(wrong.mT, right):
        return "is transposed"
    if right.ndim == 3:
        order = [
            next((o for o in range(len(right)) if torch.equal(wrong[e], right[o])), None)
            for e in range(len(right))
        ]
        if None not in order:
            return f"has its experts in the order {order}"
    places = (wrong != right).nonzero()
    at = tuple(places[0].tolist())
    return (
        f"is wrong in {len(places)} of {right.numel()} elements, the first at {list(at)}: "
        f"{float(wrong[at]):.6g}, expected {float(right[at]):.6g}"
    )


def assert_weights(
    subject: Subject,
    case: CompressedCase,
    *edits: str,
    dtype: torch.dtype | None = None,
    late: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
) -> Loaded:
    """Every weight is there, under its name, with the bits that are stored, cast to ``dtype``."""
    options = {} if dtype is None else {"dtype": str(dtype)}
    call = case.call(*edits, late=late, after=after, device=subject.device, **options)
    loaded = load(subject, call)
    dtype = dtype or call.named("others")["model.norm.weight"].dtype
    found = complete(loaded.parameters(), call)
    assert_same_weights(found, true_weights(call, dtype), call, "the model")
    return loaded


def assert_dtype(subject: Subject, case: CompressedCase, dtype: torch.dtype) -> None:
    """Every weight is in the dtype that is asked for, and the model computes in it."""
    loaded = assert_weights(subject, case, dtype=dtype)
    assert_logits(loaded, truth_of(loaded.call, dtype), dtype)


# Loading leaves everything else alone


def assert_any_seed(subject: Subject, case: CompressedCase) -> None:
    """Two loads under different random seeds give the same model: nothing is left to chance."""
    call, found = case.call(device=subject.device), []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(load(subject, call).logits())
    because = "loaded again under another random seed"
    assert_identical(found[1], found[0], replace(call, done=".logits(ids)"), because=because)


def assert_folder_unchanged(subject: Subject, case: CompressedCase) -> None:
    """Loading, computing with and changing a model leaves its folder as it was."""
    call = case.call(device=subject.device)
    folder = call.named("folder").name
    before = digests(folder)
    loaded = load(subject, call)
    loaded.logits()
    loaded.change(lambda name: True)
    counted()
    if digests(folder) != before:
        raise loaded.wrong("changed input", "the folder is not what it was before it was loaded")


def assert_later_folder_ignored(subject: Subject, case: CompressedCase) -> None:
    """A model is its own: files that are replaced or removed later do not change it."""
    call = case.call(device=subject.device)
    source = Path(call.named("source"))
    loaded = load(subject, call)
    before = loaded.logits()
    aside = source.with_name("aside")
    shutil.copytree(source, aside)
    try:
        for path in source.rglob("*"):
            if path.is_file():
                path.write_bytes(bytes(path.stat().st_size))
        shutil.rmtree(source)
        after = loaded.logits()
    finally:
        aside.rename(source)
    because = "the folder was overwritten after it was loaded"
    assert_identical(after, before, replace(call, done=".logits(ids)"), because=because)


def assert_folder_read_anew(subject: Subject, case: CompressedCase) -> None:
    """A path that holds another checkpoint by now gives the other model."""
    call = case.call(device=subject.device)
    load(subject, call).logits()
    other = replace(case, seed=case.seed + 1).call(device=subject.device)
    source, aside = Path(call.named("source")), Path(call.named("source")).with_name("aside")
    source.rename(aside)
    try:
        shutil.copytree(other.named("source"), source)
        (_,), options = call.values()
        found = Loaded(subject(str(source), **options), other)
        assert_same_weights(
            complete(found.snapshot(), other), true_weights(other), other, "another folder's model"
        )
    finally:
        shutil.rmtree(source)
        aside.rename(source)


def assert_global_state(subject: Subject, case: CompressedCase) -> None:
    """Loading leaves torch and Python as they were."""
    call = case.call(device=subject.device)
    load(subject, call)  # what is imported at first is not of this load
    before = global_state()
    with global_state_restored(before):
        load(subject, call).logits()
        counted()
        after = global_state()
        changed = [name for name in before if after[name] != before[name]]
    if changed:
        raise ConformanceFailure(
            "changed state", f"loading changed {changed[0]} for the whole process", call=call
        )


def assert_loads_twice(subject: Subject, case: CompressedCase) -> None:
    """Two models of one folder share nothing: changing one leaves the other as it was."""
    call = case.call(device=subject.device)
    one, other = load(subject, call), load(subject, call)
    before = other.logits()
    one.change(lambda name: True)
    because = "another model of the same folder was changed"
    done = replace(call, done=".logits(ids)")
    assert_identical(other.logits(), before, done, because=because)
