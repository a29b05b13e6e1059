"""Checks of a language model: its function on any number of ranks, caches, padding, positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conformance.harness.communication import ready_to_count
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.failures import ConformanceFailure, Inconclusive
from conformance.harness.lm_oracle import Oracle, everything, oracle
from conformance.harness.lm_subject import (
    Done,
    LMCall,
    Refusal,
    Step,
    cached,
    forward,
    lm_call,
    refusals,
    run,
    written,
)
from conformance.harness.qwen2_cases import QwenCase
from conformance.harness.requirement import current_tally
from conformance.harness.subject import LONGEST_LINE, Subject


def counted() -> None:
    """Count one comparison that no helper counts."""
    current_tally().comparisons["exact"] += 1


# The function


def assert_logits(
    output: Tensor,
    against: Oracle,
    call: LMCall,
    *,
    of_output: Callable[[Tensor], Tensor] = everything,
    of_oracle: Callable[[Tensor], Tensor] = everything,
) -> None:
    """A part of the logits is the same part of the oracle's."""
    try:
        part = of_output(output)
        assert_close_to(part, against.expectation(of_oracle), call, name="logits")
    except ConformanceFailure as failure:
        if of_output is not everything:  # its indices are not those of the output
            failure.shown_by = "print(out)"
        raise


def assert_function(
    causal_lm: Subject,
    case: QwenCase,
    *edits: str,
    dtype: torch.dtype | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """The logits of all tokens are the oracle's, on every rank."""
    call = lm_call(case, *edits, dtype=dtype, config=config)
    done = run(causal_lm, call, forward())
    assert_logits(done["a"], oracle(call), done.at("a"))


def assert_default_head_dim(causal_lm: Subject, case: QwenCase) -> None:
    """Without a head width in the configuration it is the model's width over the heads."""
    assert_function(causal_lm, case, "del config['head_dim']")


def assert_default_dtype(causal_lm: Subject, case: QwenCase) -> None:
    """Without a dtype being asked for, weights and logits have that of the configuration."""
    config = {"dtype": case.stored}
    edits = ()
    if case.seed % 2:  # as transformers 4 wrote it
        edits = ("config['torch_dtype'] = config.pop('dtype')",)
    assert_function(causal_lm, replace(case, stored="float32"), *edits, config=config)


def assert_even_attention(causal_lm: Subject, case: QwenCase) -> None:
    """Small queries, so that every key has nearly the same weight."""
    small = "state = {k: t * (0.05 if 'q_proj' in k else 1) for k, t in state.items()}"
    assert_function(causal_lm, case, small)


# One kind of weight


def assert_bias_counts(causal_lm: Subject, case: QwenCase, name: str) -> None:
    """With large biases of one projection, and none of the others, the logits are the oracle's."""
    edit = (
        f"state = {{k: t * 2 * k.endswith('{name}_proj.bias') if k.endswith('bias') else t"
        " for k, t in state.items()}"
    )
    assert_function(causal_lm, case, edit)


def assert_norm_weights(causal_lm: Subject, case: QwenCase) -> None:
    """With weights of norms of many sizes and both signs the logits are the oracle's."""
    edit = "state = {k: r(*t.shape) if k.endswith('norm.weight') else t for k, t in state.items()}"
    assert_function(causal_lm, case, edit)


def assert_norm_epsilon(causal_lm: Subject, case: QwenCase) -> None:
    """Where the stream is as small as the root of epsilon, the logits are the oracle's."""
    assert_function(causal_lm, case, "state['model.embed_tokens.weight'] *= 0.003")


def rounded_norms(call: LMCall) -> tuple[Tensor, Tensor]:
    """The final norm of a stream that is the embedding: rounded before the weight, and behind it."""
    state, ids = call.named("state"), call.named("ids")
    x = state["model.embed_tokens.weight"].to(call.dtype).double()[ids]
    weight = state["model.norm.weight"].to(call.dtype).double()
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    before = (normed.to(call.dtype).double() * weight).to(call.dtype)
    return before, (normed * weight).to(call.dtype)


def assert_rounded_before_weight(causal_lm: Subject, case: QwenCase) -> None:
    """The final norm alone, which is what the logits are where blocks add nothing.

    A head that picks channels shows the bits of the norm. How the mean is summed may change a few.
    """
    call = lm_call(
        case,
        "state = {k: t * ('o_proj' not in k and 'down_proj' not in k) for k, t in state.items()}",
        f"picked = torch.arange({case.vocab}) % {case.hidden}",
        f"state['lm_head.weight'] = torch.eye({case.hidden})[picked]",
        dtype=torch.bfloat16 if case.seed % 2 else torch.float16,
    )
    done = run(causal_lm, call, forward())
    assert_logits(done["a"], oracle(call), done.at("a"))
    right, wrong = rounded_norms(call)
    told = done["a"][..., : case.hidden]
    differ = right != wrong
    if int(differ.sum()) < ENOUGH_ROUNDED:
        raise Inconclusive("both ways round alike")
    counted()
    share = float((told == right)[differ].double().mean())
    if share < 1 - MAY_ROUND_OTHERWISE:
        summary = (
            f"only {share:.0%} of the {int(differ.sum())} values that tell the two apart are "
            "rounded before the weight"
        )
        raise ConformanceFailure("rounded late", summary, call=done.at("a"), shown_by="print(out)")


ENOUGH_ROUNDED = 30
MAY_ROUND_OTHERWISE = 0.1
"""The share of values that the last bit of a float32 mean may bring to the other side."""


# The cache


def parts_of(case: QwenCase) -> list[slice]:
    """The tokens of a case in two or three chunks, by its seed."""
    first = 1 + case.seed % (case.tokens - 4)
    ends = [first, first + 3, case.tokens] if case.seed % 3 else [first, case.tokens]
    starts = [0, *ends[:-1]]
    return [slice(start, end) for start, end in zip(starts, ends)]


def chunks(parts: list[slice], ids: str = "ids", **options: str) -> tuple[Step, ...]:
    """Forward passes one after the other, each with the cache of the one before."""
    steps, before = [], None
    for number, part in enumerate(parts):
        cut = f"[:, {part.start}:{part.stop}]"
        name = f"c{number}"
        given = {option: source + cut for option, source in options.items()}
        steps.append(forward(ids + cut, name=name, cache=before, **given))
        before = name
    return tuple(steps)


def joined(done: Done, steps: tuple[Step, ...]) -> Tensor:
    """The logits of chunks, one behind the other."""
    return torch.cat([done[step.name] for step in steps], dim=1)


def assert_chunks(
    causal_lm: Subject, case: QwenCase, parts: list[slice], valid: Tensor | None = None
) -> None:
    """Chunk by chunk, the logits of real tokens are the oracle's of all tokens at once."""
    call = lm_call(case)
    if valid is None:
        steps, whole = chunks(parts), oracle(call)
        valid = torch.ones(case.batch, case.tokens, dtype=torch.bool)
    else:
        steps, whole = chunks(parts, valid=written(valid)), oracle(call, valid=valid)
    done = run(causal_lm, call, *steps)
    for step, part in zip(steps, parts):
        real = valid[:, part]
        assert_logits(
            done[step.name],
            whole,
            done.at(step.name),
            of_output=lambda x: x[real][None],  # noqa: B023
            of_oracle=lambda x: x[:, part][real][None],  # noqa: B023
        )


def assert_one_by_one(causal_lm: Subject, case: QwenCase) -> None:
    """Token by token with a cache."""
    parts = [slice(t, t + 1) for t in range(case.tokens)]
    assert_chunks(causal_lm, case, parts)


def held_heads(case: QwenCase) -> list[list[int]]:
    """The key/value heads of each rank."""
    if case.ranks <= case.kv_heads:
        share = case.kv_heads // case.ranks
        return [list(range(rank * share, (rank + 1) * share)) for rank in range(case.ranks)]
    return [[rank // (case.ranks // case.kv_heads)] for rank in range(case.ranks)]


def assert_cache(causal_lm: Subject, case: QwenCase) -> None:
    """After each of two calls every rank has rotated keys, and values, of its heads and all tokens."""
    call = lm_call(case)
    cut = 1 + case.seed % (case.tokens - 1)
    first, second = chunks([slice(0, cut), slice(cut, case.tokens)])
    steps = (first, cached("c0", name="kv0"), second, cached("c1", name="kv1"))
    done, whole = run(causal_lm, call, *steps), oracle(call)
    for name, length in (("kv0", cut), ("kv1", case.tokens)):
        for rank, (heads, each) in enumerate(zip(held_heads(case), done.ran)):
            layers, at = each.outputs[name], done.at(name)
            check_layers(layers, case, at)
            for layer, pair in enumerate(layers):
                for what, found in zip(("keys", "values"), pair):
                    shape = (case.batch, len(heads), length, case.head_dim)
                    whose = f"{what} of layer {layer} on rank {rank}"
                    assert_tensor(found, shape, call.dtype, found.device, call=at, name=whose)
                    part = lambda x: x[:, heads, :length]  # noqa: B023
                    expected = whole.expectation(part, f"{what} {layer}")
                    assert_close_to(found, expected, at, name=whose)


def check_layers(layers: Any, case: QwenCase, call: LMCall) -> None:
    """A list of pairs of tensors, one a layer."""
    pairs = isinstance(layers, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)
        for pair in layers
    )
    if not pairs:
        summary = "cached() does not give a list of pairs of tensors"
        raise ConformanceFailure("wrong type", summary, call=call)
    if len(layers) != case.layers:
        summary = f"cached() gives {len(layers)} layers, expected {case.layers}"
        raise ConformanceFailure("wrong shape", summary, call=call)


def assert_cache_used_twice(causal_lm: Subject, case: QwenCase) -> None:
    """Two continuations of one cache; then the first is gone on from, and the first is repeated."""
    call = lm_call(case)
    cut = case.tokens - 3
    one, other = f"ids[:, {cut}:-1]", f"(ids[:, {cut}:-1] + 1) % {case.vocab}"
    done = run(
        causal_lm,
        call,
        forward(f"ids[:, :{cut}]", name="a"),
        forward(one, name="b", cache="a"),
        forward(other, name="c", cache="a"),
        forward("ids[:, -1:]", name="d", cache="b"),
        forward(one, name="e", cache="a"),
    )
    ids, whole = call.named("ids").clone(), oracle(call)
    ids[:, cut:] = (ids[:, cut:] + 1) % case.vocab
    rest = lambda x: x[:, cut:-1]
    assert_logits(done["b"], whole, done.at("b"), of_oracle=rest)
    assert_logits(done["c"], oracle(call, ids), done.at("c"), of_oracle=rest)
    assert_logits(done["d"], whole, done.at("d"), of_oracle=lambda x: x[:, -1:])
    assert_logits(done["e"], whole, done.at("e"), of_oracle=rest)


def assert_prompts_independent(causal_lm: Subject, case: QwenCase) -> None:
    """A long prompt, a short one, and the long one again; each is as if it were alone."""
    call = lm_call(case)
    short = f"ids.flip(0)[:, :{2 + case.seed % 2}]"
    done = run(
        causal_lm,
        call,
        forward(name="a"),
        forward(short, name="b"),
        forward(short, name="c", cache="b"),
        forward(name="d"),
    )
    ids = eval(short, call.namespace())
    twice = oracle(call, torch.cat([ids, ids], dim=1))
    length = ids.shape[1]
    assert_logits(done["b"], twice, done.at("b"), of_oracle=lambda x: x[:, :length])
    assert_logits(done["c"], twice, done.at("c"), of_oracle=lambda x: x[:, length:])
    assert_logits(done["d"], oracle(call), done.at("d"))


def assert_outputs_kept(causal_lm: Subject, case: QwenCase) -> None:
    """Logits that were given stay as they are when the model is called again."""
    call = lm_call(case)
    other = f"(ids + 1) % {case.vocab}"
    done = run(
        causal_lm,
        call,
        forward(name="a"),
        forward(other, name="b"),
        forward("ids[:, :1]", name="c", cache="a"),
        forward("ids[:, 1:2]", name="d", cache="c"),
    )
    for rank, each in enumerate(done.ran):
        for name in "abc":
            counted()
            if name in each.later:
                summary = f"the logits that step {name} gave on rank {rank} changed later"
                raise ConformanceFailure("output changed", summary, call=done.at("d"))
    assert_logits(done["a"], oracle(call), done.at("a"))


# What influences a token, and what does not


def assert_causal(causal_lm: Subject, case: QwenCase) -> None:
    """Other tokens from ``cut`` on leave the logits before it as they are, bit for bit."""
    call = lm_call(case)
    cut = 1 + case.seed % (case.tokens - 1)
    ids = call.named("ids").clone()
    ids[:, cut:] = (ids[:, cut:] + 1 + case.seed % (case.vocab - 1)) % case.vocab
    done = run(causal_lm, call, forward(), forward(written(ids), name="b"))
    because = f"tokens from {cut} on were replaced, and logits before them are compared"
    assert_identical(done["b"][:, :cut], done["a"][:, :cut], done.at("b"), because=because)
    assert_logits(done["b"], oracle(call, ids), done.at("b"))


def assert_rows_independent(causal_lm: Subject, case: QwenCase) -> None:
    """Other rows do not change the bits of a row, and each row alone has the oracle's logits."""
    call = lm_call(case)
    ids = call.named("ids")
    other = (ids + 1) % case.vocab
    row = case.seed % case.batch
    other[row] = ids[row]
    alone = f"ids[{row}:{row + 1}]"
    done = run(
        causal_lm, call, forward(), forward(written(other), name="b"), forward(alone, name="c")
    )
    because = "the other rows were replaced"
    assert_identical(done["b"][row], done["a"][row], done.at("b"), because=because)
    part = lambda x: x[row : row + 1]
    assert_logits(done["c"], oracle(call), done.at("c"), of_oracle=part)


def assert_equal_tokens(causal_lm: Subject, case: QwenCase) -> None:
    """A prompt of one token again and again."""
    call = lm_call(case)
    ids = torch.full((case.batch, case.tokens), case.seed % case.vocab)
    ids[1:] = case.vocab - 1
    done = run(causal_lm, call, forward(written(ids)))
    assert_logits(done["a"], oracle(call, ids), done.at("a"))


# Padding


def padding_of(case: QwenCase, side: str) -> Tensor:
    """Bool [batch, tokens], False at padding of another length in each row, none in one."""
    lengths = [(case.seed + 3 * row) % (case.tokens - 2) for row in range(case.batch)]
    lengths[case.seed % case.batch] = 0
    row = (case.seed + 1) % case.batch
    lengths[row] = 1 if case.seed % 2 else max(2, lengths[row])
    slot = torch.arange(case.tokens)
    valid = []
    for row, length in enumerate(lengths):
        left = side == "left" or (side == "mixed" and (row + case.seed // 2) % 2)
        valid.append(slot >= length if left else slot < case.tokens - length)
    if side == "mixed":  # and in the middle of the row that has none
        valid[case.seed % case.batch][case.tokens // 2] = False
    return torch.stack(valid)


def assert_padding(causal_lm: Subject, case: QwenCase, side: str) -> None:
    """Real tokens have the logits of their row alone, without padding."""
    call = lm_call(case)
    ids, valid = call.named("ids"), padding_of(case, side)
    done = run(causal_lm, call, forward(valid=written(valid)))
    real = lambda x: x[valid][None]
    masked = oracle(call, valid=valid)
    assert_logits(done["a"], masked, done.at("a"), of_output=real, of_oracle=real)
    row = int(valid.sum(-1).argmin())
    alone = oracle(call, ids[row][valid[row]][None])
    of_row = lambda x: x[row][valid[row]][None]
    assert_logits(done["a"], alone, done.at("a"), of_output=of_row)


def assert_padding_ids_ignored(causal_lm: Subject, case: QwenCase) -> None:
    """Other ids at padding leave the logits of real tokens as they are, bit for bit."""
    call = lm_call(case)
    ids, valid = call.named("ids"), padding_of(case, "mixed")
    other = torch.where(valid, ids, (ids + 1 + case.seed % 50) % case.vocab)
    options = {"valid": written(valid)}
    done = run(causal_lm, call, forward(**options), forward(written(other), name="b", **options))
    because = "the ids of padding were replaced"
    assert_identical(done["b"][valid], done["a"][valid], done.at("b"), because=because)


def assert_padding_then_decoding(causal_lm: Subject, case: QwenCase, side: str) -> None:
    """A padded prompt, then tokens without a mask: each has the logits of its row alone."""
    call = lm_call(case)
    prompt = case.tokens - 3
    valid = padding_of(replace(case, tokens=prompt), side)
    start = forward(f"ids[:, :{prompt}]", name="a", valid=written(valid))
    steps = [start]
    for number, token in enumerate(range(prompt, case.tokens)):
        before = steps[-1].name
        steps.append(forward(f"ids[:, {token}:{token + 1}]", name="bcd"[number], cache=before))
    done = run(causal_lm, call, *steps)
    ids = call.named("ids")
    whole = torch.cat([valid, torch.ones(case.batch, 3, dtype=torch.bool)], dim=1)
    output = torch.cat([done[name] for name in "bcd"], dim=1)
    against = oracle(call, ids, valid=whole)
    assert_logits(output, against, done.at("d"), of_output=lambda x: x, of_oracle=last_three)
    row = int(valid.sum(-1).argmin())
    alone = oracle(call, ids[row][whole[row]][None])
    of_row = lambda x: x[row : row + 1]
    assert_logits(output, alone, done.at("d"), of_output=of_row, of_oracle=last_three)


def last_three(x: Tensor) -> Tensor:
    """The last three tokens of every row."""
    return x[:, -3:]


def assert_padded_steps(causal_lm: Subject, case: QwenCase) -> None:
    """Chunks in which a row has nothing but padding, at the beginning and later."""
    valid = torch.ones(case.batch, case.tokens, dtype=torch.bool)
    row = case.seed % case.batch
    valid[row, :2] = False
    valid[(row + 1) % case.batch, 3] = False
    parts = [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, case.tokens)]
    assert_chunks(causal_lm, case, parts, valid)


# Positions


def assert_positions(causal_lm: Subject, case: QwenCase, positions: Tensor) -> None:
    """With explicit positions, at once and in two chunks, the logits are the oracle's."""
    call = lm_call(case, f"at = {written(positions)}")
    cut = 1 + case.seed % (case.tokens - 1)
    steps = chunks([slice(0, cut), slice(cut, case.tokens)], positions="at")
    done = run(causal_lm, call, forward(positions="at"), *steps)
    against = oracle(call, positions=positions)
    assert_logits(done["a"], against, done.at("a"))
    output = joined(done, steps)
    assert_logits(output, against, done.at(steps[-1].name), of_output=lambda x: x)


def default_positions(case: QwenCase) -> Tensor:
    """0, 1, 2 … in every row."""
    return torch.arange(case.tokens).repeat(case.batch, 1)


def assert_default_positions(causal_lm: Subject, case: QwenCase) -> None:
    """Positions that count from 0 are those that are taken without any."""
    assert_positions(causal_lm, case, default_positions(case))
    assert_function(causal_lm, case)


def assert_offset(causal_lm: Subject, case: QwenCase) -> None:
    """The same number added to all positions of a row leaves the logits as they are."""
    offsets = torch.tensor([case.drawn["offset"] * row for row in range(1, case.batch + 1)])
    positions = default_positions(case) + offsets[:, None]
    call = lm_call(case, f"at = {written(positions)}")
    done = run(causal_lm, call, forward(positions="at"))
    exact = oracle(call)
    moved = oracle(call, positions=positions)  # whose limits know how large angles are
    assert torch.allclose(moved.logits, exact.logits, rtol=1e-8, atol=1e-8)
    assert_logits(done["a"], moved, done.at("a"))


def assert_gaps(causal_lm: Subject, case: QwenCase) -> None:
    """Positions with gaps, other ones in each row."""
    generator = torch.Generator().manual_seed(case.seed)
    gaps = torch.randint(1, 30, (case.batch, case.tokens), generator=generator)
    assert_positions(causal_lm, case, gaps.cumsum(-1))


# What is refused


def assert_refused(
    causal_lm: Subject, call: LMCall, *steps: Step, names: tuple[object, ...] = ()
) -> None:
    """Every rank raises an exception at the last step, or while loading; its message has ``names``."""
    answers = refusals(causal_lm, call, *steps)
    at = replace(call, steps=steps)
    check_refusals(answers, at, names)
    last = steps[-1].name if steps else None
    for rank, refusal in enumerate(answers):
        if refusal.step != last:
            step = "loading" if refusal.step is None else f"step {refusal.step}"
            summary = f"{on_rank(rank, answers)}raised {refusal.type} in {step} already"
            details = (refusal.message[:LONGEST_LINE],)
            raise ConformanceFailure(f"raised {refusal.type}", summary, details=details, call=at)


def check_refusals(
    answers: list[Refusal | None], call: LMCall, names: tuple[object, ...] = ()
) -> None:
    """Every rank raised an exception whose message has ``names``."""
    counted()
    for rank, refusal in enumerate(answers):
        where = on_rank(rank, answers)
        if refusal is None:
            raise ConformanceFailure("accepted", f"{where}raised nothing", call=call)
        for name in names:
            if str(name) not in refusal.message:
                summary = f"{where}does not name {name}: {refusal.type}: {refusal.message[:200]}"
                raise ConformanceFailure("unnamed", summary, call=call)


def on_rank(rank: int, answers: list[Any]) -> str:
    """Which rank it is, where there are several."""
    return f"rank {rank} of {len(answers)} " if len(answers) > 1 else "the model "


def assert_ids_refused(causal_lm: Subject, case: QwenCase, wrong: int) -> None:
    """One id that is not of the vocabulary, at any place, with or without a cache."""
    call = lm_call(case)
    ids = call.named("ids").clone()
    ids[case.seed % case.batch, case.seed % case.tokens] = wrong
    if case.seed % 2:
        assert_refused(causal_lm, call, forward(written(ids)))
    else:
        assert_refused(causal_lm, call, forward(), forward(written(ids), name="b", cache="a"))


def assert_empty_refused(causal_lm: Subject, case: QwenCase) -> None:
    """No tokens at all, with or without a cache."""
    call = lm_call(case)
    if case.seed % 2:
        assert_refused(causal_lm, call, forward("ids[:, :0]"))
    else:
        assert_refused(causal_lm, call, forward(), forward("ids[:, :0]", name="b", cache="a"))


def assert_far_positions_refused(causal_lm: Subject, case: QwenCase) -> None:
    """One token more than there are positions: in a prompt, behind a cache, or by its position."""
    limit = case.max_positions
    call = lm_call(case, f"at = torch.arange({case.tokens}).repeat({case.batch}, 1)")
    fills = f"ids[:, :1].expand(-1, {limit})"
    way = case.seed % 3
    if way == 0:
        assert_refused(causal_lm, call, forward(f"ids[:, :1].expand(-1, {limit + 1})"))
    elif way == 1:
        assert_refused(causal_lm, call, forward(fills), forward("ids[:, :1]", name="b", cache="a"))
    else:
        moved = f"at + {limit - case.tokens + 1}"
        assert_refused(causal_lm, call, forward(), forward(name="b", positions=moved))


def assert_up_to_the_limit(causal_lm: Subject, case: QwenCase) -> None:
    """As many tokens as there are positions, at once and with a cache."""
    call = lm_call(case)
    last = case.tokens - 1
    steps = chunks([slice(0, last), slice(last, case.tokens)])
    done = run(causal_lm, call, forward(), *steps)
    assert_logits(done["a"], oracle(call), done.at("a"))
    part = lambda x: x[:, last:]
    assert_logits(done["c1"], oracle(call), done.at("c1"), of_oracle=part)


def assert_masks_checked(causal_lm: Subject, case: QwenCase) -> None:
    """A mask of another shape than the ids."""
    call = lm_call(case)
    shapes = ((case.batch, case.tokens + 1), (case.batch + 1, case.tokens), (case.batch, 2))
    shape = shapes[case.seed % 3]
    assert_refused(causal_lm, call, forward(), forward(name="b", valid=f"torch.ones{shape} > 0"))


def assert_ranks_refused(causal_lm: Subject, case: QwenCase) -> None:
    """A number of ranks that does not divide the heads, or the width of the MLP.

    Who splits them unevenly, and computes what is right, need not refuse.
    """
    uneven = case.heads % case.ranks != 0
    shared = case.kv_heads % case.ranks != 0 and case.ranks % case.kv_heads != 0
    size = case.heads if uneven else case.kv_heads if shared else case.intermediate
    call = lm_call(case)
    answers = refusals(causal_lm, call, forward())
    if not any(answers):
        done = run(causal_lm, call, forward())
        assert_logits(done["a"], oracle(call), done.at("a"))
        return
    check_refusals(answers, replace(call, steps=(forward(),)), (size, case.ranks))


MISSING = (
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
)


def assert_missing_refused(causal_lm: Subject, case: QwenCase) -> None:
    """A tensor that is missing stops every rank."""
    key = MISSING[case.seed % len(MISSING)]
    assert_refused(causal_lm, lm_call(case, f"del state['{key}']"), names=(key,))


def assert_fault_of_one_rank_refused(causal_lm: Subject, case: QwenCase) -> None:
    """A value that is not finite, in the part of one rank alone, stops every rank."""
    width = case.heads * case.head_dim // case.ranks
    row = (case.seed % case.ranks) * width + case.seed % width
    key = "model.layers.0.self_attn.q_proj.weight"
    assert_refused(causal_lm, lm_call(case, f"state['{key}'][{row}, 1] = float('nan')"))


def assert_output_bias_refused(causal_lm: Subject, case: QwenCase) -> None:
    """A bias of the output projection, which Qwen2 does not have, is not dropped in silence."""
    key = "model.layers.0.self_attn.o_proj.bias"
    call = lm_call(case, f"state['{key}'] = r({case.hidden})")
    assert_refused(causal_lm, call, names=("o_proj.bias",))


# Loading


def assert_any_seed(causal_lm: Subject, case: QwenCase) -> None:
    """Two loads with other random numbers give the same model, and it is the oracle's."""
    call = lm_call(case)
    one = run(causal_lm, call, forward())
    two = run(causal_lm, call, forward(), seed=7)
    because = "the model was loaded again, with other random numbers"
    assert_identical(two["a"], one["a"], two.at("a"), because=because)
    assert_logits(one["a"], oracle(call), one.at("a"))


def assert_directory_unchanged(causal_lm: Subject, case: QwenCase) -> None:
    """Loading and running write nothing into the directory."""
    call = lm_call(case)
    folder = Path(call.named("directory"))
    contents = lambda: {path.name: path.read_bytes() for path in folder.rglob("*")}
    before = contents()
    done = run(causal_lm, call, forward())
    counted()
    after = contents()
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            for path in folder.rglob("*"):
                path.unlink()
            for kept, data in before.items():
                (folder / kept).write_bytes(data)
            raise ConformanceFailure("changed file", f"{name} was changed", call=done.at("a"))


# Communication


def assert_two_reductions(causal_lm: Subject, case: QwenCase) -> None:
    """One more block costs two reductions and nothing else, in a prompt and in a step."""
    ready_to_count()
    fewer, more = (1, 2) if case.seed % 2 else (2, 3)
    counts: dict[int, dict[tuple[int, str], Counter[str]]] = {}
    for layers in (fewer, more):
        call = lm_call(replace(case, layers=layers))
        prompt = forward("ids[:, :-1]", counted=True)
        step = forward("ids[:, -1:]", name="b", cache="a", counted=True)
        done = run(causal_lm, call, prompt, step)
        counts[layers] = {
            (rank, name): each.collectives[name]
            for rank, each in enumerate(done.ran)
            for name in "ab"
        }
    for (rank, name), all_of_them in counts[more].items():
        counted()
        before = counts[fewer][rank, name]
        costs = all_of_them - before
        if costs != Counter(all_reduce=2) or before - all_of_them:
            told = ", ".join(f"{number} {kind}" for kind, number in costs.items()) or "nothing"
            summary = f"block {more} costs rank {rank} {told}, expected 2 all_reduce"
            raise ConformanceFailure("communication", summary, call=done.at(name))
