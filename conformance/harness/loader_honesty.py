"""Checks that what a loader gives is its own: no chance, no cache, no shared memory, no side effect."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from conformance.harness.compare import assert_identical
from conformance.harness.failures import ConformanceFailure
from conformance.harness.gpt_honesty import contents, global_state, global_state_restored
from conformance.harness.loader_checks import assert_loaded, counted, understood_or_refused
from conformance.harness.loader_subject import (
    HEAD,
    LoaderCall,
    load,
    load_all,
    loader_call,
)
from conformance.harness.qwen2_cases import QwenCase
from conformance.harness.subject import Subject


@contextmanager
def explained(what: str, *, first: str = "", shown_by: str | None = None) -> Iterator[None]:
    """A failure in here says what was done besides the call.

    ``first`` is Python that does it, ``shown_by`` what then shows the fault.
    """
    try:
        yield
    except ConformanceFailure as failure:
        failure.details += (what,)
        failure.shown_by = first + (shown_by or failure.shown_by)
        raise


def drawn_rank(case: QwenCase) -> int:
    """One of the case's ranks, by its seed."""
    return case.seed % case.ranks


def assert_same_tensors(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], call: LoaderCall, because: str
) -> None:
    """The same names and bits."""
    if set(actual) != set(expected):
        names = ", ".join(sorted(set(actual) ^ set(expected))[:3])
        raise ConformanceFailure("wrong names", f"{because}: {names} came or went", call=call)
    for name, tensor in expected.items():
        with explained(because, shown_by=f"print(out[{name!r}])"):
            assert_identical(actual[name], tensor, call, because=name)


def assert_any_seed(weight_loader: Subject, case: QwenCase) -> None:
    """Loading again under another random seed gives the same bits."""
    call = loader_call(case, device=weight_loader.device).of_rank(drawn_rank(case))
    loads = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            loads.append(load(weight_loader, call))
    assert_same_tensors(loads[1], loads[0], call, "loaded again under another seed")


def assert_filled(weight_loader: Subject, case: QwenCase) -> None:
    """No element is left as the memory came: it is NaN where ``torch.empty`` gives NaN."""
    call = loader_call(case, device=weight_loader.device)
    for parts in load_all(weight_loader, call):  # NaN has failed by now
        counted()
        if not parts:
            raise ConformanceFailure("wrong names", "nothing is loaded", call=call.of_rank(0))


def assert_rank_alone(weight_loader: Subject, case: QwenCase) -> None:
    """Ranks are loaded from the last to the first, with the whole model in between."""
    call = loader_call(case, device=weight_loader.device)
    ranks, loaded = case.ranks, {}
    for rank in reversed(range(ranks)):
        loaded[rank] = {
            name: t.cpu() for name, t in load(weight_loader, call.of_rank(rank)).items()
        }
        load(weight_loader, call.of_rank(0, 1))
    with explained("ranks were loaded from the last to the first, and as one in between"):
        assert_loaded([loaded[rank] for rank in range(ranks)], call)


EQUAL_NORMS = (
    "state = {k: state['model.norm.weight'].clone() if 'norm' in k else t"
    " for k, t in state.items()}"
)
"""Tensors that are equal, as those of an untrained model are, and all the same not one."""


def assert_own_memory(weight_loader: Subject, case: QwenCase) -> None:
    """Writing into each tensor changes no other one, of this or an earlier call, nor a later load."""
    call = loader_call(case, EQUAL_NORMS, device=weight_loader.device).of_rank(drawn_rank(case))
    kept = load(weight_loader, call)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    written = load(weight_loader, call)
    if call.tied:
        written.pop(HEAD, None)  # may be the embedding itself
    for number, tensor in enumerate(written.values()):
        tensor.fill_(number + 1)
    counted()
    for number, (name, tensor) in enumerate(written.items()):
        if not bool((tensor == number + 1).all()):
            summary = f"writing into another tensor of the result changed {name}"
            shown = f"print(out[{name!r}].data_ptr(), {{k: t.data_ptr() for k, t in out.items()}})"
            raise ConformanceFailure("shared memory", summary, call=call, shown_by=shown)
    assert_same_tensors(kept, before, call, "after a later result was written into")
    again = load(weight_loader, call)
    assert_same_tensors(again, before, call, "loaded again after a result was written into")


@contextmanager
def directory_restored(call: LoaderCall) -> Iterator[Path]:
    """The directory of the call, whose files are put back in the end."""
    directory = Path(call.named("directory"))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(directory, copy)
        try:
            yield directory
        finally:
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in copy.iterdir():
                shutil.move(path, directory / path.name)


OVERWRITTEN = (
    "paths = [os.path.join(directory, n) for n in os.listdir(directory)]; "
    "_ = [open(p, 'r+b').write(b'U' * os.path.getsize(p)) for p in paths]; "
)


def assert_independent_of_overwritten_files(weight_loader: Subject, case: QwenCase) -> None:
    """What was loaded stays when every byte of the files is overwritten in its place."""
    call = loader_call(case, device=weight_loader.device)
    with directory_restored(call) as directory:
        loaded = load_all(weight_loader, call)
        for path in directory.iterdir():
            with path.open("r+b") as file:
                file.write(b"U" * path.stat().st_size)
        with explained("every file was overwritten in its place after loading", first=OVERWRITTEN):
            assert_loaded(loaded, call)


def assert_read_anew(weight_loader: Subject, case: QwenCase) -> None:
    """A directory that holds another checkpoint by now gives the other weights."""
    call = loader_call(case, device=weight_loader.device)
    other = loader_call(replace(case, seed=case.seed + 1), device=weight_loader.device)
    with directory_restored(call) as directory:
        load_all(weight_loader, call)
        for path in Path(other.named("directory")).iterdir():
            shutil.copy(path, directory / path.name)
        with explained("the files were replaced by those of another checkpoint after a first load"):
            assert_loaded(load_all(weight_loader, call), call, state=other.named("state"))


def assert_directory_unchanged(weight_loader: Subject, case: QwenCase) -> None:
    """Loading leaves every file as it is and adds none."""
    call = loader_call(case, device=weight_loader.device)
    directory = Path(call.named("directory"))
    before = contents(directory)
    for rank in range(case.ranks):
        load(weight_loader, call.of_rank(rank))
    counted()
    if contents(directory) != before:
        changed = sorted(set(contents(directory).items()) ^ set(before.items()))[0][0]
        raise ConformanceFailure(
            "changed file",
            f"loading changed {changed}",
            call=call.of_rank(0),
            shown_by="print(os.listdir(directory))",
        )


STATES = {
    "the default dtype": "torch.get_default_dtype()",
    "the recording of gradients": "torch.is_grad_enabled()",
    "the number of threads": "torch.get_num_threads()",
    "the random state": "torch.initial_seed()",
    "the working folder": "os.getcwd()",
}


def assert_global_state_kept(weight_loader: Subject, case: QwenCase) -> None:
    """Loading, and refusing to, leave torch and Python as they were."""
    good = loader_call(case, device=weight_loader.device).of_rank(drawn_rank(case))
    bad = loader_call(case, "del state['model.norm.weight']").of_rank(drawn_rank(case))
    for call in (good, bad):
        call.namespace()
    before = global_state()
    with global_state_restored(before):
        for call, what in ((good, "loading"), (bad, "refusing to load")):
            (directory,), options = call.values()
            with contextlib.suppress(Exception):
                weight_loader.method(directory, **weight_loader.select_options(options))
            weight_loader.calls["weight_loader"] += 1
            counted()
            after = global_state()
            changed = [name for name in before if after[name] != before[name]]
            if changed:
                summary = f"{what} changed {changed[0]} for the whole process"
                shown = STATES.get(changed[0], "None")
                raise ConformanceFailure(
                    "changed state", summary, call=call, shown_by=f"print({shown})"
                )


def assert_any_default_dtype(weight_loader: Subject, case: QwenCase) -> None:
    """The default dtype of the process, and whether gradients are recorded, have no influence."""
    call = loader_call(case, device=weight_loader.device)
    before = global_state()
    for dtype in (torch.float64, torch.bfloat16):
        with global_state_restored(before), torch.set_grad_enabled(dtype == torch.float64):
            torch.set_default_dtype(dtype)
            with explained(f"torch.set_default_dtype({dtype}) was called before"):
                loaded = load_all(weight_loader, call)
        with explained(f"torch.set_default_dtype({dtype}) was called before"):
            assert_loaded(loaded, call)


# Where the directory is


LINKED = (
    "after: blobs = os.path.join(directory, 'blobs'); os.mkdir(blobs)",
    "after: snapshot = os.path.join(directory, 'snapshots', '0a1b'); os.makedirs(snapshot)",
    "after: kept = [n for n in sorted(os.listdir(directory)) if n not in ('blobs', 'snapshots')]",
    "after: _ = [os.rename(os.path.join(directory, n), os.path.join(blobs, str(i)))"
    " for i, n in enumerate(kept)]",
    "after: _ = [os.symlink(os.path.join('..', '..', 'blobs', str(i)), os.path.join(snapshot, n))"
    " for i, n in enumerate(kept)]",
    "after: directory = snapshot",
)
"""The layout of the Hugging Face cache: files are links to what is named by its hash elsewhere."""


def assert_links_followed(weight_loader: Subject, case: QwenCase) -> None:
    """Files that are symbolic links are read."""
    call = loader_call(case, saved=LINKED, device=weight_loader.device)
    assert_loaded(load_all(weight_loader, call), call)


PLACES = (
    "after: directory = directory + os.sep",
    "after: directory = os.path.relpath(directory)",
    "after: inner = os.path.join(directory, 'Qwen2.5 0.5B – ütf [1]', 'x.safetensors');"
    " os.makedirs(inner); _ = [os.rename(os.path.join(directory, n), os.path.join(inner, n))"
    " for n in os.listdir(directory) if os.path.isfile(os.path.join(directory, n))];"
    " directory = inner",
)
"""A trailing slash, a relative path, and names with spaces, letters and brackets."""


def assert_any_path(weight_loader: Subject, case: QwenCase) -> None:
    """The directory is found under any path that leads to it."""
    call = loader_call(case, saved=(PLACES[case.seed % len(PLACES)],), device=weight_loader.device)
    assert_loaded(load_all(weight_loader, call), call)


# What else is in it


BESIDE = (
    "after: write('generation_config.json', {'eos_token_id': [151645, 151643]})",
    "after: write('tokenizer.json', {'version': '1.0'}), write('README.md', '# Qwen2')",
    "after: torch.save({k: t + 1 for k, t in state.items()},"
    " os.path.join(directory, 'training_args.bin'))",
    "after: write('adapter_model.json', {'weight_map': {'a': 'b.safetensors'}})",
)


def assert_other_files_ignored(weight_loader: Subject, case: QwenCase) -> None:
    """Files that are no part of the checkpoint change nothing."""
    call = loader_call(case, saved=BESIDE, device=weight_loader.device)
    assert_loaded(load_all(weight_loader, call), call)


STRAYS = (
    "consolidated.safetensors",
    "a.safetensors",
    "model-00009-of-00009.safetensors",
    "zz_old.safetensors",
)


def assert_stray_weights_not_mixed_in(weight_loader: Subject, case: QwenCase) -> None:
    """Weights of other values in a file that is not named: not used, or the directory is refused."""
    name = STRAYS[case.seed % len(STRAYS)]
    line = "safetensors.torch.save_file({k: t + 1 for k, t in state.items()}, "
    saved = (f"after: {line}os.path.join(directory, {name!r}))",)
    call = loader_call(case, saved=saved, device=weight_loader.device)
    understood_or_refused(weight_loader, call)


def assert_two_checkpoints(weight_loader: Subject, case: QwenCase) -> None:
    """A single file beside an index of others: one of the two in whole, or the directory refused."""
    line = "other = {k: t + 1 for k, t in state.items()}"
    save = "safetensors.torch.save_file(other, os.path.join(directory, 'model.safetensors'))"
    call = loader_call(
        case, saved=(f"after: {line}", f"after: {save}"), device=weight_loader.device
    )
    understood_or_refused(weight_loader, call, [call.named("state"), call.named("other")])
