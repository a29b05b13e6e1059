"""Checks of a loaded GPT: its function, what influences it, and what does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.compare import assert_close_to, assert_different, assert_identical
from conformance.harness.failures import ConformanceFailure
from conformance.harness.gpt_cases import WRAPPED, GPTCall, GPTCase
from conformance.harness.gpt_oracle import Oracle, oracle
from conformance.harness.gpt_subject import Loaded, inspected, load
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, errors_named
from conformance.harness.tolerance import STEP_ERROR

OUTPUTS = ("features", "logits")


def one_output(case: GPTCase) -> tuple[str, ...]:
    """Features or logits, by the case's seed: the cases of a requirement have both."""
    return (OUTPUTS[case.seed % 2],)


def assert_facts(gpt_checkpoint: Subject, call: GPTCall, truth: dict[str, Any]) -> None:
    """``inspect()`` says what is true, under every name of ``truth``."""
    call = replace(call, done=".inspect()")
    facts = inspected(gpt_checkpoint, call)
    current_tally().comparisons["exact"] += 1
    for name, value in truth.items():
        if name not in facts:
            raise ConformanceFailure("missing fact", f"inspect() does not tell {name}", call=call)
        if facts[name] != value:
            raise ConformanceFailure(
                "wrong fact",
                f"inspect() says that {name} is {facts[name]!r}, expected {value!r}",
                call=call,
                shown_by=f"print(out[{name!r}], 'expected {value!r}')",
            )


def everything(output: Tensor) -> Tensor:
    """All of an output."""
    return output


def assert_function(
    loaded: Loaded,
    *,
    ids: Tensor | None = None,
    against: Oracle | None = None,
    part: Callable[[Tensor], Tensor] = everything,
    of_oracle: Callable[[Tensor], Tensor] | None = None,
    relative: float = 0.0,
    outputs: tuple[str, ...] = OUTPUTS,
    shown: str = "",
    **masks: Any,
) -> None:
    """Features and logits are those of the oracle.

    ``part`` takes the part of the outputs that is compared, ``of_oracle`` the same part of the
    oracle's, which is that of this call unless another is given. ``relative`` raises the limits.
    ``shown`` is the part as Python that follows an output.
    """
    against = against or oracle(loaded.call, ids, **masks)
    for name in outputs:
        output = part(getattr(loaded, name)(ids, **masks))
        expectation = against.expectation(name, of_oracle or part)
        allowed = expectation.allowing(relative)
        assert_close_to(output, allowed, loaded.last, name=name, source=f"out{shown}")


def assert_loads(
    gpt_checkpoint: Subject,
    case: GPTCase,
    *edits: str,
    outputs: tuple[str, ...] | None = None,
    **options: Any,
) -> Loaded:
    """The checkpoint loads, and the model has the oracle's function; gives the model.

    ``outputs``: what is compared; default: features or logits, by the case's seed.
    """
    call = case.call(*edits, device=gpt_checkpoint.device, **options)
    loaded = load(gpt_checkpoint, call)
    assert_function(loaded, outputs=outputs or one_output(case))
    return loaded


WRAPPERS_TRIED = 4
"""Ways in which names are wrapped that each case tries; there are ten."""


def assert_wrappers_taken_off(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """The model is the same under wrapped names; several ways of wrapping are tried in turn."""
    loaded = assert_loads(gpt_checkpoint, case)
    ways = sorted(WRAPPED)
    for further in range(1, WRAPPERS_TRIED):
        way = ways[(ways.index(case.wrapped) + 3 * further) % len(ways)]
        call = replace(case, wrapped=way).call(device=gpt_checkpoint.device)
        other = load(gpt_checkpoint, call)
        because = f"names are wrapped in another way ({way or 'not at all'})"
        assert_identical(other.logits(), loaded.logits(), other.last, because=because)


def logits_of(gpt_checkpoint: Subject, case: GPTCase, *edits: str) -> tuple[Tensor, GPTCall]:
    """The logits of a fresh load of the edited checkpoint, and the call that gives them."""
    loaded = load(gpt_checkpoint, case.call(*edits, device=gpt_checkpoint.device))
    return loaded.logits(), loaded.last


def assert_influence(
    gpt_checkpoint: Subject,
    case: GPTCase,
    edits: Mapping[str, str],
    *,
    without: Mapping[tuple[str, ...], str] | None = None,
    before: tuple[str, ...] = (),
) -> None:
    """Each of ``edits`` changes the logits; those of ``without`` change nothing, bit for bit.

    Both map lines that change the state to what they do, in words; ``before`` are made in any case.
    """
    plain, _ = logits_of(gpt_checkpoint, case, *before)
    for lines, done in (without or {}).items():
        logits, call = logits_of(gpt_checkpoint, case, *before, *lines)
        assert_identical(logits, plain, call, because=f"without influence, {done}")
    for line, done in edits.items():
        logits, call = logits_of(gpt_checkpoint, case, *before, line)
        assert_different(logits, plain, call, because=f"the logits are the same although {done}")


def assert_rows_identical(
    loaded: Loaded,
    ids: Tensor,
    keep: Tensor,
    *,
    because: str,
    **masks: Any,
) -> None:
    """With ``ids`` in place of the call's, outputs where ``keep`` [batch, tokens] is True are equal."""
    for name in one_output(loaded.call.case):
        one, other = getattr(loaded, name)(**masks), getattr(loaded, name)(ids, **masks)
        assert_identical(other[keep], one[keep], loaded.last, because=because)


def assert_causal(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Other tokens from ``cut`` on leave the outputs before it as they are."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    ids = loaded.call.named("ids")
    cut = 1 + case.seed % (case.tokens - 1)
    other = ids.clone()
    other[:, cut:] = (other[:, cut:] + 1 + case.seed % (case.vocab - 1)) % case.vocab
    assert_function(loaded, ids=other, outputs=one_output(case))
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[:, :cut] = True
    because = f"tokens from {cut} on were replaced, and outputs before them are compared"
    assert_rows_identical(loaded, other, keep, because=because)


def assert_rows_independent(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Each row alone has the oracle's outputs, and other rows do not change its bits."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    ids, whole = loaded.call.named("ids"), oracle(loaded.call)
    assert_function(loaded, against=whole)
    for row in range(case.batch):
        alone = slice(row, row + 1)
        assert_function(
            loaded,
            ids=ids[alone],
            against=whole,
            of_oracle=lambda x: x[alone],  # noqa: B023
            outputs=one_output(case),
        )
    other = (ids + 1) % case.vocab
    other[0] = ids[0]
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[0] = True
    assert_rows_identical(loaded, other, keep, because="the other rows were replaced")


def assert_any_length(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Long, short, long: calls of any length give the oracle's outputs, and the same ones again."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    ids = loaded.call.named("ids")
    longest = torch.cat([ids, ids.flip(0), ids], dim=1)
    whole = oracle(loaded.call, longest)
    first = loaded.logits()
    with loaded.course_shown():
        for length in (1, 3 * case.tokens, 2, case.tokens - 1):
            start = longest[:, :length]
            # Attention is causal: the outputs of a beginning are the beginning of the outputs.
            assert_function(
                loaded,
                ids=start,
                against=whole,
                of_oracle=lambda x: x[:, :length],  # noqa: B023
                outputs=one_output(case),
            )
        because = "the call is repeated after others"
        assert_identical(loaded.logits(), first, loaded.last, because=because)


def padding_of(case: GPTCase, side: str, device: str) -> Tensor:
    """Bool [batch, tokens], False at padding of another length in each row, none in one.

    In every other case a row has a single slot of padding, which is the easiest to overlook.
    """
    lengths = [(case.seed + 3 * row) % (case.tokens - 2) for row in range(case.batch)]
    lengths[case.seed % case.batch] = 0
    if case.seed % 2:
        lengths[(case.seed + 1) % case.batch] = 1
    slot = torch.arange(case.tokens)
    on_left = [side == "left" or (side == "either" and row % 2) for row in range(case.batch)]
    padded = torch.stack(
        [slot < n if left else slot >= case.tokens - n for n, left in zip(lengths, on_left)]
    )
    return ~padded.to(device)


def assert_padding(gpt_checkpoint: Subject, case: GPTCase, side: str) -> None:
    """Real tokens have the outputs of their row without padding, whatever the padding holds."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    ids = loaded.call.named("ids")
    valid = padding_of(case, side, gpt_checkpoint.device)
    real_tokens = lambda x: x[valid.to(x.device)][None]
    assert_function(loaded, part=real_tokens, valid=valid, shown=f"{where(valid)}[None]")
    row = int(valid.sum(-1).argmin())
    real = valid[row]
    assert_function(
        loaded,
        against=oracle(loaded.call, ids[row][real][None]),
        part=lambda x: x[row][real.to(x.device)][None],
        of_oracle=everything,
        outputs=one_output(case),
        valid=valid,
        shown=f"[{row}]{where(real)}[None]",
    )
    other = torch.where(valid, ids, (ids + 1) % case.vocab)
    because = "the ids of padding were replaced"
    assert_rows_identical(loaded, other, valid, because=because, valid=valid)


def where(valid: Tensor) -> str:
    """The indices at which a mask is True, as Python that follows what it is a mask of."""
    return f"[{', '.join(str(each.tolist()) for each in valid.nonzero(as_tuple=True))}]"


def with_documents(case: GPTCase, ids: Tensor, start: int) -> Tensor:
    """The ids with up to three starts of documents in each row, at other places in each."""
    generator = torch.Generator().manual_seed(case.seed)
    ids = ids.clone() % start
    for row in range(len(ids)):
        places = torch.randint(ids.shape[1], (3,), generator=generator)
        ids[row, places] = start
    return ids


def assert_documents(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Each token sees its own document only, from the very token that starts it."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    start = case.vocab - 1
    ids = with_documents(case, loaded.call.named("ids"), start)
    with loaded.course_shown():
        assert_function(loaded, ids=ids, document_start=start)
        # Not asked for, the token is an ordinary one.
        assert_function(loaded, ids=ids, outputs=one_output(case))
        cut = 2 + case.seed % (case.tokens - 3)
        ids[:, cut] = start
        other = ids.clone()
        other[:, :cut] = (other[:, :cut] + 1) % start
        one = loaded.features(ids, document_start=start)[:, cut:]
        two = loaded.features(other, document_start=start)[:, cut:]
        assert_identical(two, one, loaded.last, because="the document before was replaced")


def assert_padded_documents(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Padding is not seen where documents are separate either."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    start = case.vocab - 1
    ids = with_documents(case, loaded.call.named("ids"), start)
    valid = padding_of(case, "either", gpt_checkpoint.device)
    masks = {"valid": valid, "document_start": start}
    real = lambda output: output[valid.to(output.device)][None]
    shown = f"{where(valid)}[None]"
    assert_function(loaded, ids=ids, part=real, outputs=one_output(case), shown=shown, **masks)


def assert_options_not_kept(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Calls of one shape with padding, with documents, with neither: each is as if it were alone."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    ids, start = loaded.call.named("ids"), case.vocab - 1
    valid = padding_of(case, "either", gpt_checkpoint.device)
    real = lambda output: output[valid.to(output.device)][None]
    plain = oracle(loaded.call)
    only_logits = ("logits",)
    with loaded.course_shown():
        assert_function(loaded, against=plain, outputs=only_logits)
        shown = f"{where(valid)}[None]"
        assert_function(loaded, part=real, outputs=only_logits, valid=valid, shown=shown)
        assert_function(loaded, against=plain, outputs=only_logits)
        for shift in (0, 1):
            documents = with_documents(case, ids, start).roll(shift, dims=1)
            assert_function(loaded, ids=documents, outputs=only_logits, document_start=start)
        assert_function(loaded, against=plain, outputs=only_logits)


def assert_long(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Sequences beyond every usual bound of tables and masks."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    assert_function(loaded, outputs=one_output(case))


def assert_outputs_kept(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Neither another call nor another model changes an output that was given, or the model."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    ids = loaded.call.named("ids")
    output = loaded.logits()
    kept, first = output.clone(), loaded.last
    loaded.logits(ids.flip(0))
    assert_identical(output, kept, first, because="another call was made")
    other = replace(case, seed=case.seed + 1, layers=6 if case.format == "small" else 8)
    call = other.call(device=gpt_checkpoint.device)
    load(gpt_checkpoint, call).logits()
    assert_identical(loaded.logits(), kept, first, because="another model was loaded")


def assert_same_with_autograd(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """The outputs are the same when gradients are recorded."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    ids = loaded.call.named("ids")
    plain = loaded.logits()
    with errors_named("logits()"), torch.enable_grad():
        recorded = loaded.model.logits(ids).detach()
    # Fused kernels without a backward pass may round otherwise: within the limits, not the bits.
    whole = oracle(loaded.call).expectation("logits")
    assert_close_to(recorded, whole, loaded.last, name="logits")
    assert_close_to(plain, whole, loaded.last, name="logits")


def assert_window(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """With a window of training every layer sees its blocks of 128 tokens."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    start = case.vocab - 1
    generator = torch.Generator().manual_seed(case.seed)
    length = case.drawn["blocks"] * 128 - case.drawn["ragged"]
    ids = torch.randint(start, (case.batch, length), generator=generator)
    for row in range(case.batch):
        places = torch.randint(length, (case.drawn["documents"],), generator=generator)
        ids[row, places] = start
    ids = ids.to(gpt_checkpoint.device)
    masks = {"document_start": start, "window_blocks": case.drawn["window"]}
    assert_function(loaded, ids=ids, outputs=one_output(case), **masks)


def assert_ids_checked(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """An id without an embedding is an error, and the last one with an embedding is not."""
    loaded = load(gpt_checkpoint, case.call(device=gpt_checkpoint.device))
    ids = loaded.call.named("ids").clone()
    row, token = case.seed % case.batch, case.seed % case.tokens
    ids[row, token] = case.vocab - 1
    assert_function(loaded, ids=ids, outputs=one_output(case))
    for wrong in (case.vocab, case.head_rows, -1, -case.vocab):
        ids[row, token] = wrong
        try:
            loaded.logits(ids)
        except ConformanceFailure as failure:
            if not failure.kind.startswith("raised "):
                raise
        else:
            summary = f"the id {wrong} has no embedding among {case.vocab}, and is taken"
            raise ConformanceFailure("accepted", summary, call=loaded.last)
    current_tally().comparisons["exact"] += 1


SCALE_FACTOR = 4.0
"""A power of two, so that scaling a weight rounds nothing."""


def fused(case: GPTCase) -> str:
    """Name of the fused attention weight within a block."""
    return "attn.qkv_w" if case.format == "small" else "attn.qkvo_w"


def layer_with_attention(case: GPTCase) -> int:
    """A block with attention, by the case's seed."""
    return [i for i in range(case.layers) if i != 7][case.seed % (case.layers - (case.layers > 7))]


def assert_normed_heads(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Scaling the rows of one head of W_q or W_k changes nothing but for epsilon.

    Of W_v it changes nothing in the medium model, and the function in the small one.
    """
    device, layer = gpt_checkpoint.device, layer_with_attention(case)
    width = case.head_dim or 128
    head = case.seed % case.heads
    rows = f"{head * width}:{(head + 1) * width}"
    plain = load(gpt_checkpoint, case.call(device=device))
    whole = oracle(plain.call)
    for slot in (0, 1, *((2,) if case.format == "medium" else ())):
        edit = f"state['blocks.{layer}.{fused(case)}'][{slot}, {rows}] *= {SCALE_FACTOR}"
        loaded = load(gpt_checkpoint, case.call(edit, device=device))
        # Epsilon is 1e-7 of a mean square of about 1, and moves the outputs by that share.
        assert_function(loaded, against=whole, relative=1e-5, outputs=one_output(case))


def assert_soft_cap(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Logits keep within the bounds, are at the middle for a zero head, and rise with it."""
    device, small = gpt_checkpoint.device, case.format == "small"
    low, middle, high = (0.0, 15.0, 30.0) if small else (-15.0, 0.0, 15.0)
    head = "lm_head.weight" if small else "lm_head_w"
    zero = load(gpt_checkpoint, case.call(f"state['{head}'].zero_()", device=device))
    logits = zero.logits()
    because = f"a head of zeros gives logits of {middle}"
    assert_identical(logits, torch.full_like(logits, middle), zero.last, because=because)
    large = load(gpt_checkpoint, case.call(f"state['{head}'] *= 1000", device=device))
    assert_function(large)
    logits = large.logits()
    # 15·z·rsqrt(z² + 225) rounds to 15.000001 for large z: two steps of float32 were seen.
    margin = high * STEP_ERROR[torch.float32]
    if float(logits.min()) < low - margin or float(logits.max()) > high + margin:
        found = f"logits from {float(logits.min()):.6g} to {float(logits.max()):.6g}"
        summary = f"{found}, expected from {low} to {high}"
        raise ConformanceFailure("out of bounds", summary, call=large.last)


def assert_value_lambdas(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """With (1, 0) value embeddings do not matter; with (0, 1) W_v does not where there are any."""
    layers = case.layers
    pairs = f"state['scalars'][{3 * layers}:{5 * layers}]"
    off = f"{pairs} = torch.tensor([1.0, 0.0] * {layers})"
    only = f"{pairs} = torch.tensor([0.0, 1.0] * {layers})"
    tables = tuple(f"state['value_embeds.{i}.weight'].neg_()" for i in range(3))
    with_tables = [i for i in (0, 1, 2, layers - 3, layers - 2, layers - 1) if i != 7]
    values = tuple(f"state['blocks.{i}.{fused(case)}'][2].neg_()" for i in with_tables)
    negated = "value embeddings with a factor of 0 were negated"
    assert_influence(gpt_checkpoint, case, {}, without={tables: negated}, before=(off,))
    drawn = case.seed % len(tables)
    assert_influence(
        gpt_checkpoint,
        case,
        {tables[drawn]: f"value embedding {drawn} was negated"},
        without={values: "rows of W_v with a factor of 0 were negated"},
        before=(only,),
    )


def used_skips(case: GPTCase) -> list[int]:
    """Indices of the skip weights that the function reads."""
    if case.format == "small":
        return list(range(case.layers // 2))
    return [source for layer, source in {9: 6, 10: 4, 11: 2}.items() if layer < case.layers]


def assert_skip_weights(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Of the first L scalars only those of skip connections matter, and each of them does."""
    used = used_skips(case)
    unused = [i for i in range(case.layers) if i not in used]
    edit = f"state['scalars'][{unused}] += 1"
    drawn = {used[case.seed % len(used)], used[-1]} if used else ()
    assert_influence(
        gpt_checkpoint,
        case,
        {f"state['scalars'][{i}] += 1": f"scalar {i}, a skip weight, was changed" for i in drawn},
        without={(edit,): f"scalars {unused}, which no skip connection uses, were changed"},
    )


def assert_eighth_block(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """The eighth block's attention lambdas do not matter; its block lambdas do."""
    layers = case.layers
    attention, block = 3 * layers + 14, layers + 14
    edit = f"state['scalars'][{attention}:{attention + 2}] += 1"
    changed = "a lambda of the eighth block, was changed"
    assert_influence(
        gpt_checkpoint,
        case,
        {f"state['scalars'][{i}] += 1": f"scalar {i}, {changed}" for i in (block, block + 1)},
        without={(edit,): "attention lambdas of the block without attention were changed"},
    )


def assert_padding_scalars(gpt_checkpoint: Subject, case: GPTCase) -> None:
    """Any number of scalars behind the fifth a layer, of any value, give one and the same model."""
    needed, device = 5 * case.layers, gpt_checkpoint.device
    loaded = assert_loads(gpt_checkpoint, case)
    for size, value in ((needed, 1), (needed + case.drawn["more"], 1), (needed + 4, -7)):
        tail = f"torch.full(({size - needed},), {float(value)})"
        edit = f"state['scalars'] = torch.cat([state['scalars'][:{needed}], {tail}])"
        other = load(gpt_checkpoint, case.call(edit, device=device))
        because = f"{size} scalars of which the first {needed} are the same"
        assert_identical(other.logits(), loaded.logits(), other.last, because=because)
