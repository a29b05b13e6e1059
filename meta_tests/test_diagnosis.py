"""A failure is named where it is a known bug, and described where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from command_line import ONE, ROOT, environment, pytest_run
from diagnosing import LONG, failed
from elsewhere import ELSEWHERE
from mutants import MUTANTS
from test_near_misses import NEAR

from conformance.diagnosis import record, search, wording
from conformance.diagnosis.agreement import texts_agree
from conformance.diagnosis.signatures import signatures
from conformance.harness import data, profiles
from conformance.harness.compared import Compared, axes_of
from conformance.harness.failures import ConformanceFailure
from conformance.harness.requirement import all_requirements
from conformance.harness.tolerance import ErrorStatistics, Expectation
from conformance.known_bugs import all_known_bugs

BUGS = all_known_bugs()
RECORDED = data.diagnosis()


@pytest.fixture(autouse=True)
def as_at_the_start_of_a_run():
    torch.set_num_threads(1)
    search.forget()
    with profiles.temporarily(profiles.without_shrinking(profiles.PROFILES["gate"])):
        yield


def named(found):
    return [frozenset(candidate.ids) for candidate in found.named]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_documented_bug_of_other_code_is_named(name):
    """With other operations, sizes and dtypes than those of the planted bug."""
    one = ELSEWHERE[name]
    _, found = failed(one.requirement, one.method)
    assert one.bugs in named(found), found
    assert {entry(id) for id in found.named[0].ids} == {entry(id) for id in one.bugs}, found


def entry(id):
    return all_known_bugs()[id].entry


def test_documented_bugs_of_other_code_are_named_on_another_device():
    """A simulated GPU, in a process of its own: the harness moves tensors there for the search, too."""
    variables = environment(installed=False)
    variables["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "meta_tests")))
    ended = subprocess.run(
        [sys.executable, ROOT / "meta_tests" / "elsewhere_on_gpu.py", "--simulated"],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    found = {line["name"]: line for line in map(json.loads, ended.stdout.splitlines())}
    assert found.keys() == ELSEWHERE.keys()
    for name, line in found.items():
        assert {entry(id) for id in line["named"]} == {entry(id) for id in line["is"]}, name


def test_the_message_cites_bug_and_rule_and_ends_with_the_reproduction():
    failure, _ = failed("attention.scale.explicit", ELSEWHERE["scale_is_not_read"].method)
    text = str(failure)
    name = "attn-scale-wrong-divisor"
    cited = f"looks like  {name} ({data.catalogue()[name]['source']}), equal on "
    assert cited in text
    assert BUGS[name].mechanism in text
    assert text.index("looks like") < text.index("\nreproduce\n")


def test_the_rule_that_a_named_bug_breaks_is_said_where_another_one_failed():
    failure, _ = failed("attention.gqa.matches-oracle", ELSEWHERE["heads_are_tiled"].method)
    rule = all_requirements()["attention.gqa.query-head-reads-its-group"].rule
    assert f"Correct: {rule}" in str(failure)
    failure, _ = failed(
        "attention.gqa.query-head-reads-its-group", ELSEWHERE["heads_are_tiled"].method
    )
    assert "Correct: " not in str(failure), "the message begins with it"


def test_a_fault_that_nobody_documented_is_described_and_not_named():
    def last_head_reversed(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return torch.cat([out[:, :-1], out[:, -1:].flip(2)], dim=1)

    failure, found = failed("attention.full.matches-oracle", last_head_reversed)
    assert found.named == ()
    assert any("heads" in line for line in found.seen), found
    text = str(failure)
    assert "looks like" not in text
    assert f"seen        {found.seen[0]}."[:60] in text


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("SinksNotInLse", "attn-sink-ignored"),
        ("LseWithoutBias", "attn-float-mask-cast-to-bool"),
        ("FalsyScaleIsDefault", "attn-scale-wrong-divisor"),
        ("EmptyCacheIsNaN", "attn-fully-masked-row-nan"),
        ("TruncateOfLayersIgnored", "rope-yarn-attention-factor-ignored.truncate"),
    ],
)
def test_a_bug_is_not_named_where_the_rule_that_it_breaks_is_kept(name, same_as):
    """All cases of one requirement are equal to what the bug gives, and the cause is another."""
    broken = (NEAR | MUTANTS)[name]
    _, found = failed(broken.breaks, getattr(broken.make(), broken.contract))
    assert found.named == ()
    rule = BUGS[same_as].breaks
    assert found.seen[0].startswith(f"the same as {same_as} gives on "), found
    assert found.seen[0].endswith(f"but that fails {rule}, and this does not"), found


def test_two_bugs_that_do_the_same_are_both_named():
    bug = BUGS["attn-gqa-tile-not-interleave.time"]
    failure, found = failed(bug.breaks, bug.make().attention)
    ids = {"attn-gqa-tile-not-interleave", "attn-gqa-tile-not-interleave.time"}
    assert {id for candidate in found.named for id in candidate.ids} == ids
    assert "\n       or   attn-gqa-tile-not-interleave.time (" in str(failure)


def test_bugs_that_fit_alike_are_told_apart_by_other_requirements():
    """Both give NaN for a row that sees nothing; only one of them for other rows."""
    bug = BUGS["attn-fully-masked-row-nan"]
    _, found = failed(bug.breaks, bug.make().attention)
    assert named(found)[0] == {bug.id}


def test_what_an_implementation_declines_is_not_asked_of_a_bug():
    """In float32 the planted bug fails where the implementation says nothing."""
    one = ELSEWHERE["heads_are_tiled_in_16_bits"]
    failure, found = failed(one.requirement, one.method)
    assert failure.lane == "precision"
    assert one.bugs in named(found)


def test_later_failures_of_a_contract_try_what_explained_the_earlier_ones():
    method = ELSEWHERE["heads_are_tiled"].method
    _, first = failed("attention.gqa.matches-oracle", method)
    _, second = failed("attention.gqa.query-head-reads-its-group", method)
    assert named(second)[0] == named(first)[0]


def test_an_answer_that_others_may_fit_says_so_when_it_is_used_again(monkeypatch):
    """The search that found it was cut; for the next failure nothing else is tried."""
    one = ELSEWHERE["heads_are_tiled"]
    whole = search.candidates(all_requirements()[one.requirement])

    def cut_after_the_first(self, tried, **options):
        keep(self, tried, **options)
        self.cut = self.cut or self.all > 0

    keep = search.Search._keep_fitting
    monkeypatch.setattr(search.Search, "_keep_fitting", cut_after_the_first)
    _, first = failed(one.requirement, one.method)
    assert first.note == f"time was over with {len(whole)} of {len(whole)} known bugs tried"
    _, second = failed("attention.gqa.query-head-reads-its-group", one.method)
    assert named(second)[0] == named(first)[0]
    assert second.note == first.note


def test_without_time_nothing_is_guessed():
    one = ELSEWHERE["heads_are_tiled"]
    _, found = failed(one.requirement, one.method, seconds=0.0)
    assert found.named == ()
    assert found.note == search.NO_TIME
    assert found.seen, "what can be seen costs nothing"


def test_a_search_that_breaks_does_not_lose_the_failure(monkeypatch):
    def broken(requirement):
        raise RuntimeError("no candidates today")

    monkeypatch.setattr(search, "candidates", broken)
    one = ELSEWHERE["heads_are_tiled"]
    _, found = failed(one.requirement, one.method)
    assert found.named == ()
    assert found.note == "the search ended with RuntimeError: no candidates today"
    assert found.seen


def test_all_failures_of_a_contract_share_its_time():
    one = ELSEWHERE["heads_are_tiled"]
    failed(one.requirement, one.method, seconds=LONG)
    left = search._memories["attention"].clock.left
    assert left < LONG
    _, later = failed("attention.gqa.query-head-reads-its-group", one.method)
    assert search._memories["attention"].clock.left < left
    assert later.seconds > 0


def test_a_diagnosis_is_plain_data():
    _, found = failed("attention.scale.explicit", ELSEWHERE["scale_is_not_read"].method)
    data = json.loads(json.dumps(wording.as_data(found)))
    (one,) = data["named"]
    assert one["bugs"] == ["attn-scale-wrong-divisor"]
    assert one["mechanism"] == BUGS["attn-scale-wrong-divisor"].mechanism
    assert one["correct"] == all_requirements()["attention.scale.explicit"].rule
    assert one["source"]


# What is on record of all planted bugs


def test_every_planted_bug_is_on_record():
    assert sorted(RECORDED) == sorted(BUGS), "run python fixtures/regenerate.py diagnosis"


def test_the_right_bug_is_named_first_in_95_percent_and_no_wrong_one_alone():
    first = [id for id, row in RECORDED.items() if entry_first(row) == BUGS[id].entry]
    alone = [id for id, row in RECORDED.items() if row["named"] and [id] not in row["named"]]
    assert len(first) >= 0.95 * len(BUGS), sorted(set(BUGS) - set(first))
    assert alone == []


def entry_first(row):
    return BUGS[row["named"][0][0]].entry if row["named"] and len(row["named"][0]) == 1 else None


QUICK = ("attention", "rotary", "experts", "moe_router", "distillation_loss", "shared_core")


@pytest.mark.parametrize(
    "id", [next(id for id, bug in BUGS.items() if bug.contract == contract) for contract in QUICK]
)
def test_what_is_on_record_is_what_diagnosis_says(id):
    assert record.row(id, LONG)["named"][0] == RECORDED[id]["named"][0]


# Texts and signatures


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        (
            "query 0 sees keys [0]; it must see [0, 1]",
            "query 0 sees keys [0]; it must see [0, 1]",
            True,
        ),
        ("query 0 sees keys [0]", "query 0 sees keys [1]", False),
        ("off by 0.12345", "off by 0.12346", True),
        ("off by 0.12345", "off by 0.13345", False),
        ("off by 1.2e-05", "off by 1.2001e-05", True),
        ("12 of 96 differ", "13 of 96 differ", False),
        ("blocks.1.weight is zero", "blocks.2.weight is zero", False),
        ("rank 1 of 4 has 0.5", "rank 1 of 3 has 0.5", False),
    ],
)
def test_texts_agree_up_to_the_rounding_of_printed_numbers(mine, theirs, same):
    assert texts_agree([mine], [theirs], 1e-3) is same
    assert not texts_agree([mine], [theirs, "more"], 1e-3)


LIMIT = 1e-5


def seen(found, expected, contract="attention"):
    """What is seen of an output."""
    limits = ErrorStatistics(LIMIT, LIMIT, LIMIT, LIMIT)
    expectation = Expectation(expected.double(), limits, False, limits)
    axes = axes_of(contract, "output", expected.ndim)
    compared = Compared("output", axes, found.double(), expectation)
    return signatures(ConformanceFailure("wrong values", "wrong", compared=compared))


@pytest.fixture
def right():
    return torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_zeros_are_seen(right):
    assert seen(torch.zeros_like(right), right)[0] == "every element of output is 0"
    found = right.clone()
    found[:, 2:] = 0
    assert seen(found, right)[0] == "output is 0 only in [2 .. 3] of 4 heads"


def test_nan_is_seen_where_it_is(right):
    found = right.clone()
    found[1, :, 4] = torch.nan
    line = "output is not finite only in [4] of 6 tokens and in [1] of 2 batch rows"
    assert seen(found, right)[0] == line


def test_a_factor_is_seen(right):
    assert "output is 4 times what it must be" in seen(4 * right, right)
    assert not any("times" in line for line in seen(4 * right + 0.1, right))


def test_a_permutation_of_heads_is_seen(right):
    line = "the heads of output are those of [0, 2, 1, 3], in this order"
    assert line in seen(right[:, [0, 2, 1, 3]], right)
    assert not any("in this order" in each for each in seen(right + 1, right))


def test_a_transposition_is_seen(right):
    square = right[:, :, :6, :6].contiguous()
    assert "output is transposed in its last two axes" in seen(square.mT, square)


def test_rows_from_some_token_on_are_seen(right):
    found = right.clone()
    found[:, :, 3:] += 0.5
    assert "output is wrong only in [3 .. 5] of 6 tokens" in seen(found, right)


def test_every_other_head_is_seen(right):
    wide = right.repeat(1, 2, 1, 1)
    found = wide.clone()
    found[:, 1::2] += 0.5
    assert "output is wrong only in [1, 3 .. 7] of 8 heads" in seen(found, wide)


def test_an_error_that_grows_with_the_position_is_seen(right):
    found = right + torch.arange(6)[:, None] * 1e-3
    assert any(line.startswith("the error grows with the position") for line in seen(found, right))
    assert not any("grows" in line for line in seen(right + 1e-3, right))


def test_nothing_is_said_of_an_output_that_is_wrong_everywhere(right):
    noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(1)).double()
    assert seen(noise, right) == ()


def test_a_passing_run_does_not_load_diagnosis():
    """It costs nothing until something fails."""
    program = (
        "import sys, pytest\n"
        f"status = pytest.main(['conformance/test_attention.py', '-q', '-k', '{ONE}'])\n"
        "assert status == 0, status\n"
        "assert not [name for name in sys.modules if 'conformance.diagnosis' in name]\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("--conformance-diagnosis", "300"), True), (("--conformance-diagnosis", "0"), False)],
)
def test_a_failing_run_has_the_diagnosis_that_its_seconds_allow(tmp_path, arguments, named):
    """In the terminal and in the report; none where they are 0."""
    ended = run_of_a_bug(tmp_path, *arguments)
    assert ended.status == 1, ended.text
    [record] = ended.report().records
    assert ("looks like  attn-causal-top-left-with-cache" in ended.out) == named, ended.text
    assert (record["diagnosis"] is not None) == named


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "ten"])
def test_seconds_that_are_none_are_refused_in_one_line(tmp_path, seconds):
    ended = run_of_a_bug(tmp_path, f"--conformance-diagnosis={seconds}")
    assert ended.status == 4, ended.text
    assert f"'{seconds}' is not a number of seconds, 0 or more" in ended.err
    assert "Traceback" not in ended.text


def run_of_a_bug(folder, *arguments):
    """A run of one requirement that a planted bug fails."""
    bug = ("--impl", "known-bug:attn-causal-top-left-with-cache")
    return pytest_run(
        folder,
        str(ROOT / "conformance" / "test_attention.py"),
        f"--rootdir={folder}",
        *("--conformance-report", str(folder / "out"), "-k", ONE),
        *bug,
        *arguments,
    )
