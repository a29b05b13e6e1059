"""Checks that each rank holds exactly its part of each stored tensor, by names and elements.

What a rank holds is said here anew, from the contract: query heads are dealt out in order, a rank has
the key/value heads that its query heads read, inner channels are dealt out in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from conformance.harness.failures import ConformanceFailure
from conformance.harness.loader_subject import EMBEDDING, HEAD, LoaderCall, load_all, loader_call
from conformance.harness.qwen2_cases import QwenCase
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, bitwise_equal

VOCABULARY = (EMBEDDING, HEAD)
"""Tensors that every rank holds in full, or a share of the rows of."""

Loaded = Sequence[Mapping[str, Tensor]]
"""What each rank holds."""


def counted() -> None:
    """Count one comparison of the exact lane."""
    current_tally().comparisons["exact"] += 1


# What a rank holds


def part_of(case: QwenCase, name: str, rank: int) -> tuple[int, list[int]] | None:
    """The axis of a weight that is split and the indices that a rank holds; None for all of it."""
    projection = name.rsplit(".", 2)[-2]
    heads = dealt(case.heads, rank, case.ranks)
    inner = list(dealt(case.intermediate, rank, case.ranks))
    if projection in ("q_proj", "o_proj"):
        return int(projection == "o_proj"), channels(heads, case.head_dim)
    if projection in ("k_proj", "v_proj"):
        read = sorted({head // (case.heads // case.kv_heads) for head in heads})
        return 0, channels(read, case.head_dim)
    if projection in ("gate_proj", "up_proj", "down_proj"):
        return int(projection == "down_proj"), inner
    return None


def dealt(size: int, rank: int, ranks: int) -> range:
    """The part of ``size`` things that a rank has when they are dealt out in order."""
    return range(rank * size // ranks, (rank + 1) * size // ranks)


def channels(heads: Sequence[int], width: int) -> list[int]:
    """The channels of some heads."""
    return [head * width + channel for head in heads for channel in range(width)]


def held(case: QwenCase, name: str, full: Tensor, rank: int) -> Tensor:
    """What a rank holds of a full tensor that is not of the vocabulary."""
    part = part_of(case, name, rank)
    return full if part is None else full.index_select(part[0], torch.tensor(part[1]))


def shares(full: Tensor, rows: int, ranks: int) -> list[Tensor]:
    """Equal shares of ``rows`` rows for each rank, with rows of zeros behind the last."""
    padding = full.new_zeros(rows * ranks - len(full), *full.shape[1:])
    return list(torch.cat([full, padding]).split(rows))


# Comparing


CODED = (
    "state = {k: ((i + 1) * 2**14 + torch.arange(t.numel())).view(t.shape).to(t.dtype)"
    " for i, (k, t) in enumerate(state.items())}"
)
"""Every element of every tensor has a value of its own, exact in float32: its place can be told."""


def assert_held(
    weight_loader: Subject,
    case: QwenCase,
    *edits: str,
    of: Callable[[str], bool] | None = None,
    call: LoaderCall | None = None,
) -> None:
    """Each rank holds its part of each tensor, bit for bit; or of the tensors that ``of`` names."""
    call = call or loader_call(case, *edits, device=weight_loader.device)
    assert_loaded(load_all(weight_loader, call), call, of=of)


def assert_loaded(
    loaded: Loaded,
    call: LoaderCall,
    *,
    of: Callable[[str], bool] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """``loaded`` are the parts of what the call stores, or of another ``state``."""
    state = dict(call.named("state") if state is None else state)
    state = {name: tensor.to(call.dtype_of_weights) for name, tensor in state.items()}
    if of is None:
        for rank, parts in enumerate(loaded):
            assert_names(parts, state, call.of_rank(rank))
    if call.tied:
        state.setdefault(HEAD, state[EMBEDDING])
        loaded = [with_tied_head(parts) for parts in loaded]
    for name, full in state.items():
        if of is not None and not of(name):
            continue
        counted()
        if name in VOCABULARY:
            assert_vocabulary(name, full, loaded, state, call)
            continue
        for rank, parts in enumerate(loaded):
            expected = held(call.case, name, full, rank)
            assert_same(name, found(parts, name, call.of_rank(rank)), expected, state, call, rank)


def with_tied_head(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts with their embedding for the head, where that is left out."""
    return {HEAD: parts[EMBEDDING], **parts} if EMBEDDING in parts else dict(parts)


def found(parts: Mapping[str, Tensor], name: str, call: LoaderCall) -> Tensor:
    """The tensor of a name; fails where there is none."""
    if name not in parts:
        raise ConformanceFailure(
            "wrong names", f"{name} is missing", call=call, shown_by="print(list(out))"
        )
    return parts[name]


def assert_names(
    parts: Mapping[str, Tensor], state: Mapping[str, Tensor], call: LoaderCall
) -> None:
    """The names are those of the model; a head that is tied may be left out or be there."""
    counted()
    expected, names = set(state), set(parts)
    if call.tied:
        names.discard(HEAD)
        expected.discard(HEAD)
    for what, wrong in (("without", expected - names), ("with", names - expected)):
        if wrong:
            some = ", ".join(sorted(wrong)[:3])
            summary = f"the result is {what} {len(wrong)} names, {some}"
            raise ConformanceFailure("wrong names", summary, call=call, shown_by="print(list(out))")


def assert_vocabulary(
    name: str, full: Tensor, loaded: Loaded, state: Mapping[str, Tensor], call: LoaderCall
) -> None:
    """An embedding or a head is there in full on every rank, or in equal shares of rows."""
    parts = [found(parts, name, call.of_rank(rank)) for rank, parts in enumerate(loaded)]
    ranks, rows = len(parts), {len(part) for part in parts}
    share = len(parts[0])
    if len(rows) > 1 or (share != len(full) and share < math.ceil(len(full) / ranks)):
        lengths = [len(part) for part in parts]
        summary = (
            f"{name} has {lengths} rows on the ranks, neither all {len(full)} nor equal shares"
        )
        last, shown = call.of_rank(ranks - 1), f"print(out[{name!r}].shape)"
        raise ConformanceFailure("wrong shape", summary, call=last, shown_by=shown)
    whole = share == len(full)
    expected = [full] * ranks if whole else shares(full, share, ranks)
    for rank, (part, wanted) in enumerate(zip(parts, expected)):
        assert_same(name, part, wanted, state, call, rank)


def assert_same(
    name: str,
    actual: Tensor,
    expected: Tensor,
    state: Mapping[str, Tensor],
    call: LoaderCall,
    rank: int,
) -> None:
    """Bit for bit the same; the failure says which element of which tensor the first wrong one is."""
    if bitwise_equal(actual, expected):
        return
    call, of = call.of_rank(rank), f" on rank {rank} of {call.case.ranks}"
    of = of if call.case.ranks > 1 else ""
    if actual.shape != expected.shape:
        summary = f"{name}{of} has shape {list(actual.shape)}, expected {list(expected.shape)}"
        shown = f"print({out_of(name, call)}.shape)"
        raise ConformanceFailure("wrong shape", summary, call=call, shown_by=shown)
    wrong = (actual != expected).nonzero()
    at = wrong[0].tolist()
    summary = f"{name}{at}{of} holds {origin(actual[tuple(at)], state)}, "
    summary += f"expected {origin(expected[tuple(at)], state)}"
    details = [f"{len(wrong)} of {actual.numel()} elements are wrong"]
    for place in wrong[1:4].tolist():
        details.append(f"{name}{place} holds {origin(actual[tuple(place)], state)}")
    raise ConformanceFailure(
        "wrong values",
        summary,
        details=tuple(details),
        call=call,
        shown_by=f"print({out_of(name, call)}{at})",
    )


def out_of(name: str, call: LoaderCall) -> str:
    """A tensor of the result as source text; the embedding for a tied head that is left out."""
    if name == HEAD and call.tied:
        return f"out.get({HEAD!r}, out[{EMBEDDING!r}])"
    return f"out[{name!r}]"


def origin(value: Tensor, state: Mapping[str, Tensor]) -> str:
    """In words, which element of the checkpoint has this value."""
    if not float(value):
        return "a zero"
    for name, tensor in state.items():
        places = (tensor == value).nonzero()
        if len(places) == 1:
            return f"element {places[0].tolist()} of {name}"
    return f"{float(value):.9g}"


def assert_names_alone(weight_loader: Subject, case: QwenCase) -> None:
    """The result has the names of the model's state, whatever is under them."""
    call = loader_call(case, device=weight_loader.device)
    for rank, parts in enumerate(load_all(weight_loader, call)):
        assert_names(parts, call.named("state"), call.of_rank(rank))


# Counting elements


def assert_every_element_once(weight_loader: Subject, case: QwenCase) -> None:
    """Over all ranks each element of each tensor is there as often as the ranks that hold it."""
    call = loader_call(case, CODED, device=weight_loader.device)
    loaded, state = load_all(weight_loader, call), call.named("state")
    for name, full in state.items():
        counted()
        shown = f"print(out[{name!r}])"
        parts = [parts[name].flatten() for parts in loaded if name in parts]
        values, counts = torch.cat([*parts, full[:0].flatten()]).unique(return_counts=True)
        times = dict(zip(values.tolist(), counts.tolist()))
        times.pop(0.0, None)  # rows of zeros behind the vocabulary
        expected = times_held(case, name, full, times)
        for value, wanted in zip(full.flatten().tolist(), expected.flatten().tolist()):
            if times.pop(value, 0) != wanted:
                there = origin(torch.tensor(value), state)
                summary = f"{there} is not there {wanted} times over the ranks"
                raise ConformanceFailure(
                    "wrong elements", summary, call=call.of_rank(0), shown_by=shown
                )
        if times:
            there = origin(torch.tensor(next(iter(times))), state)
            summary = f"{name} holds {there}, which is not its own"
            raise ConformanceFailure(
                "wrong elements", summary, call=call.of_rank(0), shown_by=shown
            )


def times_held(case: QwenCase, name: str, full: Tensor, times: Mapping[float, int]) -> Tensor:
    """How many ranks hold each element of a tensor."""
    if name in VOCABULARY:  # in full, or in shares: the first element tells which
        return torch.full_like(full, times.get(float(full.flatten()[0]), 0) or 1)
    count = torch.zeros_like(full)
    for rank in range(case.ranks):
        part = part_of(case, name, rank)
        axis, indices = part or (0, list(range(len(full))))
        ones = torch.ones_like(full.index_select(axis, torch.tensor(indices)))
        count.index_add_(axis, torch.tensor(indices), ones)
    return count


# Replicas


def assert_replicas(weight_loader: Subject, case: QwenCase) -> None:
    """Ranks that hold the same key/value head hold the same bits, and others do not."""
    call = loader_call(case, device=weight_loader.device)
    loaded = load_all(weight_loader, call)
    times = max(1, case.ranks // case.kv_heads)
    for name in [name for name in call.named("state") if ".k_proj." in name or ".v_proj." in name]:
        for rank in range(1, case.ranks):
            counted()
            one, other = (found(loaded[r], name, call.of_rank(r)) for r in (rank - 1, rank))
            same, wanted = bitwise_equal(one, other), (rank - 1) // times == rank // times
            if same != wanted:
                what = "the same as" if wanted else "another head than"
                summary = f"{name}: rank {rank} does not hold {what} rank {rank - 1}"
                raise ConformanceFailure(
                    "wrong values",
                    summary,
                    call=call.of_rank(rank),
                    shown_by=f"print(out[{name!r}])",
                )
    assert_loaded(loaded, call, of=lambda name: ".k_proj." in name or ".v_proj." in name)


# Understood, or refused


def understood_or_refused(
    weight_loader: Subject, call: LoaderCall, states: Sequence[Mapping[str, Tensor]] = ()
) -> None:
    """Every rank refuses, or every rank holds its part of what is stored (or of one of ``states``)."""
    counted()
    try:
        loaded = load_all(weight_loader, call)
    except ConformanceFailure as failure:
        if not failure.kind.startswith("raised "):
            raise
        return
    failures = []
    for state in states or (call.named("state"),):
        try:
            assert_loaded(loaded, call, state=state)
        except ConformanceFailure as failure:
            failures.append(failure)
        else:
            return
    raise failures[0]


# Ties


def assert_equal_head(weight_loader: Subject, case: QwenCase) -> None:
    """A stored head that equals the embedding changes nothing, with a tie and without."""
    assert_held(weight_loader, case, f"state[{HEAD!r}] = state[{EMBEDDING!r}].clone()")


def assert_different_head(weight_loader: Subject, case: QwenCase) -> None:
    """A head of its own in spite of a tie is used, or the directory refused."""
    place = f"[{case.vocab - 1 - case.seed % 7}, {case.seed % case.hidden}]"
    edits = (
        (f"state[{HEAD!r}] = w({case.vocab}, {case.hidden})",),
        (f"state[{HEAD!r}] = state[{EMBEDDING!r}].clone()", f"state[{HEAD!r}]{place} += 1"),
    )[case.seed % 2]
    understood_or_refused(weight_loader, loader_call(case, *edits, device=weight_loader.device))


def assert_flag_missing(weight_loader: Subject, case: QwenCase) -> None:
    """Without ``tie_word_embeddings`` a stored head is used."""
    assert_held(weight_loader, case, "del config['tie_word_embeddings']")


# Dtypes


STORED = ("float32", "bfloat16", "float16", "float64")


def drawn_dtype(case: QwenCase, number: str = "dtype") -> str:
    """A floating dtype, by the case's drawn number."""
    return STORED[case.drawn[number] % len(STORED)]


def assert_dtype(weight_loader: Subject, case: QwenCase) -> None:
    """Every tensor is in the dtype that is asked for: what is stored, rounded once."""
    dtype = f"torch.{drawn_dtype(case)}"
    call = loader_call(case, device=weight_loader.device, dtype=dtype)
    assert_held(weight_loader, case, call=call)


def assert_float64(weight_loader: Subject, case: QwenCase) -> None:
    """Numbers that float32 does not have are rounded once, or not at all."""
    line = "state = {k: t * (1 + 2**-40) for k, t in state.items()}"
    options = {"dtype": f"torch.{drawn_dtype(case)}"} if case.drawn["dtype"] % 3 else {}
    call = loader_call(case, line, device=weight_loader.device, **options)
    assert_held(weight_loader, case, call=call)


def assert_default_dtype(weight_loader: Subject, case: QwenCase) -> None:
    """Without a dtype that of ``config.json`` is taken, under its new or its old key."""
    key = ("dtype", "torch_dtype")[case.drawn["key"] % 2]
    edits = (f"_ = config.pop('dtype'); config[{key!r}] = {drawn_dtype(case)!r}",)
    assert_held(weight_loader, case, *edits)


def assert_mixed_dtypes(weight_loader: Subject, case: QwenCase) -> None:
    """Tensors that are stored in several dtypes are given in one."""
    kinds = [f"torch.{drawn_dtype(case, number)}" for number in ("dtype", "other", "third")]
    listed = f"({', '.join(kinds)})"
    line = f"state = {{k: t.to({listed}[i % 3]) for i, (k, t) in enumerate(state.items())}}"
    assert_held(weight_loader, case, line)


# Files


DEALT = (
    "names = ['b.safetensors', 'model-9-of-3.safetensors', 'a b.safetensors', 'rest.safetensors']",
    "places = torch.randint(4, (len(state),), generator=g).tolist()",
    "index = {k: names[i] for k, i in zip(state, places)}",
    "files = {n: {k: t for k, t in state.items() if index[k] == n} for n in set(index.values())}",
    "after: sizes = {'total_size': sum(t.nbytes for t in state.values())}",
    "after: write('model.safetensors.index.json',"
    " {'metadata': sizes, 'weight_map': dict(reversed(index.items()))})",
)
"""Tensors in files of any names, in any order in the index."""


def assert_files_dealt(weight_loader: Subject, case: QwenCase) -> None:
    """However the tensors are dealt out to files, and whatever these are called, all are loaded."""
    call = loader_call(case, saved=DEALT, device=weight_loader.device)
    assert_held(weight_loader, case, call=call)


SHUFFLED = (
    "after: shuffle = lambda x: [x[i] for i in torch.randperm(len(x), generator=g).tolist()]",
    "after: kinds = {4: 'F32', 2: 'BF16'}",
    "after: for name, tensors in files.items():",
    "after:     header, data = {}, b''",
    "after:     for k in shuffle(list(tensors)):",
    "after:         t, start = tensors[k], len(data)",
    "after:         data += t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()",
    "after:         header[k] = {'shape': list(t.shape), 'data_offsets': [start, len(data)]}",
    "after:         header[k]['dtype'] = kinds[t.element_size()]",
    "after:     text = json.dumps({k: header[k] for k in shuffle(list(header))}).encode()",
    "after:     text = len(text).to_bytes(8, 'little') + text",
    "after:     _ = open(os.path.join(directory, name), 'wb').write(text + data)",
)
"""Files whose tensors lie in any order, and are listed in another."""


def assert_order_in_file(weight_loader: Subject, case: QwenCase) -> None:
    """Tensors lie in a file, and are listed in its header, in any order."""
    call = loader_call(case, saved=SHUFFLED, device=weight_loader.device)
    assert_held(weight_loader, case, call=call)


# Configuration


IRRELEVANT = {
    "transformers_version": "4.37.2",
    "_name_or_path": "/nowhere",
    "use_cache": False,
    "attention_dropout": 0.1,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "use_sliding_window": False,
    "max_window_layers": 1,
    "vocabulary": 7,
    "num_layers": 9,
    "n_head": 3,
}


def assert_irrelevant_keys(weight_loader: Subject, case: QwenCase) -> None:
    """Keys that say nothing about the weights, and keys of other models, change nothing."""
    call = loader_call(case, config=IRRELEVANT, device=weight_loader.device)
    assert_held(weight_loader, case, call=call)


SIZES = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
)


def assert_size_missing(weight_loader: Subject, case: QwenCase) -> None:
    """A size that the configuration lacks is not guessed: the weights are right, or refused."""
    for number in range(4):
        key = SIZES[(case.drawn["key"] + number) % len(SIZES)]
        call = loader_call(case, f"del config[{key!r}]", device=weight_loader.device)
        understood_or_refused(weight_loader, call)


# Prefixes


def renamed(expression: str) -> tuple[str, ...]:
    """Lines after which the files and the index have other names for tensor ``k``."""
    return (
        f"new = lambda k: {expression}",
        "files = {n: {new(k): t for k, t in tensors.items()} for n, tensors in files.items()}",
        "index = {new(k): n for k, n in index.items()}",
    )


def assert_base_names(weight_loader: Subject, case: QwenCase) -> None:
    """Names without ``model.``, as the base model has them, are understood or refused."""
    saved = renamed("k.removeprefix('model.')")
    understood_or_refused(
        weight_loader, loader_call(case, saved=saved, device=weight_loader.device)
    )


def assert_mixed_prefixes(weight_loader: Subject, case: QwenCase) -> None:
    """Some names with ``model.`` in front and some without are understood or refused."""
    rest = case.seed % 5
    saved = renamed(f"k if len(k) % 5 == {rest} else k.removeprefix('model.')")
    understood_or_refused(
        weight_loader, loader_call(case, saved=saved, device=weight_loader.device)
    )


WRAPPERS = (
    "module.",
    "_orig_mod.",
    "transformer.",
    "base_model.model.",
    "model.",
    "language_model.",
    "module._orig_mod.",
)


def assert_wrapped_names(weight_loader: Subject, case: QwenCase) -> None:
    """Names with a wrapper's prefix in front are understood or refused."""
    prefix = WRAPPERS[case.drawn["key"] % len(WRAPPERS)]
    saved = renamed(f"{prefix!r} + k")
    understood_or_refused(
        weight_loader, loader_call(case, saved=saved, device=weight_loader.device)
    )
