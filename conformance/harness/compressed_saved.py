"""Checks of what a compressed model saves and exports, read without the code that wrote it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from conformance.harness.compare import assert_identical
from conformance.harness.compressed_cases import CompressedCase
from conformance.harness.compressed_checks import assert_same_weights, complete
from conformance.harness.compressed_files import (
    digests,
    expected_files,
    files_in,
    read_mapping,
    read_pt_entries,
    read_weights,
    true_weights,
)
from conformance.harness.compressed_subject import Loaded, counted, load, saved_as
from conformance.harness.core_cases import PROJECTIONS
from conformance.harness.failures import ConformanceFailure
from conformance.harness.file_calls import (
    AFTERWARDS,
    CHANGED,
    CONTENTS,
    NOT_CHANGED,
    ROOM_AGAIN,
    room_for,
)
from conformance.harness.gpt_honesty import files_no_larger_than
from conformance.harness.interruptions import IMPORTS, at_change, in_child, told_in_child
from conformance.harness.subject import Subject


@contextmanager
def place() -> Iterator[Path]:
    """The path of a folder that is not there, alone in its parent."""
    with tempfile.TemporaryDirectory() as parent:
        yield Path(parent) / "saved"


def other_format(case: CompressedCase) -> str:
    """The format that the case is not in."""
    return "safetensors" if case.format == "pt" else "pt"


WALKED = "[(at, f) for at, _, files in os.walk(folder.name + '/saved') for f in files]"
FILES = f"print(sorted(os.path.relpath(os.path.join(*each), folder.name) for each in {WALKED}))"
"""The line that shows which files were written."""


def older_folder(case: CompressedCase) -> tuple[str, ...]:
    """Lines that put a checkpoint with one layer more where the model is saved then."""
    layer = f"{{source}}/layer_{case.expert_layers[0]}"
    return (
        "import shutil",
        "_ = shutil.copytree(source, folder.name + '/saved')",
        f"_ = shutil.copytree(f'{layer}', folder.name + '/saved/layer_{case.layers}')",
    )


def again(loaded: Loaded) -> str:
    """The line that loads what was saved."""
    source = loaded.call.source().replace("(source", "(folder.name + '/saved'", 1)
    return f"again = {source}.parameters()"


def loading_again(loaded: Loaded) -> tuple[str, str]:
    """Lines that load what was saved, and show which weights differ from the model's."""
    differ = "[n for n, p in out.parameters().items() if not torch.equal(p, again[n])]"
    return again(loaded), f"print('differ:', {differ}, '- expected none')"


OLD = "old = {n: p.clone() for n, p in out.parameters().items()}"


def old_or_new(loaded: Loaded) -> tuple[str, str]:
    """Lines that load what was saved, and show whether it is :data:`OLD` or the model as it is."""
    equal = "[all(torch.equal(again[n], m[n]) for n in m) for m in (old, out.parameters())]"
    return again(loaded), f"print('old, new:', {equal}, '- expected one True')"


def reading(name: str) -> str:
    """The line that shows what a small file says."""
    return f"print(open(folder.name + '/saved/{name}').read())"


def loaded_from(subject: Subject, case: CompressedCase, *edits: str, **rest) -> Loaded:
    """The model of a case's folder."""
    return load(subject, case.call(*edits, device=subject.device, **rest))


def own(loaded: Loaded) -> dict[str, Tensor]:
    """The model's weights, copied."""
    return complete(loaded.snapshot(), loaded.call)


def read_saved(folder: Path, loaded: Loaded, format: str) -> dict[str, Tensor]:
    """The weights of a saved folder."""
    try:
        return read_weights(folder, loaded.call.case, format)
    except Exception as error:
        summary = f"what was saved cannot be read: {type(error).__name__}: {error}"
        raise loaded.wrong("unreadable", summary, FILES, *loading_again(loaded)) from error


def assert_saved_weights(
    folder: Path, loaded: Loaded, expected: dict[str, Tensor], format: str, what: str
) -> None:
    """A saved folder holds these weights, bit for bit."""
    found = read_saved(folder, loaded, format)
    shown = loaded.shown(*loading_again(loaded))
    assert_same_weights(found, expected, loaded.call, what, lambda name: shown)


# Saving


def assert_complete(subject: Subject, case: CompressedCase, format: str) -> None:
    """Every file of the layout is there, and no other file of weights."""
    loaded = loaded_from(subject, case)
    with place() as target:
        loaded.save(str(target), format)
        assert_layout(target, loaded, format)


def assert_layout(folder: Path, loaded: Loaded, format: str) -> None:
    """The files of one checkpoint, and no weights or layers of another."""
    counted()
    expected, found = expected_files(loaded.call.case, format), files_in(folder)
    for name in sorted(expected - found):
        raise loaded.wrong("incomplete", f"save() writes no {name}", FILES)
    for name in sorted(found - expected):
        if name.startswith("layer_") or name.endswith((".pt", ".safetensors")):
            summary = f"{name} is there, which is not of this checkpoint"
            raise loaded.wrong("stale file", summary, FILES)


def assert_round_trip(subject: Subject, case: CompressedCase, format: str) -> None:
    """What is saved is what was loaded, bit for bit, in the model's dtype."""
    loaded = loaded_from(subject, case)
    dtype = loaded.call.named("others")["model.norm.weight"].dtype
    with place() as target:
        loaded.save(str(target), format)
        expected = true_weights(loaded.call, dtype)
        assert_saved_weights(target, loaded, expected, format, "the saved folder")


def assert_loads_again(subject: Subject, case: CompressedCase) -> None:
    """What is saved in one format and then in the other loads as the same model each time."""
    loaded = loaded_from(subject, case)
    loaded.change(lambda name: True)
    expected, logits = own(loaded), loaded.logits()
    (_,), options = loaded.call.values()
    for format in (other_format(case), case.format):
        with place() as target:
            loaded.save(str(target), format)
            loaded = Loaded(subject(str(target), **options), loaded.call)
            found = own(loaded)
        assert_same_weights(found, expected, loaded.call, f"a folder saved as {format}")
        because = f"saved as {format} and loaded again"
        assert_identical(loaded.logits(), logits, loaded.call, because=because)


def is_factor(name: str) -> bool:
    """Whether a parameter is of experts."""
    return name.startswith("layer_")


def assert_changes_saved(
    subject: Subject, case: CompressedCase, pick: Callable[[str], bool]
) -> None:
    """Parameters that were changed in place are saved as they are now, all others as they were."""
    loaded = loaded_from(subject, case)
    loaded.change(pick)
    with place() as target:
        loaded.save(str(target), case.format)
        assert_saved_weights(target, loaded, own(loaded), case.format, "the saved folder")


# The small files


def saved_mapping(subject: Subject, case: CompressedCase, name: str) -> tuple[Loaded, dict]:
    """A small file of a saved folder."""
    loaded = loaded_from(subject, case)
    with place() as target:
        loaded.save(str(target), case.format)
        if not (target / name).exists():
            raise loaded.wrong("incomplete", f"save() writes no {name}", FILES)
        counted()
        try:
            found = read_mapping(target / name)
        except (ValueError, yaml.YAMLError) as error:
            summary = f"{name} cannot be read: {error}"
            raise loaded.wrong("unreadable", summary, reading(name)) from error
    return loaded, found


def assert_says(loaded: Loaded, name: str, found: dict, expected: dict) -> None:
    """A small file has these entries."""
    shows = (FILES,) if name.endswith(".pt") else (reading(name),)
    for key, value in expected.items():
        if key not in found or found[key] != value:
            says = repr(found[key]) if key in found else "nothing"
            summary = f"{name} says {says} of {key}, expected {value!r}"
            raise loaded.wrong("wrong fact", summary, *shows)


def assert_config(subject: Subject, case: CompressedCase) -> None:
    """``config.json`` still describes the original."""
    loaded, found = saved_mapping(subject, case, "config.json")
    given = {k: v for k, v in case.config().items() if k not in ("rope_theta", "architectures")}
    if case.model == "qwen3_moe" and "num_experts" not in found:
        given["num_local_experts"] = given.pop("num_experts")
    assert_says(loaded, "config.json", found, given)


def assert_compression_config(subject: Subject, case: CompressedCase) -> None:
    """``compression_config.json`` says rank, projections, number of experts and dtype."""
    loaded, found = saved_mapping(subject, case, "compression_config.json")
    dtype = "float32" if case.stored == "float32" else "bfloat16"
    expected = {"rank": case.rank, "num_experts": case.experts, "dtype": dtype}
    if case.compression:
        expected["model_name"] = "tiny"
    found["projections"] = sorted(found.get("projections", []))
    expected["projections"] = sorted(PROJECTIONS)
    found["dtype"] = str(found.get("dtype")).removeprefix("torch.")
    assert_says(loaded, "compression_config.json", found, expected)


def assert_layer_metadata(subject: Subject, case: CompressedCase) -> None:
    """``compressed_metadata.json`` says which layers have experts, and metadata what sizes."""
    loaded, found = saved_mapping(subject, case, "compressed_metadata.json")
    layers = case.expert_layers
    expected = {"num_compressed_layers": len(layers), "total_layers": case.layers}
    expected["compressed_layer_indices"] = layers
    assert_says(loaded, "compressed_metadata.json", found, expected)
    with place() as target:
        loaded.save(str(target), "pt")
        entries = read_pt_entries(target, case)
        for (layer, projection), said in entries.items():
            counted()
            d_out, d_in = case.shapes[projection]
            sizes = {"num_experts": case.experts, "d_in": d_in, "d_out": d_out, "rank": case.rank}
            whole = {"layer_idx": layer, "projection": projection, "metadata": sizes}
            assert_says(loaded, f"layer_{layer}/{projection}.pt", said, whole)
            name = f"layer_{layer}/{projection}_metadata.json"
            assert_says(loaded, name, read_mapping(target / name), sizes)


def assert_statistics(subject: Subject, case: CompressedCase) -> None:
    """``compression_statistics.yaml`` has the exact counts, and ratios that are not rounded."""
    loaded, found = saved_mapping(subject, case, "compression_statistics.yaml")
    expected = loaded.call.named("files")["compression_statistics.yaml"]
    by_place = {(e.get("layer_idx"), e.get("projection")): e for e in found["per_layer_stats"]}
    pairs = [("", found, {k: v for k, v in expected.items() if k != "per_layer_stats"})]
    pairs += [
        (
            f"layer {e['layer_idx']} {e['projection']}: ",
            by_place.get((e["layer_idx"], e["projection"]), {}),
            e,
        )
        for e in expected["per_layer_stats"]
    ]
    for where, said, right in pairs:
        for key, value in right.items():
            counted()
            # Ratios are quotients of integers: two ways to round them differ in the last bits.
            near = abs(float(value)) * 2.0**-45 if isinstance(value, float) else 0
            if key not in said or (said[key] != value and not abs(said[key] - value) <= near):
                summary = (
                    f"compression_statistics.yaml: {where}{key} is {said.get(key)!r}, not {value!r}"
                )
                raise loaded.wrong("wrong fact", summary, reading("compression_statistics.yaml"))
    if len(by_place) != len(expected["per_layer_stats"]):
        summary = f"per_layer_stats has {len(by_place)} entries"
        raise loaded.wrong("wrong fact", summary, reading("compression_statistics.yaml"))


TOKENIZER = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"model_max_length": 64}',
    "special_tokens_map.json": "{}",
    "generation_config.json": '{"do_sample": true}',
}


def assert_companions(subject: Subject, case: CompressedCase) -> None:
    """Tokenizer files and the configuration of generation travel with the model."""
    lines = tuple(
        f"open(f'{{source}}/{name}', 'w').write({text!r}) and None"
        for name, text in TOKENIZER.items()
    )
    loaded = loaded_from(subject, case, after=lines)
    for write in (lambda target: loaded.save(target, case.format), loaded.export):
        with place() as target:
            loaded.done.clear()
            write(str(target))
            counted()
            for name in TOKENIZER:
                if not (target / name).exists():
                    raise loaded.wrong("incomplete", f"{name} is not there", FILES)


# Where it is saved


def assert_over_older(subject: Subject, case: CompressedCase) -> None:
    """Over a checkpoint with more layers, in the other format, the new one stands alone."""
    older = replace(case, layers=case.layers + 1, dense=(), format=other_format(case))
    old = loaded_from(subject, older)
    loaded = loaded_from(subject, case)
    with place() as target:
        old.save(str(target), older.format)
        loaded.done += older_folder(case)
        loaded.save(str(target), case.format)
        assert_layout(target, loaded, case.format)
        assert_saved_weights(target, loaded, own(loaded), case.format, "the saved folder")
        (_,), options = loaded.call.values()
        again = Loaded(subject(str(target), **options), loaded.call)
        assert_same_weights(own(again), own(loaded), loaded.call, "the folder saved over another")


def assert_same_sizes_again(subject: Subject, case: CompressedCase) -> None:
    """Saved twice to one folder, and changed between, it holds the later model."""
    loaded = loaded_from(subject, case)
    with place() as target:
        loaded.save(str(target), case.format)
        loaded.change(lambda name: True)
        loaded.save(str(target), case.format)
        assert_saved_weights(target, loaded, own(loaded), case.format, "the folder saved to twice")


@contextmanager
def kept(source: Path) -> Iterator[None]:
    """Put a folder back in the end."""
    aside = source.with_name("aside")
    shutil.copytree(source, aside)
    try:
        yield
    finally:
        shutil.rmtree(source, ignore_errors=True)
        aside.rename(source)


def assert_onto_itself(subject: Subject, case: CompressedCase) -> None:
    """Saving to the very folder that was loaded, in another format too, keeps every bit."""
    loaded = loaded_from(subject, case)
    source = Path(loaded.call.named("source"))
    loaded.change(is_factor)
    with kept(source):
        for format in (case.format, other_format(case)):
            loaded.save(str(source), format)
            assert_layout(source, loaded, format)
            assert_saved_weights(source, loaded, own(loaded), format, "the folder saved to")


def assert_nothing_beside(subject: Subject, case: CompressedCase) -> None:
    """Nothing is left behind beside the folders that are written."""
    loaded = loaded_from(subject, case)
    with place() as target:
        for write in (lambda path: loaded.save(path, case.format), loaded.export):
            loaded.done.clear()
            for _ in range(2):
                write(str(target))
                counted()
                beside = sorted(p.name for p in target.parent.iterdir() if p != target)
                if beside:
                    summary = f"{beside[0]} is beside the folder"
                    raise loaded.wrong("left behind", summary, "print(os.listdir(folder.name))")
            shutil.rmtree(target)


def assert_failing_save(subject: Subject, case: CompressedCase) -> None:
    """A save that cannot be finished raises, and leaves the old checkpoint as it was, alone."""
    loaded = loaded_from(subject, case)
    sizes = [loaded.call.named("others")["model.embed_tokens.weight"].nbytes, 600, 2500, 0]
    limit = sizes[case.which % len(sizes)]
    with place() as target:
        loaded.save(str(target), case.format)
        before = digests(target.parent)
        loaded.change(lambda name: True)
        loaded.done += *CONTENTS, *room_for(limit)
        try:
            with files_no_larger_than(limit):
                loaded.save(str(target), case.format)
        except ConformanceFailure as failure:
            if not failure.kind.startswith("raised "):
                raise
        else:
            summary = f"save() returns although no file could be larger than {limit} bytes"
            raise loaded.wrong("accepted", summary, ROOM_AGAIN, FILES)
        counted()
        after = digests(target.parent)
        if after != before:
            changed = sorted(set(before.items()) ^ set(after.items()))[0][0]
            loaded.done[-1] = f"with contextlib.suppress(Exception): {loaded.done[-1]}"
            looks = ROOM_AGAIN, AFTERWARDS, f"out = {CHANGED}", NOT_CHANGED
            raise loaded.wrong("half written", f"a save that failed changed {changed}", *looks)


def assert_interrupted(subject: Subject, case: CompressedCase) -> None:
    """A save that is killed at any moment leaves the old checkpoint or the new one, whole.

    Between two renames the folder may have another name for a moment.
    """
    loaded = loaded_from(subject, case)
    with place() as target:
        loaded.save(str(target), case.format)
        old = own(loaded)
        loaded.done.append(OLD)
        loaded.change(lambda name: True)
        new, number = own(loaded), case.which % 48
        killed = at_change(number)
        in_child(lambda: loaded.model.save(str(target), format=case.format), killed)
        loaded.done += IMPORTS, *told_in_child(saved_as(case.format), killed)
        counted()
        there = [target] if target.exists() else [p for p in target.parent.iterdir() if p.is_dir()]
        if not any(is_whole(folder, loaded, (old, new)) for folder in there):
            summary = f"a save that was killed at change {number} of files left neither checkpoint"
            raise loaded.wrong("half written", summary, FILES, *old_or_new(loaded))


def is_whole(folder: Path, loaded: Loaded, either: tuple[dict[str, Tensor], ...]) -> bool:
    """Whether a folder holds all of one of these models."""
    case = loaded.call.case
    try:
        assert_layout(folder, loaded, case.format)
        found = read_weights(folder, case, case.format)
        for name in sorted(expected_files(case, case.format)):
            if name.endswith(("json", "yaml")):
                read_mapping(folder / name)
    except Exception:
        return False
    return any(
        found.keys() == model.keys() and all(torch.equal(found[n], t) for n, t in model.items())
        for model in either
    )


def assert_model_unchanged(subject: Subject, case: CompressedCase) -> None:
    """Saving and exporting leave the model as it was."""
    loaded = loaded_from(subject, case)
    before, logits = own(loaded), loaded.logits()
    with place() as target:
        loaded.save(str(target), other_format(case))
    with place() as target:
        loaded.export(str(target))
    assert_same_weights(own(loaded), before, loaded.call, "the model after save() and export()")
    because = "the model was saved and exported"
    assert_identical(loaded.logits(), logits, loaded.call, because=because)
