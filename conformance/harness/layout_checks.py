"""Checks of flat layouts: positions, padding, shards of values, shards from shards, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call, dtype_name
from conformance.harness.failures import ConformanceFailure, Declined, failing_at
from conformance.harness.layout_cases import PAD_TO, LayoutCase
from conformance.harness.layout_oracle import SHARDS_OF, Intervals, Truth, truth
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, changes_caught, errors_named, reject_alias

OPTIONAL = ("range_of_parameter", "cut", "join", "reshard")
"""Methods of a layout that may be missing."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""To compare bits, by bytes of an element."""


# Asking a layout


def laid_out(flat_layout: Subject, call: Call) -> Any:
    """The layout that a call makes."""
    arguments, options = call.values()
    with failing_at(call):
        return flat_layout(*own(arguments), **options)


def own(arguments: Sequence[Any]) -> list[Any]:
    """The arguments with mappings of their own, from which an implementation may take things."""
    return [dict(given) if isinstance(given, Mapping) else given for given in arguments]


def ask(layout: Any, name: str, *arguments: Any, call: Call, shown_by: str | None = None) -> Any:
    """What a method of the layout gives; declined where it may be missing and is.

    ``shown_by`` is the line that makes the same call, where the arguments are not plain.
    """
    if name in OPTIONAL and getattr(layout, name, None) is None:
        raise Declined(f"the layout has no method {name}")
    tensors = [x for given in arguments if isinstance(given, Mapping) for x in given.values()]
    try:
        with failing_at(call), changes_caught(tensors), errors_named(f"{name}()"):
            return getattr(layout, name)(*own(arguments))
    except ConformanceFailure as failure:
        plain = f"print(out.{name}({', '.join(map(repr, arguments))}))"
        failure.shown_by = shown_by or plain
        if failure.kind == "changed input":
            given = "shards" if "shards" in failure.shown_by else "values"
            failure.shown_by += f"; print({given}, 'expected: not changed')"
        raise


def shard_size(layout: Any, call: Call) -> int:
    """Elements of a shard."""
    with failing_at(call), errors_named("shard_size"):
        return int(layout.shard_size)


def table(layout: Any, call: Call) -> dict[str, tuple[int, int]]:
    """Begin and end of each parameter in the buffer, as plain numbers."""
    found = ask(layout, "table", call=call)
    with failing_at(call), errors_named("table()"):
        return {str(name): (int(begin), int(end)) for name, (begin, end) in found.items()}


def pad(layout: Any, rank: int, call: Call) -> int:
    """Elements of padding of a rank."""
    found = ask(layout, "shard_pad", rank, call=call)
    with failing_at(call), errors_named("shard_pad()"):
        return int(found)


def interval(layout: Any, method: str, name: str, rank: int, call: Call) -> tuple[int, int]:
    """What ``range_in_shard`` or ``range_of_parameter`` gives, as plain numbers."""
    found = ask(layout, method, name, rank, call=call)
    with failing_at(call), errors_named(f"{method}()"):
        begin, end = found
        return int(begin), int(end)


def expect(found: object, expected: object, what: str, call: Call, shown_by: str) -> None:
    """Fail unless a number, or an interval, is the expected one."""
    current_tally().comparisons["exact"] += 1
    if found != expected:
        summary = f"{what} is {found}, expected {expected}"
        shown = f"print({shown_by}, 'expected', {expected!r})"
        raise ConformanceFailure("wrong position", summary, call=call, shown_by=shown)


# The buffer


def assert_order(flat_layout: Subject, case: LayoutCase) -> None:
    """The table has the parameters in the order of the buffer."""
    call, right = case.call(), truth(case)
    found = list(table(laid_out(flat_layout, call), call))
    expect(found, list(right.names), "the order of the buffer", call, "list(out.table())")


def assert_table(flat_layout: Subject, case: LayoutCase) -> None:
    """Every parameter begins and ends in the buffer where it must."""
    call, right = case.call(), truth(case)
    found = table(laid_out(flat_layout, call), call)
    for name, expected in right.table.items():
        at = f"out.table()[{name!r}]"
        expect(found.get(name), expected, f"the place of {name} in the buffer", call, at)
    expect(sorted(found), sorted(right.table), "the set of names", call, "sorted(out.table())")


def assert_contiguous(flat_layout: Subject, case: LayoutCase) -> None:
    """The first parameter begins at 0, and every other where the one before it ends."""
    call = case.call()
    found = table(laid_out(flat_layout, call), call)
    behind = 0
    for name, (begin, end) in found.items():
        expect(begin, behind, f"the begin of {name}", call, f"out.table()[{name!r}][0]")
        behind = end
    expect(behind, case.count, "the end of the last parameter", call, "out.table()")


# Shards


def assert_shard_size(flat_layout: Subject, case: LayoutCase) -> None:
    """Shards are the smallest multiple of 32 elements that hold everything."""
    call = case.call()
    found = shard_size(laid_out(flat_layout, call), call)
    expect(found, truth(case).shard_size, "shard_size", call, "out.shard_size")


def assert_pads(flat_layout: Subject, case: LayoutCase) -> None:
    """Every rank has the padding that it has."""
    call, right = case.call(), truth(case)
    layout = laid_out(flat_layout, call)
    for rank in range(case.world):
        expected, at = right.shard_pad(rank), f"out.shard_pad({rank})"
        expect(pad(layout, rank, call), expected, f"the padding of rank {rank}", call, at)


def assert_pads_in_total(flat_layout: Subject, case: LayoutCase) -> None:
    """The padding of all ranks is what the shards hold beside the parameters, and less than 32 each."""
    call = case.call()
    layout = laid_out(flat_layout, call)
    pads = [pad(layout, rank, call) for rank in range(case.world)]
    room = case.world * shard_size(layout, call)
    shown = f"sum(map(out.shard_pad, range({case.world})))"
    expect(sum(pads), room - case.count, "the padding of all ranks", call, shown)
    expect(sum(pads) < PAD_TO * case.world, True, "less padding than 32 a rank", call, shown)


# Ranges


def assert_ranges(flat_layout: Subject, case: LayoutCase) -> None:
    """Every parameter is in every rank's shard where it must be, or is not there."""
    call, right = case.call(), truth(case)
    layout = laid_out(flat_layout, call)
    for rank in range(case.world):
        for name in right.names:
            expected = right.range_in_shard(name, rank)
            assert_interval(layout, "range_in_shard", name, rank, expected, call)


def assert_ranges_of_parameters(flat_layout: Subject, case: LayoutCase) -> None:
    """``range_of_parameter`` tells the elements that ``range_in_shard`` has a place for."""
    call, right = case.call(), truth(case)
    layout = laid_out(flat_layout, call)
    for rank in range(case.world):
        for name in right.names:
            expected = right.range_of_parameter(name, rank)
            assert_interval(layout, "range_of_parameter", name, rank, expected, call)


def assert_interval(
    layout: Any, method: str, name: str, rank: int, expected: tuple[int, int] | None, call: Call
) -> None:
    """An interval is the expected one, or any that is empty where nothing is expected."""
    found = interval(layout, method, name, rank, call)
    shown = f"out.{method}({name!r}, {rank})"
    what = f"{method}({name!r}, {rank})"
    if expected is None:
        expect(found[1] - found[0], 0, f"the length of {what}", call, shown)
    else:
        expect(found, expected, what, call, shown)


def assert_adjacent(flat_layout: Subject, case: LayoutCase) -> None:
    """Parameters in a shard follow each other from 0 to its padding, in the order of the buffer."""
    call, right = case.call(), truth(case)
    layout = laid_out(flat_layout, call)
    for rank in range(case.world):
        behind = 0
        for name in right.names:
            begin, end = interval(layout, "range_in_shard", name, rank, call)
            if begin == end:
                continue
            shown = f"out.range_in_shard({name!r}, {rank})"
            expect(begin, behind, f"the begin of {name} in rank {rank}", call, shown)
            behind = end
        used = right.shard_size - right.shard_pad(rank)
        shown = f"[out.range_in_shard(name, {rank}) for name in parameters]"
        expect(behind, used, f"the end of the last parameter in rank {rank}", call, shown)


def assert_sums(flat_layout: Subject, case: LayoutCase) -> None:
    """What all ranks hold of a parameter is as many elements as it has."""
    call, right = case.call(), truth(case)
    layout = laid_out(flat_layout, call)
    for name, (begin, end) in right.table.items():
        held = 0
        for rank in range(case.world):
            low, high = interval(layout, "range_in_shard", name, rank, call)
            held += high - low
        shown = f"[out.range_in_shard({name!r}, rank) for rank in range({case.world})]"
        expect(held, end - begin, f"what all ranks hold of {name}", call, shown)


def assert_absent(flat_layout: Subject, case: LayoutCase) -> None:
    """A parameter that is not in a shard has a range without elements, within the shard."""
    call, right = case.call(), truth(case)
    layout = laid_out(flat_layout, call)
    for rank in range(case.world):
        for name in right.names:
            if right.range_in_shard(name, rank) is not None:
                continue
            begin, end = interval(layout, "range_in_shard", name, rank, call)
            shown = f"out.range_in_shard({name!r}, {rank})"
            what = f"range_in_shard({name!r}, {rank})"
            expect(end - begin, 0, f"the length of {what}", call, shown)
            within = 0 <= begin <= right.shard_size
            expect(within, True, f"{what} = {(begin, end)} within the shard", call, shown)


# Layouts of billions of elements


def assert_large(flat_layout: Subject, case: LayoutCase) -> None:
    """Positions of a layout that is too large to be written down."""
    call = case.call()
    layout = laid_out(flat_layout, call)
    size = -(-case.count // (PAD_TO * case.world)) * PAD_TO
    expect(shard_size(layout, call), size, "shard_size", call, "out.shard_size")
    sizes = tuple((name, torch.Size(shape).numel()) for name, shape in case.parameters.items())
    places = Intervals(sizes, size)
    found = table(layout, call)
    for name, begin, end in places.places():
        at = f"out.table()[{name!r}]"
        expect(found.get(name), (begin, end), f"the place of {name}", call, at)
        for rank in (0, case.world // 2, case.world - 1):
            inside = places.in_shard(begin, end, rank)
            assert_interval(layout, "range_in_shard", name, rank, inside, call)
    held = sum(size - pad(layout, rank, call) for rank in range(case.world))
    expect(held, case.count, "what shards hold beside padding", call, "out.shard_pad")


# Shards of values


def assert_cut(
    flat_layout: Subject,
    case: LayoutCase,
    *edits: str,
    padding: bool = True,
) -> None:
    """Every shard holds the elements that it must, each in its place, bit for bit.

    Without ``padding`` what stands in padding is not looked at.
    """
    call = case.call(*(edits or case.numbered()))
    layout = laid_out(flat_layout, call)
    values = call.named("values")
    for rank in range(case.world):
        for tensor_rank in range(case.tensor_world):
            shown = f"print(out.cut(values, {rank}, {tensor_rank}))"
            found = ask(layout, "cut", values, rank, tensor_rank, call=call, shown_by=shown)
            name = shard_name(rank, tensor_rank, case.tensor_world)
            keep = None if padding else truth(case).shards[rank, tensor_rank] != 0
            expected = truth(case).of_values(values, rank, tensor_rank)
            assert_shard(found, expected, truth(case), values, name, call, shown, keep)


def shard_name(rank: int, tensor_rank: int, tensor_ranks: int) -> str:
    """What a shard is called in a message."""
    more = f", tensor rank {tensor_rank}" if tensor_ranks > 1 else ""
    return f"the shard of rank {rank}{more}"


def assert_shard(
    found: object,
    expected: Tensor,
    right: Truth,
    values: Mapping[str, Tensor],
    name: str,
    call: Call,
    shown_by: str,
    keep: Tensor | None = None,
) -> None:
    """A shard is the expected one, bit for bit; or where ``keep`` says so."""
    assert_like(found, expected, name, call, shown_by)
    wrong = bits(found) != bits(expected)
    if keep is not None:
        wrong &= keep
    if not bool(wrong.any()):
        return
    at = int(wrong.nonzero()[0])
    named = Named(right, values, found.dtype)
    raise ConformanceFailure(
        "wrong elements",
        f"{name} has {named(found[at])} at {at}, expected {named(expected[at])}; "
        f"{int(wrong.sum())} of {len(found)} elements are wrong",
        call=call,
        shown_by=shown_by,
    )


def assert_like(found: object, expected: Tensor, name: str, call: Call, shown_by: str) -> None:
    """A tensor of the shape and dtype of another, on its device."""
    current_tally().comparisons["exact"] += 1
    if not isinstance(found, Tensor):
        summary = f"{name} is {type(found).__name__}, expected a tensor"
        raise ConformanceFailure("wrong type", summary, call=call, shown_by=shown_by)
    for what, has, wanted in (
        ("shape", list(found.shape), list(expected.shape)),
        ("dtype", dtype_name(found.dtype), dtype_name(expected.dtype)),
        ("device", found.device.type, expected.device.type),
    ):
        if has != wanted:
            summary = f"{name} has {what} {has}, expected {wanted}"
            raise ConformanceFailure(f"wrong {what}", summary, call=call, shown_by=shown_by)


def bits(tensor: Tensor) -> Tensor:
    """The bits of each element as a number: NaN equals NaN, and -0 is not 0."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


class Named:
    """Says which element of the parameters a value is, where values are numbered."""

    def __init__(self, right: Truth, values: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.right = right
        numbered = dtype in (torch.float32, torch.float64)
        self.numbered = numbered and all(
            torch.equal(values[name], numbers.to(values[name].dtype))
            for name, numbers in right.numbers.items()
            if name in values
        )

    def __call__(self, value: Tensor) -> str:
        """The element, or the value where elements have no numbers."""
        number = float(value)
        if self.numbered and number == number and abs(number) < 2**24:
            return self.right.name_of(int(number)) if number == int(number) else f"{number:g}"
        return f"{number:.9g}"


def assert_own_memory(flat_layout: Subject, case: LayoutCase) -> None:
    """What is cut or joined shares no memory with what it is made of."""
    call = with_shards(case)
    layout, done = laid_out(flat_layout, call), 0
    for method, given in (("cut", "values"), ("join", "shards")):
        if getattr(layout, method, None) is None:
            continue
        done += 1
        tensors, rank = call.named(given), (0,) if method == "cut" else ()
        source = f"out.{method}({', '.join([given, *map(str, rank)])})"
        shown = f"print({source})"
        made = ask(layout, method, tensors, *rank, call=call, shown_by=shown)
        for result in made.values() if isinstance(made, Mapping) else [made]:
            assert_no_alias(result, tensors, given, source, call)
    if not done:
        raise Declined("the layout has no method cut and no method join")


def assert_no_alias(
    result: object, given: Mapping[Any, Tensor], name: str, source: str, call: Call
) -> None:
    """A result, of a call that is given as ``source``, has memory of its own."""
    current_tally().comparisons["exact"] += 1
    if not isinstance(result, Tensor):
        summary = f"{source} gives {type(result).__name__}, expected a tensor"
        raise ConformanceFailure("wrong type", summary, call=call, shown_by=f"print({source})")
    try:
        reject_alias(result, list(given.values()))
    except ConformanceFailure as failure:
        summary = f"what {source} gives shares memory with {name}"
        many = not source.startswith("out.cut")
        zeroed = f"[x.zero_() for x in {source}.values()]" if many else f"{source}.zero_()"
        shown = f"{zeroed}; print({name}, 'expected: not changed')"
        raise ConformanceFailure(failure.kind, summary, call=call, shown_by=shown) from None


# Whole values of shards


def with_shards(case: LayoutCase, *edits: str) -> Call:
    """A call behind lines that make the right ``shards`` of ``values``."""
    dims = "dims" if case.dims else "{}"
    made = f"shards = shards_of(values, {dims}, {case.world}, {case.tensor_world})"
    return case.call(*(edits or case.numbered()), *SHARDS_OF, made)


def assert_joined(flat_layout: Subject, case: LayoutCase, *edits: str) -> None:
    """The right shards give the whole values; ``edits`` are lines that change the shards."""
    call = with_shards(case).then(*edits)
    layout, values = laid_out(flat_layout, call), call.named("values")
    shown = "print(out.join(shards))"
    found = ask(layout, "join", call.named("shards"), call=call, shown_by=shown)
    if not isinstance(found, Mapping):
        summary = f"join() gives {type(found).__name__}, not a mapping"
        raise ConformanceFailure("wrong type", summary, call=call, shown_by=shown)
    names = sorted(map(str, found))
    expect(names, sorted(values), "the set of names", call, "sorted(out.join(shards))")
    for name, expected in values.items():
        at = f"print(out.join(shards)[{name!r}])"
        assert_like(found[name], expected, name, call, at)
        assert_shard(
            found[name].reshape(-1), expected.reshape(-1), truth(case), values, name, call, at
        )


# Shards of shards


GARBAGE = "for key in shards: shards[key] = torch.where(shards[key] == 0, torch.nan, shards[key])"
"""The line that spoils padding."""


def other(case: LayoutCase, call: Call) -> Call:
    """The call that makes the layout to go on with."""
    options = {"ranks": str(case.to[0]), "tensor_ranks": str(case.to[1])}
    if case.to[1] == 1 and case.tensor_world == 1:
        del options["tensor_ranks"]
    return call.then(**options)


def resharded(
    flat_layout: Subject, case: LayoutCase, call: Call
) -> tuple[Any, Any, Mapping[tuple[int, int], Tensor], str]:
    """Both layouts, the shards of the second from the right ones of the first, and the line for it."""
    source = laid_out(flat_layout, call)
    second = other(case, call)
    target = laid_out(flat_layout, second)
    shown = f"print(out.reshard(shards, {second.source()}))"
    found = ask(source, "reshard", call.named("shards"), target, call=call, shown_by=shown)
    if not isinstance(found, Mapping):
        summary = f"reshard() gives {type(found).__name__}, not a mapping"
        raise ConformanceFailure("wrong type", summary, call=call, shown_by=shown)
    keys = sorted((rank, t) for rank in range(case.to[0]) for t in range(case.to[1]))
    if set(found) != set(keys):
        summary = f"reshard() gives shards of {list(found)}, expected {keys}"
        raise ConformanceFailure("wrong ranks", summary, call=call, shown_by=shown)
    return source, target, found, shown


def assert_resharded(
    flat_layout: Subject, case: LayoutCase, *edits: str, values: Sequence[str] = ()
) -> None:
    """Shards of another layout from the right shards are that layout's, padding included."""
    call = with_shards(case, *values).then(*edits)
    _, _, found, shown = resharded(flat_layout, case, call)
    assert_shards(found, case, call, shown)


def assert_shards(
    found: Mapping[tuple[int, int], Tensor], case: LayoutCase, call: Call, shown: str
) -> None:
    """Shards are those of the layout to go on with."""
    right, values = truth(case, *case.to), call.named("values")
    for rank, tensor_rank in right.shards:
        expected = right.of_values(values, rank, tensor_rank)
        name = shard_name(rank, tensor_rank, case.to[1])
        assert_shard(found[rank, tensor_rank], expected, right, values, name, call, shown)


def assert_there_and_back(flat_layout: Subject, case: LayoutCase) -> None:
    """Shards made of shards, made of these again, are the first ones."""
    call = with_shards(case)
    source, target, found, _ = resharded(flat_layout, case, call)
    values, right = call.named("values"), truth(case)
    second = other(case, call).source()
    shown = f"to = {second}; print(to.reshard(out.reshard(shards, to), out))"
    again = ask(target, "reshard", found, source, call=call, shown_by=shown)
    ranks = sorted(call.named("shards"))
    expect(sorted(again), ranks, "the set of ranks", call, "sorted(out.reshard(shards, out))")
    for (rank, tensor_rank), shard in call.named("shards").items():
        name = shard_name(rank, tensor_rank, case.tensor_world)
        assert_shard(again[rank, tensor_rank], shard, right, values, name, call, shown)


def assert_reshard_keeps_source(flat_layout: Subject, case: LayoutCase) -> None:
    """The shards that are given stay as they are, and are not given back."""
    call = with_shards(case)
    _, _, found, shown = resharded(flat_layout, case, call)
    source = shown.removeprefix("print(").removesuffix(")")
    for result in found.values():
        assert_no_alias(result, call.named("shards"), "shards", source, call)
    assert_shards(found, case, call, shown)


# Refusals


def assert_not_made(flat_layout: Subject, call: Call, *words: str) -> None:
    """Making the layout raises an exception that has one of the words."""
    arguments, options = call.values()
    assert_raises(
        lambda: flat_layout(*own(arguments), **options), "the layout", call, words, "print(out)"
    )


def assert_not_done(
    layout: Any, method: str, *arguments: Any, call: Call, words: Sequence[str], shown_by: str
) -> None:
    """A method of the layout raises an exception that has one of the words."""
    if method in OPTIONAL and getattr(layout, method, None) is None:
        raise Declined(f"the layout has no method {method}")

    def do() -> None:
        with errors_named(f"{method}()"):
            getattr(layout, method)(*own(arguments))

    assert_raises(do, f"{method}()", call, words, shown_by)


def assert_raises(
    do: Callable[[], object], what: str, call: Call, words: Sequence[str], shown_by: str
) -> None:
    """``do`` raises an exception whose text has one of the words."""
    current_tally().comparisons["exact"] += 1
    try:
        do()
    except ConformanceFailure as failure:
        if not failure.kind.startswith("raised "):
            failure.call = failure.call or call
            raise
        error = str(failure.__cause__)
        if any(word in error for word in words):
            return
        summary = f"the error of {what} does not name {' or '.join(words)}: {error[:200]!r}"
        raise ConformanceFailure("unclear error", summary, call=call, shown_by=shown_by) from None
    summary = f"{what} is given where an error is due that names {words[0]}"
    raise ConformanceFailure("accepted", summary, call=call, shown_by=shown_by)


def assert_values_refused(
    flat_layout: Subject, case: LayoutCase, *edits: str, names: Sequence[str]
) -> None:
    """``cut`` raises, on every rank, an exception that names one of the parameters."""
    call = case.call(*case.numbered(), *edits)
    layout, values = laid_out(flat_layout, call), call.named("values")
    for rank in range(case.world):
        shown = f"print(out.cut(values, {rank}))"
        assert_not_done(layout, "cut", values, rank, call=call, words=names, shown_by=shown)


def assert_shards_refused(
    flat_layout: Subject, case: LayoutCase, *edits: str, words: Sequence[str]
) -> None:
    """``join`` and ``reshard`` raise an exception that names the shard, for shards that are changed."""
    call = with_shards(case).then(*edits)
    layout, shards = laid_out(flat_layout, call), call.named("shards")
    second = other(case, call)
    target = laid_out(flat_layout, second)
    shown = {
        "join": "print(out.join(shards))",
        "reshard": f"print(out.reshard(shards, {second.source()}))",
    }
    offered = [name for name in shown if getattr(layout, name, None) is not None]
    if not offered:
        raise Declined("the layout has no method join and no method reshard")
    for name in offered:
        given = (shards,) if name == "join" else (shards, target)
        assert_not_done(layout, name, *given, call=call, words=words, shown_by=shown[name])


def assert_rank_refused(flat_layout: Subject, case: LayoutCase, rank: int) -> None:
    """Asking for a rank beyond the last raises an exception that names it."""
    call = case.call(*case.numbered())
    layout, name = laid_out(flat_layout, call), next(iter(case.parameters))
    for method, arguments, shown in (
        ("shard_pad", (rank,), f"print(out.shard_pad({rank}))"),
        ("range_in_shard", (name, rank), f"print(out.range_in_shard({name!r}, {rank}))"),
        ("range_of_parameter", (name, rank), f"print(out.range_of_parameter({name!r}, {rank}))"),
        ("cut", (call.named("values"), rank), f"print(out.cut(values, {rank}))"),
    ):
        if method in OPTIONAL and getattr(layout, method, None) is None:
            continue
        assert_not_done(layout, method, *arguments, call=call, words=[str(rank)], shown_by=shown)


def assert_tensor_rank_refused(flat_layout: Subject, case: LayoutCase, tensor_rank: int) -> None:
    """Cutting for a tensor-parallel rank beyond the last raises an exception that names it."""
    call = case.call(*case.numbered())
    layout = laid_out(flat_layout, call)
    shown = f"print(out.cut(values, 0, {tensor_rank}))"
    arguments, words = (call.named("values"), 0, tensor_rank), [str(tensor_rank)]
    assert_not_done(layout, "cut", *arguments, call=call, words=words, shown_by=shown)
