"""Directories that must be refused, and the checks that they are.

Each kind of damage is a function of a case that gives the lines of Python that do it. The undamaged
directory must load on the same ranks, so that refusing everything proves nothing.
"""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from conformance.harness.failures import ConformanceFailure, Declined, Inconclusive
from conformance.harness.gpt_damage import ACCIDENTS
from conformance.harness.gpt_honesty import contents
from conformance.harness.loader_checks import counted
from conformance.harness.loader_honesty import directory_restored, drawn_rank
from conformance.harness.loader_subject import (
    HEAD,
    LoaderCall,
    load,
    loader_call,
    loader_cases,
)
from conformance.harness.qwen2_cases import QwenCase, extras
from conformance.harness.subject import Subject, bitwise_equal

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Damage:
    """What is wrong with a directory."""

    edits: tuple[str, ...] = ()
    """Lines that change ``state`` or ``config``."""
    saved: tuple[str, ...] = ()
    """Lines that change ``files`` or ``index``, or, after ``after: ``, what is on disk."""
    named: tuple[str, ...] = ()
    """Tensors or keys, one of which a good error names; nothing where none is to blame."""
    file: tuple[str, ...] = ()
    """Files, one of which a good error names; nothing: the directory or any file in it."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the call as source text."""


Damager = Callable[[QwenCase], Damage]

DAMAGES: dict[str, Damager] = {}


def damage(damager: Damager) -> Damager:
    """Register a kind of damage under its name."""
    DAMAGES[damager.__name__] = damager
    return damager


def damage_cases(**fixed: Any) -> SearchStrategy[QwenCase]:
    """Directories of two layers, with the numbers that a kind of damage draws; often on one rank."""
    numbers = extras(
        which=st.integers(0, 1000), place=st.integers(0, 10**6), kind=st.integers(0, 1000)
    )
    small = {"layers": 2, "extra": numbers, "ranks": (1, 1, 2, 3, 4)}
    return loader_cases(**(small | fixed))


def several_files(**fixed: Any) -> SearchStrategy[QwenCase]:
    """The same, with an index."""
    return damage_cases(files=st.sampled_from([2, 3, 5]), **fixed)


def picked(case: QwenCase, choices: list[Any]) -> Any:
    """One of the choices, by the case's drawn number."""
    return choices[case.drawn["which"] % len(choices)]


def placed(case: QwenCase, size: int) -> int:
    """A place below ``size``, by the case's drawn number."""
    return case.drawn["place"] % size


def keys_of(case: QwenCase) -> list[str]:
    """The names of every tensor."""
    return list(case.config().shapes())


def one_of_each_kind(case: QwenCase) -> list[str]:
    """The embedding, the last norm, the head if there is one, and the tensors of a drawn layer."""
    layer = f"model.layers.{placed(case, case.layers)}."
    return [key for key in keys_of(case) if "layers" not in key or key.startswith(layer)]


def in_layer(case: QwenCase, name: str) -> str:
    """The full name of a tensor of a drawn layer."""
    return f"model.layers.{placed(case, case.layers)}.{name}"


def file_name(case: QwenCase, number: int) -> str:
    """The name of one of the files."""
    if case.files == 1:
        return "model.safetensors"
    return f"model-{number % case.files + 1:05}-of-{case.files:05}.safetensors"


def drawn_file(case: QwenCase) -> str:
    """The name of a drawn file."""
    return file_name(case, placed(case, case.files))


# Files and index


@damage
def missing_file(case: QwenCase) -> Damage:
    """A file of the checkpoint is not there."""
    name = drawn_file(case)
    return Damage(saved=(f"after: os.remove(os.path.join(directory, {name!r}))",), file=(name,))


@damage
def unindexed_tensor(case: QwenCase) -> Damage:
    """A tensor is in a file of the checkpoint, but not in the index."""
    key = picked(case, keys_of(case))
    return Damage(saved=(f"_ = index.pop({key!r}, None)",), named=(key,))


@damage
def indexed_tensor_missing(case: QwenCase) -> Damage:
    """A tensor is in the index, but not in the file that the index names for it."""
    key = picked(case, keys_of(case))
    return Damage(saved=(f"_ = files[index[{key!r}]].pop({key!r})",), named=(key,))


@damage
def indexed_elsewhere(case: QwenCase) -> Damage:
    """The index names another file for a tensor than the one that it is in."""
    keys = keys_of(case)
    number = case.drawn["which"] % len(keys)
    other = file_name(case, number % case.files + 1)
    return Damage(saved=(f"index[{keys[number]!r}] = {other!r}",), named=(keys[number],))


@damage
def in_two_files(case: QwenCase) -> Damage:
    """Two files of the checkpoint have the same tensor, with different values."""
    keys = keys_of(case)
    number = case.drawn["which"] % len(keys)
    other = file_name(case, number % case.files + 1)
    line = f"files[{other!r}][{keys[number]!r}] = state[{keys[number]!r}] + 1"
    return Damage(saved=(line,), named=(keys[number],))


@damage
def outside_the_directory(case: QwenCase) -> Damage:
    """The index names a file that is there, but not in the directory."""
    name = drawn_file(case)
    written = picked(case, [f"'../outside/{name}'", f"os.path.join(outside, {name!r})"])
    lines = (
        "inner, outside = os.path.join(directory, 'inner'), os.path.join(directory, 'outside')",
        "os.mkdir(inner), os.mkdir(outside)",
        "directory = inner",
        f"index = {{k: {written} if n == {name!r} else n for k, n in index.items()}}",
        f"after: os.rename(os.path.join(inner, {name!r}), os.path.join(outside, {name!r}))",
    )
    return Damage(saved=lines, file=(name, INDEX))


@damage
def bad_index(case: QwenCase) -> Damage:
    """The index is no JSON, or no map of names to files."""
    written = "open(os.path.join(directory, 'model.safetensors.index.json'), 'w').write({})"
    text = picked(
        case,
        [
            "''",
            "'not JSON'",
            "'[]'",
            "'{}'",
            "json.dumps({'weight_map': {}})",
            "json.dumps({'weight_map': list(index)})",
            "json.dumps({'weight_map': index})[:-9]",
            "json.dumps({'metadata': {'total_size': 1}})",
            "json.dumps(index)",
            "json.dumps({'weight_map': {k: 1 for k in index}})",
            "json.dumps({'weight_map': {k: None for k in index}})",
        ],
    )
    return Damage(saved=(f"after: _ = {written.format(text)}",))


@damage
def bad_config(case: QwenCase) -> Damage:
    """The configuration is not there, or no JSON object."""
    path = "os.path.join(directory, 'config.json')"
    lines = [f"os.remove({path})"]
    texts = ["", "not JSON", "[]", "7", "null", "{'hidden_size': 8}"]
    lines += [f"_ = open({path}, 'w').write({text!r})" for text in texts]
    return Damage(saved=(f"after: {picked(case, lines)}",), file=("config.json",))


# Names


@damage
def missing_tensor(case: QwenCase) -> Damage:
    """One tensor is missing."""
    key = picked(case, one_of_each_kind(case))
    return Damage((f"del state[{key!r}]",), named=(key,))


@damage
def missing_bias(case: QwenCase) -> Damage:
    """The bias of queries, keys or values is missing, in one layer or in all."""
    name = picked(case, [f"self_attn.{kind}_proj.bias" for kind in ("q", "k", "v")])
    one = f"del state[{in_layer(case, name)!r}]"
    every = f"state = {{k: t for k, t in state.items() if not k.endswith({name!r})}}"
    return Damage((one if placed(case, 2) else every,), named=(name,))


@damage
def unknown_tensor(case: QwenCase) -> Damage:
    """There is a tensor that no part of the model takes."""
    key = picked(
        case,
        [
            in_layer(case, "mlp.gate_proj.bias"),
            in_layer(case, "mlp.down_proj.bias"),
            in_layer(case, "self_attn.q_norm.weight"),
            in_layer(case, "self_attn.q_proj.lora_A.weight"),
            in_layer(case, "self_attn.sinks"),
            in_layer(case, "input_layernorm.bias"),
            "model.norm.bias",
            "model.norm.weight.1",
            "lm_head.bias",
            "v_head.summary.weight",
        ],
    )
    return Damage((f"state[{key!r}] = r({case.hidden})",), named=(key,))


@damage
def output_bias(case: QwenCase) -> Damage:
    """There is a bias of the output projection, which Qwen2 has not."""
    key = in_layer(case, "self_attn.o_proj.bias")
    one = f"state[{key!r}] = r({case.hidden})"
    each = f"for i in range({case.layers})"
    every = f"state |= {{f'model.layers.{{i}}.self_attn.o_proj.bias': r({case.hidden}) {each}}}"
    return Damage((one if picked(case, [0, 1]) else every,), named=("self_attn.o_proj.bias",))


@damage
def more_layers(case: QwenCase) -> Damage:
    """There are more layers than the configuration says."""
    kept = case.layers - 1
    return Damage((f"config['num_hidden_layers'] = {kept}",), named=(f"layers.{kept}.",))


@damage
def fewer_layers(case: QwenCase) -> Damage:
    """There are fewer layers than the configuration says."""
    more = case.layers + 1 + placed(case, 2)
    named = tuple(f"layers.{layer}." for layer in range(case.layers, more))
    return Damage((f"config['num_hidden_layers'] = {more}",), named=named)


@damage
def gap_in_layers(case: QwenCase) -> Damage:
    """The layers are not numbered from 0 on without a gap."""
    number = placed(case, case.layers)
    other = case.layers + picked(case, [0, 1, 7])
    old, new = f"'.layers.{number}.'", f"'.layers.{other}.'"
    line = f"state = {{k.replace({old}, {new}): t for k, t in state.items()}}"
    return Damage((line,), named=(f"layers.{number}.", f"layers.{other}."))


@damage
def fused_projections(case: QwenCase) -> Damage:
    """A fused tensor is in the place of queries, keys and values, or of gate and up."""
    block, fused, names = picked(
        case,
        [
            ("self_attn", "qkv_proj.weight", ("q_proj", "k_proj", "v_proj")),
            ("mlp", "gate_up_proj.weight", ("gate_proj", "up_proj")),
            ("self_attn", "q_proj.weight", ("q_proj", "k_proj", "v_proj")),
            ("mlp", "gate_proj.weight", ("gate_proj", "up_proj")),
        ],
    )
    prefix = in_layer(case, block)
    keys = [f"{prefix}.{name}.weight" for name in names]
    line = f"state[{f'{prefix}.{fused}'!r}] = torch.cat([state.pop(k) for k in {keys}])"
    return Damage((line,), named=(*keys, f"{prefix}.{fused}"))


@damage
def renamed_tensor(case: QwenCase) -> Damage:
    """A tensor has almost its name."""
    key = picked(case, one_of_each_kind(case))
    changes = [
        f"{key}_orig",
        key.upper(),
        f"{key} ",
        f".{key}",
        key.replace(".", "/"),
        key.replace("weight", "weights").replace("bias", "biases"),
        f"x{key}",
    ]
    name = changes[placed(case, len(changes))]
    return Damage((f"state[{name!r}] = state.pop({key!r})",), named=(key, name))


@damage
def both_prefixes(case: QwenCase) -> Damage:
    """A tensor is there twice, with ``model.`` in front and without, with different values."""
    keys = [key for key in one_of_each_kind(case) if key.startswith("model.")]
    key = picked(case, keys)
    bare = key.removeprefix("model.")
    return Damage((f"state[{bare!r}] = state[{key!r}] + 1",), named=(key, bare))


@damage
def untied_without_head(case: QwenCase) -> Damage:
    """The configuration does not tie the head, and there is none."""
    edits = (f"_ = state.pop({HEAD!r}, None)", "config['tie_word_embeddings'] = False")
    return Damage(edits, named=(HEAD,))


# Shapes


def matrices(case: QwenCase) -> list[str]:
    """The names of all matrices of a drawn layer, the embedding and the head."""
    shapes = case.config().shapes()
    return [key for key in one_of_each_kind(case) if len(shapes[key]) == 2]


@damage
def transposed_tensor(case: QwenCase) -> Damage:
    """A matrix that is not square is stored as its transpose."""
    key = picked(case, matrices(case))
    return Damage((f"state[{key!r}] = state[{key!r}].t().contiguous()",), named=(key,))


@damage
def more_rows(case: QwenCase) -> Damage:
    """A tensor has more rows than the configuration says, as one of a wider model has."""
    key = picked(case, one_of_each_kind(case))
    more = ["t[:1]", "t", f"t[:{case.head_dim}]", f"t[:{case.ranks}]"][placed(case, 4)]
    line = f"t = state[{key!r}]; state[{key!r}] = torch.cat([t, {more}])"
    return Damage((line,), named=(key,))


@damage
def more_columns(case: QwenCase) -> Damage:
    """A matrix has more columns than the configuration says."""
    key = picked(case, matrices(case))
    more = ["t[:, :1]", "t", f"t[:, :{case.head_dim}]", f"t[:, :{case.ranks}]"][placed(case, 4)]
    line = f"t = state[{key!r}]; state[{key!r}] = torch.cat([t, {more}], 1)"
    return Damage((line,), named=(key,))


@damage
def fewer_elements(case: QwenCase) -> Damage:
    """A tensor has fewer rows or columns than the configuration says, or one, or none."""
    key = picked(case, one_of_each_kind(case))
    changes = ["t[:-1]", f"t[:{len_of(case, key)} // 2]", "t[:1]", "t[:0]", "t[..., :-1]"]
    change = changes[placed(case, len(changes))]
    line = f"t = state[{key!r}]; state[{key!r}] = {change}.contiguous()"
    return Damage((line,), named=(key,))


def len_of(case: QwenCase, key: str) -> int:
    """The number of rows of a tensor."""
    return case.config().shapes()[key][0]


@damage
def other_dimensions(case: QwenCase) -> Damage:
    """A tensor has the right number of elements in the wrong number of dimensions."""
    key = picked(case, one_of_each_kind(case))
    flat = len(case.config().shapes()[key]) == 2
    changes = ["t.flatten()", "t[None]"] if flat else ["t[None]", "t[:, None]"]
    line = f"t = state[{key!r}]; state[{key!r}] = {changes[placed(case, 2)]}.contiguous()"
    return Damage((line,), named=(key,))


# Values


@damage
def not_floating(case: QwenCase) -> Damage:
    """A tensor of integers or booleans."""
    key = picked(case, one_of_each_kind(case))
    dtype = ("int64", "int8", "uint8", "bool", "int32")[placed(case, 5)]
    line = f"state[{key!r}] = (100 * state[{key!r}]).to(torch.{dtype})"
    return Damage((line,), named=(key,))


@damage
def quantised(case: QwenCase) -> Damage:
    """8-bit weights whose scale is in a tensor of its own, which the model knows nothing of."""
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    key = in_layer(case, picked(case, [f"{name}.weight" for name in names]))
    kind, scale = [("float8_e4m3fn", "_scale_inv"), ("int8", "_scale")][placed(case, 2)]
    lines = (
        f"scale = state[{key!r}].abs().amax().clamp(1e-6) / 120",
        f"state[{key!r}] = (state[{key!r}] / scale).to(torch.{kind})",
        f"state[{key + scale!r}] = scale[None]",
    )
    return Damage(lines, named=(key,))


@damage
def not_finite(case: QwenCase) -> Damage:
    """One element is NaN or infinite."""
    key = picked(case, one_of_each_kind(case))
    value = ("nan", "inf", "-inf")[placed(case, 3)]
    place = placed(case, 10**6) % int(torch.Size(case.config().shapes()[key]).numel())
    line = f"state[{key!r}].view(-1)[{place}] = float({value!r})"
    return Damage((line,), named=(key,))


# Bytes


def bytes_read(name: str) -> str:
    """A line that reads a file into ``data``."""
    path = f"os.path.join(directory, {name!r})"
    return f"after: path = {path}; data = bytearray(open(path, 'rb').read())"


LENGTH = "after: header = 8 + int.from_bytes(data[:8], 'little')"
WRITE = "after: _ = open(path, 'wb').write(data)"


@damage
def truncated(case: QwenCase) -> Damage:
    """A file ends too early: in its header, behind it, between tensors, before the last byte."""
    ends = "[t['data_offsets'][1] for n, t in sorted(json.loads(data[8:header]).items())"
    ends += " if n != '__metadata__']"
    length = picked(
        case,
        [
            "0",
            "1",
            "7",
            "8",
            "9",
            "header // 2",
            "header - 1",
            "header",
            "header + 1",
            "len(data) - 1",
            "len(data) - 2",
            f"header + sorted({ends})[0]",
            f"header + sorted({ends})[len({ends}) // 2]",
            f"header + sorted({ends})[-2]",
            f"header + (len(data) - header) * {placed(case, 1000)} // 1000",
        ],
    )
    name = file_name(case, case.seed)
    return Damage(
        saved=(bytes_read(name), LENGTH, f"after: del data[{length}:]", WRITE), file=(name,)
    )


@damage
def too_long(case: QwenCase) -> Damage:
    """There are bytes behind the last tensor of a file, or between two."""
    name, count = file_name(case, case.seed), (1, 4, 512)[placed(case, 3)]
    where = picked(case, ["len(data)", "header"])
    line = f"after: data[{where}:{where}] = bytes({count})"
    return Damage(saved=(bytes_read(name), LENGTH, line, WRITE), file=(name,))


@damage
def bad_header(case: QwenCase) -> Damage:
    """The header of a file names bytes that are not there, or another tensor's, or is none."""
    name = file_name(case, case.seed)
    edits = picked(
        case,
        [
            "entry['data_offsets'][1] += 4",
            "entry['data_offsets'] = [n + 10**9 for n in entry['data_offsets']]",
            "entry['data_offsets'] = entry['data_offsets'][::-1]",
            "entry['data_offsets'] = list(others[0]['data_offsets'])",
            "entry['shape'] = [-n for n in entry['shape']]",
            "entry['shape'][0] += 1",
            "del entry['data_offsets']",
            "del entry['shape']",
            "del entry['dtype']",
            "entry['dtype'] = 'F64'",
            "entry['dtype'] = 'F31'",
            "meta.clear()",
        ],
    )
    lines = (
        bytes_read(name),
        LENGTH,
        "after: meta = json.loads(data[8:header]); names = [n for n in meta if n[0] != '_']",
        f"after: entry = meta[names[{placed(case, 97)} % len(names)]]",
        "after: others = [meta[n] for n in names if meta[n] is not entry] or [{'data_offsets': []}]",
        f"after: {edits}",
        "after: text = json.dumps(meta).encode()",
        "after: data[:header] = len(text).to_bytes(8, 'little') + text",
        WRITE,
    )
    return Damage(saved=lines, file=(name,))


@damage
def other_contents(case: QwenCase) -> Damage:
    """A file of the checkpoint is something else: empty, a folder, a web page, a pickle."""
    name = file_name(case, case.seed)
    text = "open(path, 'w').write({!r})"
    line = picked(
        case,
        [
            "open(path, 'w').close()",
            "os.remove(path), os.mkdir(path)",
            text.format("<html><body>404 Not Found</body></html>"),
            text.format("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 132\n"),
            "open(path, 'wb').write(bytes(4096))",
            "open(path, 'wb').write((1 << 62).to_bytes(8, 'little') + b'{}' * 64)",
            "open(path, 'wb').write((2).to_bytes(8, 'little') + b'{}')",
            "open(path, 'wb').write((2).to_bytes(8, 'little') + b'[]')",
            "torch.save(state, path)",
            "os.remove(path), os.symlink('nowhere', path)",
        ],
    )
    path = f"after: path = os.path.join(directory, {name!r})"
    # A file that has no tensor is right in itself: what is missing is missing in the directory.
    named = () if "b'{}')" in line else (name,)
    return Damage(saved=(path, f"after: _ = {line}"), file=named)


# Checks


def damaged_call(case: QwenCase, damage: Damage, device: str) -> LoaderCall:
    """The call that loads the damaged directory, for a drawn rank."""
    options = dict(damage.options)
    call = loader_call(case, *damage.edits, saved=damage.saved, device=device, **options)
    return call if "ranks" in options else call.of_rank(drawn_rank(case))


def outcome(weight_loader: Subject, call: LoaderCall) -> Exception | Mapping[str, Tensor]:
    """The exception with which a directory is refused, or what was loaded."""
    arguments, options = call.values()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return weight_loader(*arguments, **options)
    except (ConformanceFailure, Declined) as failure:
        raised = isinstance(failure, Declined) or failure.kind.startswith("raised ")
        if not raised or not isinstance(failure.__cause__, Exception):
            failure.call = getattr(failure, "call", None) or call
            raise
        return failure.__cause__


_loads: WeakKeyDictionary[Subject, set[tuple[Any, ...]]] = WeakKeyDictionary()


def must_load_undamaged(weight_loader: Subject, case: QwenCase) -> None:
    """Refusing everything proves nothing: a directory like this one loads on as many ranks."""
    known = _loads.setdefault(weight_loader, set())
    kind = (case.ranks, case.files > 1, case.tied)
    if kind not in known:
        call = loader_call(case, device=weight_loader.device)
        load(weight_loader, call.of_rank(drawn_rank(case)))
        known.add(kind)


def refused(
    weight_loader: Subject, case: QwenCase, damager: Damager
) -> tuple[Exception, LoaderCall]:
    """The exception with which the damaged directory is refused; fails where it is not."""
    must_load_undamaged(weight_loader, case)
    call = damaged_call(case, damager(case), weight_loader.device)
    folder = Path(call.named("directory"))
    before, here = contents(folder), set(os.listdir())
    result = outcome(weight_loader, call)
    counted()
    if contents(folder) != before or set(os.listdir()) != here:
        raise ConformanceFailure("half written", "refusing a directory changed files", call=call)
    if not isinstance(result, Exception):
        what = " ".join(damager.__doc__.split())
        shown = "print({name: tuple(t.shape) for name, t in out.items()})"
        raise ConformanceFailure(
            "accepted", f"the directory is loaded although: {what}", call=call, shown_by=shown
        )
    return result, call


def assert_refused(
    weight_loader: Subject, case: QwenCase, damager: Damager, *, kinds: int = 1
) -> None:
    """The damaged directory raises an exception, and nothing is written.

    ``kinds``: how many of the damager's choices are tried, from the drawn one on.
    """
    for further in range(kinds):
        numbers = case.drawn | {"which": case.drawn["which"] + further}
        refused(weight_loader, replace(case, extra=tuple(numbers.items())), damager)


def assert_not_finite_refused(weight_loader: Subject, case: QwenCase) -> None:
    """Some rank refuses a value that is not finite, and no rank gives it."""
    must_load_undamaged(weight_loader, case)
    damage = not_finite(case)
    call = loader_call(case, *damage.edits, device=weight_loader.device)
    counted()
    refusing = 0
    for rank in range(case.ranks):
        result = outcome(weight_loader, call.of_rank(rank))
        refusing += isinstance(result, Exception)
        for name, tensor in {} if isinstance(result, Exception) else result.items():
            if not bool(torch.isfinite(tensor.detach()).all()):
                summary = f"{name} is loaded with a value that is not finite"
                shown = f"print(out[{name!r}].isfinite().all())"
                raise ConformanceFailure(
                    "accepted", summary, call=call.of_rank(rank), shown_by=shown
                )
    if not refusing:
        summary = f"every rank loads although {damage.named[0]} holds a value that is not finite"
        shown = f"print(state[{damage.named[0]!r}].isfinite().all(), len(out))"
        raise ConformanceFailure("accepted", summary, call=call.of_rank(0), shown_by=shown)


def drawn_damager(case: QwenCase) -> Damager:
    """A kind of damage, by the case's drawn number, that a directory of so many files can have."""
    of_index = ("missing_file", "unindexed_tensor", "indexed_tensor_missing", "indexed_elsewhere")
    of_index += ("in_two_files", "outside_the_directory", "bad_index")
    names = [name for name in DAMAGES if case.files > 1 or name not in of_index]
    names = [name for name in names if name != "not_finite" or case.ranks == 1]
    return DAMAGES[names[case.drawn["kind"] % len(names)]]


# Errors


def refusal(
    weight_loader: Subject, case: QwenCase, damager: Damager
) -> tuple[Exception, LoaderCall]:
    """The exception with which the directory is refused; that it is one is for other rules."""
    try:
        return refused(weight_loader, case, damager)
    except ConformanceFailure as failure:
        if failure.kind == "accepted":
            raise Inconclusive("the directory was not refused") from failure
        raise


def assert_names_file(weight_loader: Subject, case: QwenCase) -> None:
    """The error names the file that is to blame, or the directory where it is none in particular."""
    damager = drawn_damager(case)
    error, call = refusal(weight_loader, case, damager)
    directory = Path(call.named("directory"))
    named = damager(case).file or (
        directory.name,
        "config.json",
        INDEX,
        *(path.name for path in directory.iterdir()),
    )
    assert_said(error, named, "the file", call)


def assert_names_tensor(weight_loader: Subject, case: QwenCase) -> None:
    """The error names the tensor that is to blame, where there is one."""
    damager = drawn_damager(case)
    error, call = refusal(weight_loader, case, damager)
    named = damager(case).named
    if named:
        assert_said(error, named, "the tensor", call)


def assert_said(error: Exception, names: tuple[str, ...], what: str, call: LoaderCall) -> None:
    """Fail unless the error's text holds one of the names."""
    if not any(name in str(error) for name in names):
        listed = " or ".join(names[:4])
        summary = f"{type(error).__name__} does not name {what} ({listed}): {str(error)[:200]}"
        raise ConformanceFailure("unclear error", summary, call=call)


def assert_deliberate(weight_loader: Subject, case: QwenCase) -> None:
    """The error is not one that happens on the way."""
    error, call = refusal(weight_loader, case, drawn_damager(case))
    if type(error) in (*ACCIDENTS, StopIteration):
        summary = f"refused by accident: {type(error).__name__}: {str(error)[:200]}"
        raise ConformanceFailure("accidental error", summary, call=call)


# Ranks


def assert_ranks_refused(
    weight_loader: Subject, case: QwenCase, rank: int, ranks: int, *sizes: int
) -> None:
    """A number of ranks that does not fit raises; with ``sizes`` the error names one of them."""
    must_load_undamaged(weight_loader, case)
    call = loader_call(case, device=weight_loader.device, rank=str(rank), ranks=str(ranks))
    result = outcome(weight_loader, call)
    counted()
    if not isinstance(result, Exception):
        summary = f"rank {rank} of {ranks} is loaded"
        shown = "print({name: tuple(t.shape) for name, t in out.items()})"
        raise ConformanceFailure("accepted", summary, call=call, shown_by=shown)
    if sizes and not set(map(str, sizes)) & set(re.findall(r"\d+", str(result))):
        listed = " or ".join(map(str, sizes))
        summary = f"{type(result).__name__} does not name the size ({listed}): {str(result)[:200]}"
        raise ConformanceFailure("unclear error", summary, call=call)


def assert_uneven_heads(weight_loader: Subject, case: QwenCase) -> None:
    """Ranks that divide the inner width and not the query heads are refused."""
    wrong = [n for n in range(2, 25) if case.heads % n and case.intermediate % n == 0]
    ranks = picked(case, wrong)
    assert_ranks_refused(weight_loader, case, case.seed % ranks, ranks)


def assert_uneven_kv_heads(weight_loader: Subject, case: QwenCase) -> None:
    """Ranks that divide the query heads and fit the key/value heads in no way are refused."""
    ranks = case.drawn["wrong"]
    assert_ranks_refused(weight_loader, case, case.seed % ranks, ranks)


def assert_sizes_named(weight_loader: Subject, case: QwenCase) -> None:
    """The error names the heads, or their width, that the ranks do not fit."""
    kv_heads, ranks = case.kv_heads, case.drawn["wrong"]
    sizes = (kv_heads, kv_heads * case.head_dim)
    if case.drawn["which"] % 2:
        ranks = next(n for n in range(5, 99) if case.heads % n and case.intermediate % n == 0)
        sizes = (case.heads, case.heads * case.head_dim)
    assert_ranks_refused(weight_loader, case, case.seed % ranks, ranks, *sizes)


def assert_out_of_range(weight_loader: Subject, case: QwenCase) -> None:
    """No rank but those from 0 to below the number of ranks, of which there is at least one."""
    n = case.ranks
    rank, ranks = picked(case, [(n, n), (n + 1, n), (-1, n), (-n, n), (0, 0), (0, -1), (-1, -n)])
    assert_ranks_refused(weight_loader, case, rank, ranks)


# Damaged bytes by the hundred

FILES_OF_A_CASE = 24


def assert_damaged_bytes_refused(weight_loader: Subject, case: QwenCase) -> None:
    """Every file with damaged bytes is refused, or loads as if it were whole."""
    call = loader_call(case, device=weight_loader.device)
    numbers = random.Random(case.seed * 1009 + case.drawn["which"])
    with directory_restored(call) as directory:
        whole = load(weight_loader, call)
        files = sorted(directory.glob("*.safetensors"))
        for _ in range(FILES_OF_A_CASE):
            path = numbers.choice(files)
            data = path.read_bytes()
            line = byte_damage(numbers, data)
            path.write_bytes(damaged(data, line))
            result = outcome(weight_loader, call)
            path.write_bytes(data)
            counted()
            if not isinstance(result, Exception) and not same(result, whole):
                lines = (bytes_read(path.name), line, WRITE)
                summary = f"a damaged {path.name} ({line}) is loaded as other weights"
                lines = [each.removeprefix("after: ") for each in lines]
                shown = "print({name: tuple(t.shape) for name, t in out.items()})"
                raise ConformanceFailure(
                    "accepted", summary, call=call.then(*lines), shown_by=shown
                )


def byte_damage(numbers: random.Random, data: bytes) -> str:
    """Python that damages ``data``, a safetensors file: its header, its length, or where it ends."""
    header = 8 + int.from_bytes(data[:8], "little")
    at, place = numbers.randrange(header), numbers.randrange(len(data))
    size = numbers.choice([1, 2, 7, 64, 512])
    end = min(at + size, header)
    return numbers.choice(
        [
            f"data[{at}] ^= {1 << numbers.randrange(8)}",
            f"data[{at}] ^= {1 << numbers.randrange(8)}",
            f"data[{at}] = {numbers.randrange(256)}",
            f"data[{at}:{end}] = bytes({end - at})",
            f"del data[{place}:]",
            f"del data[{place}:]",
            f"data += b'#' * {size}",
            f"del data[{place}:{place + size}]",
            f"data[{place}:{place}] = data[{place}:{place + size}]",
        ]
    )


def damaged(data: bytes, line: str) -> bytes:
    """The bytes after a line that damages them."""
    changed = bytearray(data)
    exec(line, {"data": changed})
    return bytes(changed)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two results have the same names and bits."""
    return set(one) == set(other) and all(bitwise_equal(one[k], other[k]) for k in other)
