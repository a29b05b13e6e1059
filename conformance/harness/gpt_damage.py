"""Checkpoints that must be refused, and the checks that they are.

Each kind of damage is a function of a case that gives the lines of Python that do it. Undamaged
checkpoints of the same format and container must load, so that refusing everything proves nothing.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.failures import ConformanceFailure, Declined
from conformance.harness.file_calls import (
    NOT_CHANGED,
    NOT_EXECUTED,
    code_executed,
    files_changed,
    rewritten,
)
from conformance.harness.gpt_cases import GPTCall, GPTCase, extras, gpt_cases
from conformance.harness.gpt_checks import fused
from conformance.harness.gpt_honesty import contents, counted
from conformance.harness.gpt_subject import FACTS, has_methods, load, open_reader
from conformance.harness.subject import Subject, bitwise_equal, errors_named
from reference_impl.gpt.config import attention_shapes, head_key, mlp_shapes, state_shapes


@dataclass(frozen=True)
class Damage:
    """What is wrong with a checkpoint."""

    edits: tuple[str, ...] = ()
    """Lines that change ``state`` before it is saved."""
    saved: tuple[str, ...] = ()
    """Lines that change ``saved``, or, after ``after: ``, the file."""
    named: tuple[str, ...] = ()
    """What a good error names: one of these; nothing when no tensor is to blame."""
    options: Mapping[str, str | None] = field(default_factory=dict)
    """Options of the call as source text; None takes one away."""


Damager = Callable[[GPTCase], Damage]

DAMAGES: dict[str, Damager] = {}


def damage(damager: Damager) -> Damager:
    """Register a kind of damage under its name."""
    DAMAGES[damager.__name__] = damager
    return damager


def damage_cases(**fixed: Any) -> SearchStrategy[GPTCase]:
    """Small cases with the numbers that a kind of damage draws."""
    small = {"layers": st.sampled_from([8, 12]), "wrapped": "", "batch": 2, "tokens": 5}
    numbers = extras(
        which=st.integers(0, 1000), place=st.integers(0, 10**6), kind=st.integers(0, 1000)
    )
    heads = {"heads": st.sampled_from([2, 3]), "head_dim": 8}
    return gpt_cases(**(small | heads | {"extra": numbers} | fixed))


def keys_of(case: GPTCase) -> list[str]:
    """The names of every tensor."""
    return list(state_shapes(case.config()))


def picked(case: GPTCase, choices: list[Any]) -> Any:
    """One of the choices, by the case's drawn number."""
    return choices[case.drawn["which"] % len(choices)]


def placed(case: GPTCase, size: int) -> int:
    """A place below ``size``, by the case's drawn number."""
    return case.drawn["place"] % size


def one_of_each_kind(case: GPTCase) -> list[str]:
    """The names of the head, an embedding, the scalars …, with the blocks' of one drawn block."""
    layer, table = placed(case, 6), placed(case, 3)
    blocks = block_keys(case, layer)
    return [
        "scalars",
        *blocks,
        "embed.weight",
        f"value_embeds.{table}.weight",
        head_key(case.format),
    ]


def other_format(case: GPTCase) -> str:
    """The format that the case has not."""
    return "medium" if case.format == "small" else "small"


def block_keys(case: GPTCase, layer: int) -> list[str]:
    """The names of one block."""
    return [key for key in keys_of(case) if key.startswith(f"blocks.{layer}.")]


def without(keys: list[str]) -> str:
    """A line that takes tensors out."""
    return f"state = {{k: t for k, t in state.items() if k not in {keys}}}"


# The dictionary


@damage
def no_model_entry(case: GPTCase) -> Damage:
    """A training dictionary whose state dictionary has another name, or none, or is empty."""
    content = picked(case, ["{'step': 3, 'weights': saved}", "{'step': 3}", "{}", "{'model': {}}"])
    return Damage(saved=(f"after: torch.save({content}, source)",), named=("model",))


@damage
def not_a_state(case: GPTCase) -> Damage:
    """What should be the state dictionary is something else."""
    content, named = picked(
        case,
        [
            ("{'model': list(saved.values())}", "model"),
            ("{'model': 7}", "model"),
            ("{'model': saved['embed.weight']}", "model"),
            ("{'model': saved | {'embed.weight': [1.0, 2.0]}}", "embed.weight"),
            ("{'model': saved | {'scalars': None}}", "scalars"),
        ],
    )
    return Damage(saved=(f"after: torch.save({content}, source)",), named=(named,))


# Names


@damage
def missing_tensor(case: GPTCase) -> Damage:
    """One tensor is missing."""
    key = picked(case, one_of_each_kind(case))
    return Damage((f"del state[{key!r}]",), named=(key,))


@damage
def left_over_tensor(case: GPTCase) -> Damage:
    """There is a tensor that no part of the model takes."""
    last = case.layers - 1
    names = ["blocks.0.attn.q_norm.weight", f"blocks.{last}.mlp.bias", "lm_head.bias", "wpe.weight"]
    key = picked(case, [*names, "value_embeds.3.weight", "blocks.0.attn.lora_A", "embed.weight_g"])
    return Damage((f"state[{key!r}] = r(4, {case.width})",), named=(key,))


@damage
def mixed_formats(case: GPTCase) -> Damage:
    """One block, or the head, is of the other format; or both heads are there."""
    other, layer = other_format(case), placed(case, 6)
    mlp = dict(zip(mlp_shapes(case.format, 1), mlp_shapes(other, 1)))
    renamed = [
        f"state['blocks.{layer}.{there}'] = state.pop('blocks.{layer}.{here}')"
        for here, there in mlp.items()
    ]
    here, there = head_key(case.format), head_key(other)
    edits = picked(
        case,
        [
            renamed,
            [f"state[{there!r}] = state.pop({here!r})"],
            [f"state[{there!r}] = state[{here!r}].clone()"],
        ],
    )
    named = (f"blocks.{layer}.", here, there)
    return Damage(tuple(edits), named=named)


@damage
def gap_in_blocks(case: GPTCase) -> Damage:
    """A block in the middle is missing, so that a walk over the blocks ends early."""
    layer = 1 + placed(case, case.layers - 2)
    return Damage((without(block_keys(case, layer)),), named=(f"blocks.{layer}",))


@damage
def odd_or_few_blocks(case: GPTCase) -> Damage:
    """An odd number of blocks, or too few for the value embeddings."""
    kept = picked(case, [case.layers - 1, 4, 2, case.layers - 3])
    gone = [key for layer in range(kept, case.layers) for key in block_keys(case, layer)]
    scalars = f"state['scalars'] = state['scalars'][:{5 * kept}]"
    return Damage((without(gone), scalars), named=("blocks", "layers"))


@damage
def attention_elsewhere(case: GPTCase) -> Damage:
    """A block other than the eighth has no attention, or the eighth has."""
    shapes = attention_shapes(case.format, case.width)
    layer = placed(case, 6)
    gone = [f"blocks.{layer}.{name}" for name in shapes]
    extra = [f"state['blocks.7.{name}'] = w{shape}" for name, shape in shapes.items()]
    edits, named = picked(case, [((without(gone),), gone[0]), (tuple(extra), "blocks.7.attn")])
    return Damage(
        edits, named=(named, f"blocks.{layer}.attn" if edits[0] == without(gone) else named)
    )


@damage
def stored_twice(case: GPTCase) -> Damage:
    """Two names are the same once prefixes are off, with different values."""
    key = picked(case, keys_of(case))
    prefix = ("_orig_mod.", "module.", "module._orig_mod.")[placed(case, 3)]
    line = f"saved[{prefix + key!r}] = saved[{key!r}] + 1"
    return Damage(saved=(line,), named=(key,))


@damage
def half_wrapped_name(case: GPTCase) -> Damage:
    """A part of a name merely contains that of a wrapper; taking it out would make the name good."""
    bad = picked(
        case,
        [
            "em_orig_mod.bed.weight",
            "embed_orig_mod.weight",
            "embed.module_weight",
            "submodule.embed.weight",
            "emodule.mbed.weight",
        ],
    )
    return Damage((f"state[{bad!r}] = state.pop('embed.weight')",), named=(bad, "embed.weight"))


# Shapes


@damage
def misshapen_tensor(case: GPTCase) -> Damage:
    """One tensor has a shape that does not fit the others, or not the format."""
    layer, weight = placed(case, 6), fused(case)
    up, down = mlp_shapes(case.format, case.width)
    attention, head = f"blocks.{layer}.{weight}", head_key(case.format)
    slots = 4 if case.format == "small" else 3
    changes = [
        (f"value_embeds.{placed(case, 3)}.weight", "t[:-1].clone()"),
        (f"value_embeds.{placed(case, 3)}.weight", "t[:, :-4].clone()"),
        (f"blocks.{layer}.{up}", "t[:-4].clone()"),
        (f"blocks.{layer}.{down}", "torch.cat([t, t[:, :8]], 1)"),
        (attention, "t.flatten(0, 1)"),
        (attention, f"torch.cat([t, t])[:{slots}].clone()"),
        (attention, "t[None]"),
        (head, "t[:, :-4].clone()"),
        ("embed.weight", "t.flatten()"),
        ("embed.weight", "t[:0].clone()"),
    ]
    key, change = picked(case, changes)
    # With other embeddings every tensor of the model's width is the wrong one.
    named = (key,) if not key.startswith("embed") else ()
    return Damage((f"t = state[{key!r}]", f"state[{key!r}] = {change}"), named=named)


@damage
def transposed_tensor(case: GPTCase) -> Damage:
    """A matrix is stored as its transpose, as GPT-2's own checkpoints have some."""
    layer = placed(case, 6)
    matrices = [f"blocks.{layer}.{name}" for name in mlp_shapes(case.format, case.width)]
    matrices += [head_key(case.format), f"value_embeds.{placed(case, 3)}.weight"]
    key = picked(case, matrices)
    return Damage((f"state[{key!r}] = state[{key!r}].t().contiguous()",), named=(key,))


@damage
def short_head(case: GPTCase) -> Damage:
    """The LM head has fewer rows than the embeddings: some tokens could never be told."""
    head, rows = head_key(case.format), 1 + placed(case, case.vocab - 1)
    line = f"state[{head!r}] = state[{head!r}][:{rows}].clone()"
    return Damage((line,), named=(head,))


@damage
def narrow_heads(case: GPTCase) -> Damage:
    """All heads together are not as wide as the model: value embeddings cannot be added."""
    edits, narrow = [], case.width - (case.head_dim or 128)
    for layer in range(case.layers):
        if layer != 7:
            key = f"blocks.{layer}.{fused(case)}"
            edits.append(f"state[{key!r}] = state[{key!r}][:, :{narrow}].clone()")
            if case.format == "small":
                key = f"blocks.{layer}.attn.c_proj.weight"
                edits.append(f"state[{key!r}] = state[{key!r}][:, :{narrow}].clone()")
    return Damage(tuple(edits), named=(fused(case), "attn"))


@damage
def uneven_heads(case: GPTCase) -> Damage:
    """The head width that is given does not divide the width of the model."""
    given = picked(case, [case.width - 4, case.width * 2, 20 if case.width % 20 else 28, 0, -8])
    return Damage(options={"head_dim": str(given)})


@damage
def unknown_head_width(case: GPTCase) -> Damage:
    """A medium checkpoint of a depth that its script has not: 128 would only be a guess."""
    return Damage(options={"head_dim": None})


@damage
def short_scalars(case: GPTCase) -> Damage:
    """Scalars for fewer blocks than there are, or not in one dimension."""
    needed = 5 * case.layers
    change = picked(
        case,
        [
            f"t[:{needed - 1}].clone()",
            f"t[:{needed - 5 * (1 + placed(case, case.layers - 1))}].clone()",
            f"t[:{needed}].reshape(5, -1)",
            f"t[:{needed}].reshape(-1, 1)",
            f"t[:{needed}].reshape(1, -1)",
            "t[0].clone()",
            "t[:0].clone()",
        ],
    )
    return Damage(("t = state['scalars']", f"state['scalars'] = {change}"), named=("scalars",))


# Values


@damage
def not_finite(case: GPTCase) -> Damage:
    """One element is NaN or infinite."""
    key = picked(case, one_of_each_kind(case))
    value = ("nan", "inf", "-inf")[placed(case, 3)]
    line = f"state[{key!r}].view(-1)[{placed(case, 40)}] = float({value!r})"
    return Damage((line,), named=(key,))


@damage
def not_floating(case: GPTCase) -> Damage:
    """A tensor of integers or booleans."""
    key = picked(case, keys_of(case))
    dtype = ("int64", "int8", "uint8", "bool", "int32")[placed(case, 5)]
    line = f"state[{key!r}] = (100 * state[{key!r}]).to(torch.{dtype})"
    return Damage((line,), named=(key,))


@damage
def quantised(case: GPTCase) -> Damage:
    """8-bit weights whose scale is in a tensor of its own, which the model knows nothing of."""
    layer, name = placed(case, 6), picked(case, list(mlp_shapes(case.format, 1)))
    key = f"blocks.{layer}.{name}"
    lines = (
        f"scale = state[{key!r}].abs().max() / 448",
        f"state[{key!r}] = (state[{key!r}] / scale).to(torch.float8_e4m3fn)",
        f"state[{key + '_scale_inv'!r}] = scale",
    )
    return Damage(lines, named=(key,))


# Bytes

READ = "after: data = bytearray(open(source, 'rb').read())"
WRITE = "after: open(source, 'wb').write(data) and None"


@damage
def truncated(case: GPTCase) -> Damage:
    """The file ends too early: within the header, a tensor, the index, or one byte before the end."""
    lengths = ["0", "1", "4", "8", "9", "64", "len(data) // 2", "len(data) - 1", "len(data) - 22"]
    lengths += ["len(data) - 23", "len(data) - 100"]
    lengths += [f"len(data) * {placed(case, 1000)} // 1000"] * len(lengths)
    return Damage(saved=(READ, f"after: del data[{picked(case, lengths)}:]", WRITE))


def bytes_of(key: str) -> str:
    """The bytes of a saved tensor, as Python."""
    return f"saved[{key!r}].contiguous().view(-1).view(torch.uint8).numpy().tobytes()"


@damage
def flipped_byte(case: GPTCase) -> Damage:
    """One bit of one tensor of an archive is not what was written."""
    key = picked(case, keys_of(case))
    flip = f"after: data[data.find({bytes_of(key)}) + {placed(case, 64)}] ^= {1 << case.seed % 8}"
    return Damage(saved=(READ, flip, WRITE), named=(key,))


@damage
def swapped_records(case: GPTCase) -> Damage:
    """The bytes of two tensors of one shape are exchanged within an archive."""
    keys = [key for key in keys_of(case) if key.startswith("blocks.")]
    shapes = state_shapes(case.config())
    one = picked(case, keys)
    same = [key for key in keys if shapes[key] == shapes[one] and key != one]
    other = same[placed(case, len(same))]
    lines = (
        READ,
        f"after: a, b = {bytes_of(one)}, {bytes_of(other)}",
        "after: i, j = data.find(a), data.find(b)",
        "after: data[i : i + len(a)], data[j : j + len(b)] = b, a",
        WRITE,
    )
    return Damage(saved=lines, named=(one, other))


@damage
def pickled_code(case: GPTCase) -> Damage:
    """A pickle that would create a file if it were executed."""
    evil = "type('Evil', (), {'__reduce__': lambda self: (open, (source + '.executed', 'w'))})()"
    content = picked(
        case,
        [
            f"{{'model': saved, 'code': {evil}}}",
            f"{{'model': saved, 'optimizers': [{evil}]}}",
            f"{{'model': saved | {{'extra': {evil}}}}}",
            f"{evil}",
        ],
    )
    return Damage(saved=(f"after: torch.save({content}, source)",))


@damage
def other_files(case: GPTCase) -> Damage:
    """The path is that of something else, or of nothing."""
    text = "open(source, 'w').write({!r}) and None"
    lines = [
        "os.remove(source)",
        "os.remove(source), os.mkdir(source)",
        text.format("<html><body>404 Not Found</body></html>"),
        text.format("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 132"),
        text.format('{"model_type": "gpt2", "n_layer": 12}'),
        "open(source, 'wb').write(bytes(4096)) and None",
        "open(source, 'wb').write(b'PK\\x05\\x06' + bytes(18)) and None",
        "open(source, 'wb').write(__import__('pickle').dumps({'model': {}})) and None",
    ]
    return Damage(saved=(f"after: {picked(case, lines)}",))


# Checks


def damaged_call(case: GPTCase, damage: Damage, device: str) -> GPTCall:
    """The call that opens the damaged checkpoint."""
    given = {name: text for name, text in damage.options.items() if text is not None}
    call = case.call(*damage.edits, device=device, saved=damage.saved, **given)
    taken = [name for name, text in damage.options.items() if text is None]
    return replace(call.without(*taken), done=".load()")


def refusal(gpt_checkpoint: Subject, call: GPTCall) -> Exception | None:
    """The exception with which the checkpoint is refused, at any of the three steps; None if not."""
    try:
        reader = open_reader(gpt_checkpoint, call)
        with errors_named("inspect()"):
            reader.inspect()
        with errors_named("load()"):
            model = reader.load()
    except (ConformanceFailure, Declined) as failure:
        raised = isinstance(failure, Declined) or failure.kind.startswith("raised ")
        if not raised or not isinstance(failure.__cause__, Exception):
            failure.call = getattr(failure, "call", None) or call
            raise
        return failure.__cause__
    has_methods(model, ("features", "logits"), "load()", call)
    return None


_loads: WeakKeyDictionary[Subject, set[tuple[str, str]]] = WeakKeyDictionary()


def must_load_undamaged(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Refusing everything proves nothing: a checkpoint of this format and container loads."""
    known = _loads.setdefault(gpt_checkpoint, set())
    if (case.format, case.container) not in known:
        load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
        known.add((case.format, case.container))


def refused(gpt_checkpoint: Subject, case: GPTCase, damager: Damager) -> tuple[Exception, GPTCall]:
    """The exception with which the damaged checkpoint is refused; fails where it is not."""
    must_load_undamaged(gpt_checkpoint, case)
    damage = damager(case)
    call = damaged_call(case, damage, gpt_checkpoint.device)
    folder = Path(call.namespace()["folder"].name)
    before, here = contents(folder), set(os.listdir())
    error = refusal(gpt_checkpoint, call)
    counted()
    after = contents(folder)
    executed = folder / (Path(call.named("source")).name + ".executed")
    if executed.exists():
        executed.unlink()
        raise ConformanceFailure(
            "executed code",
            "the pickle of the file was executed",
            call=code_executed(call, *steps(call)),
            shown_by=NOT_EXECUTED,
        )
    if after != before or set(os.listdir()) != here:
        raise ConformanceFailure(
            "half written",
            "a refused checkpoint changed files",
            call=files_changed(call, *steps(call)),
            shown_by=NOT_CHANGED,
        )
    if error is None:
        what = " ".join(damager.__doc__.split())
        raise ConformanceFailure(
            "accepted", f"the checkpoint is loaded although: {what}", call=call
        )
    return error, call


def steps(call: GPTCall) -> tuple[str, str]:
    """The steps of taking a checkpoint in, each as Python."""
    return replace(call, done=".inspect()").source(), replace(call, done=".load()").source()


def assert_refused(
    gpt_checkpoint: Subject, case: GPTCase, damager: Damager, *, kinds: int = 1
) -> None:
    """The damaged checkpoint raises an exception, nothing is written, and no code is executed.

    ``kinds``: how many of the damager's choices are tried, from the drawn one on.
    """
    for further in range(kinds):
        numbers = case.drawn | {"which": case.drawn["which"] + further}
        refused(gpt_checkpoint, replace(case, extra=tuple(numbers.items())), damager)


def assert_names_file(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """The error's text holds the name of the file."""
    error, call = refused(gpt_checkpoint, case, drawn_damager(case))
    assert_said(error, (Path(call.named("source")).name,), "the file", call)


def assert_names_tensor(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """The error's text holds the name of the tensor that is to blame."""
    error, call = refused(gpt_checkpoint, case, drawn_damager(case))
    named = drawn_damager(case)(case).named
    if named:
        assert_said(error, named, "the tensor", call)


def assert_said(error: Exception, names: tuple[str, ...], what: str, call: GPTCall) -> None:
    """Fail unless the error's text holds one of the names."""
    if not any(name in str(error) for name in names):
        raise ConformanceFailure(
            "unclear error",
            f"{type(error).__name__} does not name {what} ({' or '.join(names)}): {str(error)[:200]}",
            call=call,
        )


ACCIDENTS = (
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    AssertionError,
    UnboundLocalError,
    ZeroDivisionError,
    RecursionError,
    MemoryError,
    Exception,
)
"""Types of exceptions that nobody raises to say that a checkpoint is bad. A subclass is deliberate."""


def assert_deliberate(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """The error is of a type that means bad input, not of one that means a mistake in the loader."""
    error, call = refused(gpt_checkpoint, case, drawn_damager(case))
    if type(error) in ACCIDENTS:
        summary = f"refused by accident: {type(error).__name__}: {str(error)[:200]}"
        raise ConformanceFailure("accidental error", summary, call=call)


# Damaged files by the hundred

FILES_OF_A_CASE = 42
"""With the gate's 12 cases 504 files, with the 500 of nightly 21,000."""


def byte_damages(random: random.Random, data: bytes, header: int) -> tuple[str, bytes]:
    """One kind of damage to the bytes of a file, in words, and the damaged bytes.

    Values are changed before ``header`` only; what changes the length may be anywhere.
    """
    at = random.randrange(header)
    place = random.randrange(len(data))
    size = random.choice([1, 2, 7, 64, 512])
    kind = random.choice(
        ["bit", "bit", "byte", "byte", "zeros", "exchange", "cut", "cut", "tail", "gone", "twice"]
    )
    changed = bytearray(data)
    if kind == "bit":
        changed[at] ^= 1 << random.randrange(8)
    elif kind == "byte":
        changed[at] = random.randrange(256)
    elif kind == "zeros":
        end = min(at + size, header)
        changed[at:end] = bytes(end - at)
    elif kind == "exchange":
        other = random.randrange(header)
        changed[at], changed[other] = changed[other], changed[at]
    elif kind == "cut":
        del changed[place:]
    elif kind == "tail":
        changed += random.randbytes(size)
    elif kind == "gone":
        del changed[place : place + size]
    else:
        changed[place:place] = data[place : place + size]
    return f"{kind} at {at if kind in ('bit', 'byte', 'zeros', 'exchange') else place}", bytes(
        changed
    )


def assert_damaged_files_refused(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Every damaged file is refused, or loads as if it were whole because no used byte changed."""
    call = case.call(device=gpt_checkpoint.device)
    source = Path(call.named("source"))
    data = source.read_bytes()
    whole = observed(gpt_checkpoint, call)
    # safetensors keeps no checksum of tensors: a changed value cannot be told from another weight.
    safe = case.container == "safetensors"
    header = 8 + int.from_bytes(data[:8], "little") if safe else len(data)
    numbers = random.Random(case.seed * 1009 + case.drawn["which"])
    try:
        for _ in range(FILES_OF_A_CASE):
            what, damaged = byte_damages(numbers, data, header)
            if damaged == data:
                continue
            source.write_bytes(damaged)
            error = refusal(gpt_checkpoint, call)
            if error is None and not same(observed(gpt_checkpoint, call), whole):
                done = replace(call, done=".load().logits(ids)")
                undamaged = f"whole = {done.source()}"
                done = done.then(undamaged, *rewritten(data, damaged))
                summary = f"a damaged file ({what}) is loaded as another model"
                equal = (
                    "print('as the whole file:', torch.equal(out, whole), '- expected an error')"
                )
                raise ConformanceFailure("accepted", summary, call=done, shown_by=equal)
            counted()
    finally:
        source.write_bytes(data)


def observed(gpt_checkpoint: Subject, call: GPTCall) -> tuple[dict[str, Any], Any]:
    """What is told of a checkpoint, and its logits."""
    reader = open_reader(gpt_checkpoint, call)
    with errors_named("inspect()"):
        facts = {name: value for name, value in reader.inspect().items() if name in FACTS}
    return facts, load(gpt_checkpoint, call).logits()


def same(one: tuple[dict[str, Any], Any], other: tuple[dict[str, Any], Any]) -> bool:
    """Whether two observations are the same, bit for bit."""
    return one[0] == other[0] and bitwise_equal(one[1], other[1])


BLAMELESS = ("truncated", "other_files", "pickled_code", "uneven_heads", "unknown_head_width")
"""Kinds of damage for which there is no tensor to name."""
NAMED = tuple(name for name in DAMAGES if name not in BLAMELESS)


def drawn_damager(case: GPTCase) -> Damager:
    """A kind of damage that is a tensor's fault, by the case's drawn number."""
    return DAMAGES[NAMED[case.drawn["kind"] % len(NAMED)]]
