"""Checks that a loader is honest: all of the file and nothing else is in the model, and it stays so."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Course, course
from conformance.harness.compare import assert_identical
from conformance.harness.failures import ConformanceFailure, NotRun, failing_at
from conformance.harness.file_calls import NOT_CHANGED, ROOM_AGAIN, files_changed, room_for
from conformance.harness.gpt_cases import GPTCall, GPTCase
from conformance.harness.gpt_checks import (
    assert_facts,
    assert_function,
    assert_influence,
    assert_loads,
    used_skips,
)
from conformance.harness.gpt_subject import Loaded, load, open_reader
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, bitwise_equal, errors_named
from reference_impl.gpt import CheckpointReader
from reference_impl.gpt.config import head_key, state_shapes


def counted() -> None:
    """Count one comparison of the exact lane."""
    current_tally().comparisons["exact"] += 1


def assert_any_seed(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Two loads under different random seeds give the same model: nothing is left to chance."""
    call = case.call(device=gpt_checkpoint.device)
    models = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            models.append(load(gpt_checkpoint, call))
    first, second = (loaded.logits() for loaded in models)
    done = replace(call, done=".load().logits(ids)")
    assert_identical(second, first, done, because="loaded again under another random seed")


def assert_loads_twice(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """``inspect``, ``load``, ``load``, ``inspect`` of one reader: all as the first."""
    call = case.call(device=gpt_checkpoint.device)
    reader = open_reader(gpt_checkpoint, call)
    with failing_at(replace(call, done=".load().logits(ids)")), errors_named("the reader"):
        before = dict(reader.inspect())
        models = [Loaded(reader.load(), call) for _ in range(2)]
        after = dict(reader.inspect())
    first, second = (loaded.logits() for loaded in models)
    assert_identical(second, first, models[1].last, because="loaded again from one reader")
    assert_function(models[0])
    if before != after:
        summary = f"inspect() says {after} after load(), and {before} before"
        raise ConformanceFailure("wrong fact", summary, call=replace(call, done=".inspect()"))


def global_state() -> dict[str, Any]:
    """What of torch and Python a loader could change for everybody."""
    return {
        "the default dtype": torch.get_default_dtype(),
        "the recording of gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "the number of threads": torch.get_num_threads(),
        "the precision of matrix products": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.get_deterministic_debug_mode(),
        "the random state": torch.get_rng_state().tolist(),
        "the filters of warnings": list(warnings.filters),
        "the working folder": os.getcwd(),
        "the environment": dict(os.environ),
    }


@contextmanager
def global_state_restored(before: dict[str, Any]) -> Iterator[None]:
    """Put back what can be put back."""
    try:
        yield
    finally:
        torch.set_default_dtype(before["the default dtype"])
        torch.set_grad_enabled(before["the recording of gradients"])
        torch.set_num_threads(before["the number of threads"])
        torch.set_float32_matmul_precision(before["the precision of matrix products"])
        torch.set_deterministic_debug_mode(before["deterministic algorithms"])
        warnings.filters[:] = before["the filters of warnings"]
        os.chdir(before["the working folder"])


def assert_global_state_kept(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Loading, and refusing to, leave torch and Python as they were."""
    call = case.call(device=gpt_checkpoint.device)
    call.namespace()
    bad = case.call("del state['embed.weight']", device=gpt_checkpoint.device)
    bad.namespace()
    (good_source,), options = call.values()
    (bad_source,), _ = bad.values()
    before = global_state()
    with global_state_restored(before):
        for source, done in ((good_source, "load()"), (bad_source, "a load() that is refused")):
            with contextlib.suppress(Exception):
                gpt_checkpoint.method(source, **gpt_checkpoint.select_options(options)).load()
            gpt_checkpoint.calls["gpt_checkpoint"] += 1
            counted()
            after = global_state()
            changed = [name for name in before if after[name] != before[name]]
            if changed:
                summary = f"{done} changed {changed[0]} for the whole process"
                raise ConformanceFailure(
                    "changed state", summary, call=replace(call, done=".load()")
                )


def assert_replaced_file_read_anew(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """A path that holds another checkpoint by now gives the other model."""
    call = case.call(device=gpt_checkpoint.device)
    source = call.named("source")
    load(gpt_checkpoint, call).logits()
    other = replace(case, seed=case.seed + 1).call(device=gpt_checkpoint.device)
    content = Path(other.named("source")).read_bytes()
    with restored_afterwards(source):
        Path(source).write_bytes(content)
        (_,), options = call.values()
        loaded = load(gpt_checkpoint, other)
        with failing_at(other):
            reader = gpt_checkpoint(source, **options)
            again = Loaded(reader.load(), other)
        because = "the file at the path was replaced by another checkpoint"
        assert_identical(again.logits(), loaded.logits(), again.last, because=because)


STATES = (
    "saved = collections.OrderedDict(saved)",
    "saved = {key: torch.nn.Parameter(tensor) for key, tensor in saved.items()}",
    "saved = collections.OrderedDict((k, torch.nn.Parameter(t)) for k, t in saved.items())",
)
"""What ``state_dict()`` and careless saving give in place of a dictionary of plain tensors."""


def assert_kinds_of_states(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """An OrderedDict, and parameters in place of tensors, are read like any state dictionary."""
    assert_loads(gpt_checkpoint, case, saved=(STATES[case.seed % len(STATES)],))


def assert_state_in_dtype(gpt_checkpoint: Subject, case: GPTCase, dtype: torch.dtype) -> None:
    """With a dtype ``state()`` is the stored state, each tensor rounded once to it."""
    call = case.call(device=gpt_checkpoint.device, dtype=str(dtype))
    done = replace(call, done=".load().state()")
    assert_same_state(load(gpt_checkpoint, call).state(), true_state(call, dtype), done, "state()")


def assert_tensors_count(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Reversing the rows of any tensor changes the logits."""
    keys, edits = list(state_shapes(case.config())), {}
    for number in range(2):
        key = keys[(case.drawn["tensor"] + number * 7) % len(keys)]
        edit = f"state[{key!r}] = state[{key!r}].flip(0)"
        edits[edit] = f"{key} was reversed along its first axis"
    assert_influence(gpt_checkpoint, case, edits)


def assert_elements_count(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Changing one element that the ids reach changes the logits."""
    ids = case.call().named("ids")
    edits = {
        f"state[{key!r}]{list(at)} += 1": f"{key}{list(at)} was changed"
        for key, at in drawn_elements(case, ids)
    }
    assert_influence(gpt_checkpoint, case, edits)


def drawn_elements(case: GPTCase, ids: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """Elements that have an influence, by the case's drawn numbers."""
    shapes = state_shapes(case.config())
    keys, elements = list(shapes), []
    for number in range(2):
        key = keys[(case.drawn["tensor"] + number * 5) % len(keys)]
        flat = case.drawn["element"] * 7919 % int(torch.Size(shapes[key]).numel())
        at = [int(i) for i in torch.unravel_index(torch.tensor(flat), shapes[key])]
        if "embed" in key:
            at[0] = int(ids.flatten()[at[0] % ids.numel()])
        if key == "scalars":
            lambdas = range(case.layers, 3 * case.layers)
            at[0] = [*used_skips(case), *lambdas][at[0] % (len(used_skips(case)) + len(lambdas))]
        elements.append((key, tuple(at)))
    return elements


def assert_by_name(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Tensors of equal shape that were exchanged are taken by their names, not their places."""
    shapes = state_shapes(case.config())
    keys = [k for k in shapes if k.startswith("blocks.")]
    one = keys[case.drawn["tensor"] % len(keys)]
    same = [k for k in keys if shapes[k] == shapes[one] and k != one]
    other = same[case.drawn["other"] % len(same)]
    edit = f"state[{one!r}], state[{other!r}] = state[{other!r}], state[{one!r}]"
    assert_loads(gpt_checkpoint, case, edit)


def assert_shared(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """A head that shares memory with the embedding is loaded, or the file refused; never random."""
    head = head_key(case.format)
    edits, saved = [f"state[{head!r}] = state['embed.weight']"], ()
    if case.container == "safetensors":  # as safetensors.torch.save_model writes it
        names = f"{{{head!r}: 'embed.weight'}}"
        saved = (
            f"del saved[{head!r}]",
            f"after: safetensors.torch.save_file(saved, source, metadata={names})",
        )
    call = case.call(*edits, device=gpt_checkpoint.device, saved=saved)
    try:
        loaded = load(gpt_checkpoint, call)
    except ConformanceFailure as failure:
        if case.container != "safetensors" or not failure.kind.startswith("raised "):
            raise
        counted()
        return
    assert_function(loaded)


STRIDED = (
    "saved = {key: t.t().contiguous().t() if t.ndim == 2 else t for key, t in saved.items()}",
    "saved = {key: torch.cat([t + 1, t])[len(t):] for key, t in saved.items()}",
)
"""Tensors that do not lie in their storage from its beginning, row after row."""


def assert_strided(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Transposed views and slices are loaded as the values that they show."""
    assert_loads(gpt_checkpoint, case, saved=(STRIDED[case.seed % len(STRIDED)],))


OPTIMIZERS = (
    "moments = lambda: {'step': torch.tensor(3), 'exp_avg': r(4, 8), 'exp_avg_sq': r(4, 8)}",
    "adam = {'state': {0: moments(), 1: moments()}, 'param_groups': [{'lr': 1e-3, 'params': [0, 1]}]}",
    "muon = {'momentum_buffer': r(8, 8), 'mantissa': torch.zeros(8, 8, dtype=torch.uint16)}",
    "muon = {'state': {0: muon}, 'param_groups': [{'lr': 0.02, 'params': [0]}]}",
    "after: torch.save({'step': 3, 'model': saved, 'optimizers': [adam, muon]}, source)",
)


def assert_optimizer_ignored(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Optimizer state that rides along is no part of the model and no reason to refuse."""
    assert_loads(gpt_checkpoint, case, saved=OPTIMIZERS)


def assert_facts_or_refused(gpt_checkpoint: Subject, call: GPTCall, truth: dict[str, Any]) -> None:
    """``inspect()`` says what is true, or refuses the checkpoint."""
    try:
        assert_facts(gpt_checkpoint, call, truth)
    except ConformanceFailure as failure:
        if not failure.kind.startswith("raised "):
            raise
        counted()


# The state, and saving it


def assert_same_state(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], call: GPTCall, what: str
) -> None:
    """The same names, dtypes and values, bit for bit; says where a wrong tensor comes from."""
    counted()
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or extra:
        names = f"without {sorted(missing)[:3]}" if missing else f"with {sorted(extra)[:3]}"
        raise ConformanceFailure("wrong names", f"{what} is {names}", call=call)
    for key, tensor in expected.items():
        actual = found[key].detach().cpu()
        if bitwise_equal(actual, tensor):
            continue
        raise ConformanceFailure(
            "not identical",
            f"{what}: {key} is {difference(actual, tensor)}",
            details=tuple(origins(actual, tensor, expected)),
            call=call,
            shown_by=f"print(out[{key!r}])",
        )


def difference(actual: Tensor, expected: Tensor) -> str:
    """In words, how one tensor differs from another."""
    if actual.dtype != expected.dtype:
        return f"of {actual.dtype}, expected {expected.dtype}"
    if actual.shape != expected.shape:
        return f"of shape {list(actual.shape)}, expected {list(expected.shape)}"
    if actual.ndim == 2 and bitwise_equal(actual.t(), expected):
        return "the transpose of what is stored"
    wrong = (actual != expected).nonzero()
    at = tuple(wrong[0].tolist())
    return (
        f"wrong in {len(wrong)} of {expected.numel()} elements, the first at {list(at)}: "
        f"{float(actual[at]):.6g}, expected {float(expected[at]):.6g}"
    )


def origins(actual: Tensor, expected: Tensor, state: Mapping[str, Tensor]) -> Iterator[str]:
    """Which element of which tensor the first wrong ones are: random values are as good as names."""
    if actual.shape != expected.shape:
        return
    for at in (actual != expected).nonzero()[:3].tolist():
        for key, tensor in state.items():
            places = (tensor.double() == actual[tuple(at)].double()).nonzero()
            if len(places) == 1:
                yield f"{at} holds {key}{places[0].tolist()}"
                break


def true_state(call: GPTCall, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What the checkpoint holds, under bare names."""
    return {key: t if dtype is None else t.to(dtype) for key, t in call.named("state").items()}


def assert_state(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """``state()`` gives every stored tensor under its bare name, bit for bit."""
    call = case.call(device=gpt_checkpoint.device)
    loaded = load(gpt_checkpoint, call)
    done = replace(call, done=".load().state()")
    assert_same_state(loaded.state(), true_state(call), done, "state()")


def read_back(path: str, call: GPTCall) -> dict[str, Tensor]:
    """The tensors of a written file, as the reference reads them."""
    try:
        reader = CheckpointReader(path, head_dim=call.case.head_dim)
        return {key: reader.read(key) for key in reader.tensors}
    except ValueError as error:
        done = replace(call, done=f".load().save({path!r})")
        raise ConformanceFailure("unreadable", f"what save() wrote: {error}", call=done) from error


@contextmanager
def shown_as_saved(call: GPTCall, path: str) -> Iterator[None]:
    """A failure in here is shown by a tensor of what is saved to a path, which is Python."""
    try:
        yield
    except ConformanceFailure as failure:
        safe = call.case.container == "safetensors"
        read = (
            "safetensors.torch.load_file(path)" if safe else "torch.load(path, weights_only=True)"
        )
        lines = (f"path = {path}", f"{loading(call)}.save(path)")
        failure.call = course(call, *lines, result=f"(read := {read}).get('model', read)")
        key = re.match(r"[^:]*: ([\w.]+) is", failure.summary)
        failure.shown_by = "print(list(out))"
        if key:
            found = (
                f"[t.equal(state[{key[1]!r}]) for k, t in out.items() if k.endswith({key[1]!r})]"
            )
            failure.shown_by = f"print('as loaded:', {found}, '- expected [True]')"
        raise


def loading(call: GPTCall) -> str:
    """The call that loads, as Python."""
    return replace(call, done=".load()").source()


def assert_saved(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """A checkpoint that is saved holds the bits of the one that was loaded, and loads again."""
    call = case.call(device=gpt_checkpoint.device)
    loaded = load(gpt_checkpoint, call)
    path = call.named("source").replace("checkpoint", "copy")
    loaded.save(path)
    with shown_as_saved(call, "source.replace('checkpoint', 'copy')"):
        assert_same_state(read_back(path, call), true_state(call), call, "the saved file")
    again = load(gpt_checkpoint, call.then(f"source = {path!r}"))
    done = replace(again.call, done=".load().logits(ids)")
    assert_identical(again.logits(), loaded.logits(), done, because="saved and loaded again")
    Path(path).unlink()


@contextmanager
def restored_afterwards(path: str) -> Iterator[bytes]:
    """The bytes of a file, which are put back in the end."""
    content = Path(path).read_bytes()
    try:
        yield content
    finally:
        Path(path).write_bytes(content)


def assert_saved_onto_itself(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Saving to the very file that was loaded keeps every bit, and the model as it was."""
    call = case.call(device=gpt_checkpoint.device)
    source = call.named("source")
    with restored_afterwards(source):
        loaded = load(gpt_checkpoint, call)
        loaded.save(source)
        with shown_as_saved(call, "source"):
            assert_same_state(read_back(source, call), true_state(call), call, "the file saved to")
        assert_function(loaded)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writing more than ``size`` bytes to any file fails, as on a full disk."""
    try:
        import resource
    except ImportError as error:
        raise NotRun("needs limits of a POSIX system") from error
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_failing_save(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """A save that cannot be finished raises, and leaves the old file whole and nothing beside it."""
    call = case.call(device=gpt_checkpoint.device)
    source = call.named("source")
    with restored_afterwards(source) as content:
        loaded = load(gpt_checkpoint, call)
        before = contents(Path(source).parent)
        limit = len(content) * (1 + case.drawn["percent"]) // 100
        done = replace(call, done=f".load().save({source!r})")
        limited = (f"model = {loading(call)}", *room_for(limit))
        try:
            with files_no_larger_than(limit):
                loaded.save(source)
        except ConformanceFailure as failure:
            if not failure.kind.startswith("raised "):
                raise
        else:
            summary = f"save() returns although only {limit} bytes could be written"
            told = course(done, *limited, "model.save(source)", result=ROOM_AGAIN)
            shown_by = "print('save() returns, expected an error')"
            raise ConformanceFailure("accepted", summary, call=told, shown_by=shown_by)
        counted()
        after = contents(Path(source).parent)
        for stray in after.keys() - before.keys():
            os.unlink(Path(source).parent / stray)
        if after != before:
            changed = sorted(set(before.items()) ^ set(after.items()))[0][0]
            raise ConformanceFailure(
                "half written",
                f"a save that failed half-way changed {changed}",
                call=files_changed(done, "model.save(source)", first=limited, last=(ROOM_AGAIN,)),
                shown_by=NOT_CHANGED,
            )


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file in a folder, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


# What was passed in


def change_weights(loaded: Loaded) -> None:
    """Write zeros into everything that the model shows of its weights."""
    shown = list(loaded.state().values()) if callable(getattr(loaded.model, "state", None)) else []
    parameters = getattr(loaded.model, "parameters", None)
    with torch.no_grad():
        for tensor in (*shown, *(parameters() if callable(parameters) else ())):
            tensor.zero_()


def used(loaded: Loaded) -> tuple[str, str]:
    """Lines that use ``model``, and write zeros into what it shows of its weights."""
    model = loaded.model
    shown = [f"*model.{name}()" for name in ("parameters",) if hasattr(model, name)]
    shown += ["*model.state().values()"] if hasattr(model, "state") else []
    return "model.logits(ids)", f"[t.detach().zero_() for t in [{', '.join(shown)}]]"


def assert_file_unchanged(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Loading, using and changing a model leaves its file and the folder as they were."""
    call = case.call(device=gpt_checkpoint.device)
    folder = Path(call.named("source")).parent
    before = contents(folder)
    with restored_afterwards(call.named("source")):
        loaded = load(gpt_checkpoint, call)
        loaded.logits()
        change_weights(loaded)
        after = contents(folder)
    counted()
    if after != before:
        changed = sorted(set(before.items()) ^ set(after.items()))[0][0]
        summary = f"{changed} was changed by loading"
        made = files_changed(call, *used(loaded), first=(f"model = {loading(call)}",))
        raise ConformanceFailure("changed input", summary, call=made, shown_by=NOT_CHANGED)


SAME_DICTIONARY = "print('changed:', out, '- expected []')"


def dictionary_compared(call: GPTCall, loaded: Loaded) -> Course:
    """What of ``source`` a model changes when it is used and changed itself."""
    now = "source['model']"
    same = f"k in {now} and {now}[k] is t and torch.equal(t, values[k])"
    return course(
        call,
        "before, entries = dict(source['model']), {k for k in source}",
        "values = {k: t.clone() for k, t in before.items()}",
        f"model = {loading(call)}",
        *used(loaded),
        f"changed = [k for k, t in before.items() if not ({same})]",
        result="changed + sorted({k for k in source} ^ entries)"
        " + sorted(before.keys() ^ source['model'].keys())",
    )


def assert_dictionary_unchanged(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Loading, using and changing a model leaves the dictionary that it came from as it was."""
    call = case.call(device=gpt_checkpoint.device)
    dictionary = call.named("source")
    before = [(key, tensor, tensor.clone()) for key, tensor in dictionary["model"].items()]
    entries = [(key, value) for key, value in dictionary.items() if key != "model"]
    done = call
    try:
        loaded = load(gpt_checkpoint, call)
        loaded.logits()
        change_weights(loaded)
        counted()
        done = dictionary_compared(call, loaded)
        now = list(dictionary["model"].items())
        if [key for key, _ in now] != [key for key, _, _ in before]:
            raise ConformanceFailure(
                "changed input",
                "names of the dictionary changed",
                call=done,
                shown_by=SAME_DICTIONARY,
            )
        for (key, tensor), (_, same, copy) in zip(now, before):
            if tensor is not same or not bitwise_equal(tensor, copy):
                raise ConformanceFailure(
                    "changed input", f"{key} was changed", call=done, shown_by=SAME_DICTIONARY
                )
        if [(k, v) for k, v in dictionary.items() if k != "model"] != entries:
            raise ConformanceFailure(
                "changed input", "entries were changed", call=done, shown_by=SAME_DICTIONARY
            )
    finally:
        for _, tensor, copy in before:
            tensor.copy_(copy)
        dictionary["model"] = {key: tensor for key, tensor, _ in before}


def assert_later_changes_ignored(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Overwriting the file, or the tensors of the dictionary, does not reach a loaded model."""
    call = case.call(device=gpt_checkpoint.device)
    loaded = load(gpt_checkpoint, call)
    first = loaded.logits()
    with overwritten(call.named("source")):
        because = "what it was loaded from was overwritten"
        with shown_by_overwriting(call):
            assert_identical(loaded.logits(), first, call, because=because)


@contextmanager
def shown_by_overwriting(call: GPTCall) -> Iterator[None]:
    """A failure in here is shown by a model of which the file or dictionary is overwritten."""
    try:
        yield
    except ConformanceFailure as failure:
        zeros = "open(source, 'r+b').write(bytes(os.path.getsize(source)))"
        if call.case.container == "memory":
            zeros = "[t.zero_() for t in source['model'].values()]"
        lines = (f"model = {loading(call)}", "before = model.logits(ids)", f"_ = {zeros}")
        failure.call = course(call, *lines, result="model.logits(ids)")
        failure.shown_by = "print('as before:', torch.equal(out, before), '- expected True')"
        raise


@contextmanager
def overwritten(source: Any) -> Iterator[None]:
    """Zeros in place of a file's bytes or a dictionary's tensors; put back in the end.

    The file keeps its length: shortening one that is mapped would end the process.
    """
    if isinstance(source, str):
        with restored_afterwards(source) as content:
            with open(source, "r+b") as file:
                file.write(bytes(len(content)))
            yield
        return
    copies = {key: tensor.clone() for key, tensor in source["model"].items()}
    try:
        for tensor in source["model"].values():
            tensor.zero_()
        yield
    finally:
        for key, tensor in source["model"].items():
            tensor.copy_(copies[key])


def assert_dtype(gpt_checkpoint: Subject, case: GPTCase, dtype: torch.dtype) -> None:
    """With a dtype the weights are converted to it and the model computes in it."""
    call = replace(case.call(device=gpt_checkpoint.device, dtype=str(dtype)), dtype=dtype)
    loaded = load(gpt_checkpoint, call)
    assert_function(loaded)
