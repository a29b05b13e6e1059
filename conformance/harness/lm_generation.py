"""Checks of generation: greedy and sampled tokens, where rows end, and that all ranks agree.

Greedy tokens are compared as far as the oracle is sure of them: where two logits are nearer to each
other than both may be off, a correct implementation may choose either.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from conformance.harness.compare import assert_identical
from conformance.harness.failures import ConformanceFailure, Inconclusive
from conformance.harness.lm_checks import assert_refused, counted, padding_of
from conformance.harness.lm_oracle import Greedy, greedy, oracle
from conformance.harness.lm_subject import Done, LMCall, forward, generate, lm_call, run, written
from conformance.harness.qwen2_cases import QwenCase
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject

NEW = 5
"""How many tokens are generated."""


def assert_follows(
    output: Tensor, expected: Greedy, call: LMCall, *, ends: tuple[int, ...] = (), margin=0.0
) -> None:
    """New tokens are those of greedy decoding, up to the end of each row, as far as they are sure."""
    prompt = output.shape[1] - (output.shape[1] - call.named("ids").shape[1])
    compared = 0
    for row, sure in enumerate(expected.sure(margin)):
        tokens = expected.tokens[row].tolist()
        length = min(sure, end_of(tokens, ends))
        found = output[row, prompt:].tolist()
        compared += length
        if found[:length] != tokens[:length]:
            step = next(i for i in range(length) if found[i : i + 1] != tokens[i : i + 1])
            summary = f"row {row} goes on with {found[:length]}, expected {tokens[:length]}"
            gap = f"the logit of token {step} is {expected.gaps[row, step]:.3g} above the next"
            raise ConformanceFailure("wrong tokens", summary, details=(gap,), call=call)
    if not compared:
        raise Inconclusive("no greedy token is sure: two logits are too near to each other")
    counted()


def end_of(tokens: list[int], ends: tuple[int, ...]) -> int:
    """How many tokens a row has up to the first that ends it, that one included."""
    return next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))


def assert_greedy(causal_lm: Subject, case: QwenCase) -> None:
    """Without sampling the most likely token is taken, again and again."""
    call = lm_call(case)
    done = run(causal_lm, call, generate(max_new_tokens=f"{NEW}"))
    assert_length(done, NEW)
    assert_follows(done["a"], greedy(call, NEW), done.at("a"))


def assert_length(done: Done, new: int) -> None:
    """So many tokens follow the prompts."""
    counted()
    ids = done.call.named("ids")
    found = done["a"].shape[1] - ids.shape[1]
    if found != new:
        summary = f"{found} tokens follow the prompts, expected {new}"
        raise ConformanceFailure("wrong length", summary, call=done.at("a"))


def assert_padded_prompts(causal_lm: Subject, case: QwenCase) -> None:
    """Each row of left-padded prompts goes on as if it were alone."""
    call = lm_call(case)
    valid = padding_of(case, "left")
    done = run(causal_lm, call, generate(max_new_tokens=f"{NEW}", valid=written(valid)))
    assert_length(done, NEW)
    ids = call.named("ids")
    assert_follows(done["a"], greedy(call, NEW, ids, valid), done.at("a"))


def assert_nothing_new(causal_lm: Subject, case: QwenCase) -> None:
    """Asked for no tokens, generation gives the prompts."""
    call = lm_call(case)
    done = run(causal_lm, call, generate(max_new_tokens="0"))
    assert_length(done, 0)


# Where rows end


def path_of(call: LMCall) -> Greedy:
    """The greedy path, all of it sure; Inconclusive where it is not."""
    path = greedy(call, NEW)
    if min(path.sure()) < NEW:
        raise Inconclusive("not every greedy token is sure")
    return path


def unused(path: Greedy, call: LMCall) -> list[int]:
    """Tokens that the path does not have."""
    taken = set(path.tokens.flatten().tolist())
    return [token for token in range(call.case.vocab) if token not in taken]


def ending_tokens(path: Greedy, case: QwenCase) -> tuple[int, ...]:
    """A token of each row, at another place in each."""
    return tuple(
        int(path.tokens[row, (case.seed + 2 * row) % (NEW - 1)]) for row in range(case.batch)
    )


def assert_ends(
    causal_lm: Subject, call: LMCall, path: Greedy, ends: tuple[int, ...], **options: str
) -> None:
    """Rows are right up to their end, and generation stops with the one that ends last."""
    done = run(causal_lm, call, generate(max_new_tokens=f"{NEW}", **options))
    last = max(end_of(tokens, ends) for tokens in path.tokens.tolist())
    assert_follows(done["a"], path, done.at("a"), ends=ends)
    assert_length(done, last)


def assert_eos_scalar(causal_lm: Subject, case: QwenCase) -> None:
    """One token that ends a row, given as a number."""
    call = lm_call(case)
    path = path_of(call)
    end = ending_tokens(path, case)[0]
    assert_ends(causal_lm, call, path, (end,), eos=f"{end}")


def assert_eos_list(causal_lm: Subject, case: QwenCase) -> None:
    """Several tokens that end a row; the last of them is the one that comes."""
    call = lm_call(case)
    path = path_of(call)
    ends = (*unused(path, call)[:1], *ending_tokens(path, case))
    assert_ends(causal_lm, call, path, ends, eos=f"{list(ends)}")


def assert_eos_of_config(causal_lm: Subject, case: QwenCase) -> None:
    """The tokens of ``config.json``, a number or a list, where nothing else tells."""
    plain = lm_call(case)
    path = path_of(plain)
    ends = ending_tokens(path, case)
    given: Any = list(ends) if case.seed % 2 or case.batch > 1 else ends[0]
    call = lm_call(case, config={"eos_token_id": given})
    assert_ends(causal_lm, call, path, ends)


def assert_eos_of_generation_config(causal_lm: Subject, case: QwenCase) -> None:
    """``generation_config.json`` overrules ``config.json``."""
    plain = lm_call(case)
    path = path_of(plain)
    ends, first = late_tokens(path), int(path.tokens[0, 0])
    if first in ends:
        raise Inconclusive("greedy decoding repeats itself")
    given = list(ends) if len(ends) > 1 else ends[0]
    line = f"after: _ = write('generation_config.json', {{'eos_token_id': {given}}})"
    call = lm_call(case, saved=(line,), config={"eos_token_id": first})
    assert_ends(causal_lm, call, path, ends)


def late_tokens(path: Greedy) -> tuple[int, ...]:
    """Of each row the token that comes for the first time the latest."""
    rows = path.tokens[:, :-1].tolist()
    return tuple(max(row, key=row.index) for row in rows)


def assert_eos_overrules(causal_lm: Subject, case: QwenCase) -> None:
    """An end that is given with the call is the only one."""
    plain = lm_call(case)
    path = path_of(plain)
    first = int(path.tokens[0, 0])
    call = lm_call(case, config={"eos_token_id": first})
    end = unused(path, call)[0]
    done = run(causal_lm, call, generate(max_new_tokens=f"{NEW}", eos=f"{end}"))
    assert_follows(done["a"], path, done.at("a"))
    assert_length(done, NEW)


# Sampling

SAMPLED = {"do_sample": "True"}


def assert_ranks_sample_alike(causal_lm: Subject, case: QwenCase) -> None:
    """Every rank has the same sampled tokens, though its random numbers are its own."""
    call = lm_call(case)
    options = SAMPLED | {"temperature": "2.0", "max_new_tokens": f"{NEW}"}
    done = run(causal_lm, call, generate(**options))  # which compares the ranks
    assert_length(done, NEW)


def assert_cold_is_greedy(causal_lm: Subject, case: QwenCase) -> None:
    """At a temperature near 0 the most likely token is drawn."""
    call, cold = lm_call(case), 1e-4
    options = SAMPLED | {"temperature": f"{cold}", "max_new_tokens": f"{NEW}"}
    done = run(causal_lm, call, generate(**options))
    improbable = 40 * cold  # a token so far behind is drawn once in e^40 times
    assert_follows(done["a"], greedy(call, NEW), done.at("a"), margin=improbable)


ROWS, MANY_ROWS = 256, 512
"""How many tokens are drawn from one distribution."""


def assert_temperature(causal_lm: Subject, case: QwenCase) -> None:
    """Tokens are drawn by the softmax of the logits over the temperature."""
    temperature = (0.5, 1.0, 2.0)[case.seed % 3]
    call = lm_call(case)
    many = f"ids[:1].expand({ROWS}, -1)"
    options = SAMPLED | {"temperature": f"{temperature}", "max_new_tokens": "1"}
    done = run(causal_lm, call, generate(many, **options), seed=case.seed, alike=False)
    drawn = done["a"][:, -1]
    check_vocabulary(drawn, case, done)
    logs = (oracle(call, call.named("ids")[:1]).logits[0, -1] / temperature).log_softmax(-1)
    chances = logs.exp()
    mean = float((chances * logs).sum())
    spread = float((chances * (logs - mean).square()).sum().sqrt()) / math.sqrt(ROWS)
    found = float(logs[drawn].mean())
    current_tally().comparisons["semantic"] += 1
    if abs(found - mean) > DEVIATIONS * spread:
        summary = (
            f"at temperature {temperature} the log-likelihood of {ROWS} drawn tokens is "
            f"{found:.3g} on average, expected {mean:.3g} within {DEVIATIONS * spread:.2g}"
        )
        raise ConformanceFailure("wrong distribution", summary, call=done.at("a"))


DEVIATIONS = 6
"""Standard deviations of the mean; a right sample is farther off once in five hundred million times."""


def assert_in_vocabulary(causal_lm: Subject, case: QwenCase) -> None:
    """However hot, no token is drawn that is not of the vocabulary, and every one can be."""
    call = lm_call(case)
    many = f"ids[:1].expand({MANY_ROWS}, -1)"
    options = SAMPLED | {"temperature": "1000.0", "max_new_tokens": "1"}
    done = run(causal_lm, call, generate(many, **options), alike=False)
    drawn = done["a"][:, -1]
    check_vocabulary(drawn, case, done)
    # Nearly uniform: of 113 tokens about one is missing among 512 draws.
    if len(drawn.unique()) < 0.9 * case.vocab:
        summary = (
            f"{len(drawn.unique())} of {case.vocab} tokens were drawn in {drawn.numel()} times"
        )
        raise ConformanceFailure("wrong distribution", summary, call=done.at("a"))


def check_vocabulary(drawn: Tensor, case: QwenCase, done: Done) -> None:
    """Every token is one of the vocabulary."""
    counted()
    if int(drawn.min()) < 0 or int(drawn.max()) >= case.vocab:
        wrong = int(drawn.max()) if int(drawn.max()) >= case.vocab else int(drawn.min())
        summary = f"token {wrong} is not of the vocabulary of {case.vocab}"
        raise ConformanceFailure("not in the vocabulary", summary, call=done.at("a"))


def assert_temperature_refused(causal_lm: Subject, case: QwenCase) -> None:
    """Sampling at a temperature of 0 or below is refused."""
    temperature = ("0.0", "-1.0")[case.seed % 2]
    options = SAMPLED | {"temperature": temperature, "max_new_tokens": "2"}
    assert_refused(causal_lm, lm_call(case), forward(), generate(name="b", **options))


def assert_generation_repeats(causal_lm: Subject, case: QwenCase) -> None:
    """Generation leaves nothing behind: after it, prompts have the logits that they had."""
    call = lm_call(case)
    done = run(
        causal_lm,
        call,
        forward(name="a"),
        generate(name="b", max_new_tokens=f"{NEW}"),
        forward(name="c"),
        generate(name="d", max_new_tokens=f"{NEW}"),
    )
    because = "other tokens were generated in between"
    assert_identical(done["c"], done["a"], done.at("c"), because=because)
    assert_identical(done["d"], done["b"], done.at("d"), because=because)
