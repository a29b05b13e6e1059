"""Adapters that misbehave end in a clear report and in bounded time."""

import os

import pytest
from command_line import BOUND, ONE, ROOT, start, suite_run

from conformance.reports.reader import NoFooter, read_report

FAKES = ROOT / "meta_tests" / "fakes.py"

TWO = f"{ONE} or attention.causal.matches-oracle"

ON_RANKS = "parallel_linear.row.sum"

# Fake: requirements to select, further arguments.
CALLS = {
    "ReturnsNaN": (ONE, ()),
    "ReturnsZeros": (ONE, ()),
    "ReturnsList": (ONE, ()),
    "ReturnsInput": (ONE, ()),
    "ReturnsFirstAnswer": ("attention.full.matches-oracle or attention.invariance", ()),
    "ChangesInput": ("attention.causal.matches-oracle", ()),
    "PrintsMegabytes": (ONE, ()),
    "IgnoresOptions": (ONE, ()),
    "CallsExit": (ONE, ()),
    "RaisesOnce": ("attention.causal.matches-oracle", ()),
    "RaisesForLongKeys": (ONE, ()),
    "RaisesLongMessage": (ONE, ()),
    "Hangs": (ONE, ("--conformance-timeout", "1")),
    "HangsForGood": (ONE, ("--conformance-timeout", "1")),
    "EndsProcess": (TWO, ()),
    "EndsProcess -n 2": (TWO, ("-n", "2", "--max-worker-restart", "4")),
    "WrongSignature": (ONE, ()),
    "RequiresMore": (ONE, ()),
    "OffersNothing": (ONE, ()),
    "DeclinesEverything": (ONE, ()),
    "LosesARank": (ON_RANKS, ()),
    "HangsOnARank": (ON_RANKS, ("--hypothesis-profile", "smoke")),
}


def _start(name, tmp_path_factory):
    only, arguments = CALLS[name]

    def run():
        folder = tmp_path_factory.mktemp("fake")
        adapter = f"{FAKES}:{name.split()[0]}"
        return suite_run(folder, "--impl", adapter, *arguments, only=only)

    return start(("fake", name), run)


@pytest.fixture
def ended(tmp_path_factory, request):
    """How the run of a fake ended. All are begun at once, unless xdist shares them out."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        wanted = " ".join(item.function.__doc__ or "" for item in request.session.items)
        for name in CALLS:
            if len(request.session.items) > 1 or name in wanted:
                _start(name, tmp_path_factory)

    def of(name):
        # Bounded time: what runs longer than BOUND is killed, which raises here.
        run = _start(name, tmp_path_factory).result(timeout=BOUND * 4)
        assert "INTERNALERROR" not in run.out + run.err, run.text
        assert len(run.out) + len(run.err) < 60_000, "the output is not bounded"
        return run

    return of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ReturnsNaN", "non-finite"),
        ("ReturnsZeros", "wrong values"),
        ("ReturnsList", "wrong type"),
        ("ReturnsInput", "aliased output"),
        ("ChangesInput", "changed input"),
        ("PrintsMegabytes", "wrong values"),
        ("IgnoresOptions", "wrong values"),
        ("CallsExit", "raised SystemExit"),
        ("RaisesForLongKeys", "raised IndexError"),
        ("RaisesLongMessage", "raised ValueError"),
        ("Hangs", "timed out"),
    ],
)
def test_broken_calls_fail_with_their_kind(ended, name, kind):
    run = ended(name)
    assert run.status == 1, run.text
    assert run.verdict.startswith("fail: 1 of 1 requirement failed"), run.text
    (record,) = run.report().records
    assert record["outcome"] == "fail"
    # A check that asks which keys are seen may put wrong values in words of its own.
    assert record["failure"]["kind"] == kind or kind == "wrong values", record["failure"]["kind"]
    assert f"failed  {record['slug']}" in run.out, run.text
    assert "Traceback" not in run.out, run.text


def test_an_answer_kept_from_an_earlier_call_fails(ended):
    run = ended("ReturnsFirstAnswer")
    assert run.status == 1, run.text
    assert run.report().footer["verdict"] == "fail"


def test_one_exception_in_one_call_is_not_shrunk_away(ended):
    run = ended("RaisesOnce")
    assert run.status == 1, run.text
    (record,) = run.report().records
    assert record["outcome"] == "fail", record
    assert record["failure"]["kind"] == "raised RuntimeError"
    assert any("did not fail again" in line for line in record["failure"]["details"]), record


def test_a_call_that_cannot_be_interrupted_ends_the_process_with_its_stack(ended):
    run = ended("HangsForGood")
    assert run.status not in (0, 6), run.text
    assert "Timeout" in run.err, run.text
    assert "fakes.py" in run.err, run.text
    with pytest.raises(NoFooter):
        run.report()


def test_a_process_that_ends_leaves_no_verdict(ended):
    run = ended("EndsProcess")
    assert "verdict" not in run.out, run.text
    with pytest.raises(NoFooter, match="has no footer"):
        read_report(run.folder / "out")


def test_a_process_that_ends_under_xdist_fails_what_it_ran(ended):
    run = ended("EndsProcess -n 2")
    assert run.status == 1, run.text
    records = run.report().records
    assert records
    assert {record["failure"]["kind"] for record in records} == {"process died"}, run.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WrongSignature", "takes too few positional arguments"),
        ("RequiresMore", "requires 'rotary', which the contract does not have"),
        ("OffersNothing", "offers no contract"),
    ],
)
def test_unusable_adapters_are_a_usage_error(ended, name, message):
    run = ended(name)
    assert run.status == 4, run.text
    (line,) = [line for line in run.err.splitlines() if line.startswith("ERROR:")]
    assert message in line
    assert "Traceback" not in run.out + run.err, run.text


def test_declining_everything_is_inconclusive(ended):
    run = ended("DeclinesEverything")
    assert run.status == 6, run.text
    assert run.verdict.startswith("inconclusive: none of 1 planned requirements executed")
    assert "not today" in run.out


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [
        ("LosesARank", "rank died", "rank 1 of 2: its process ended with status 0"),
        ("HangsOnARank", "rank hung", "rank 1 of 2: did not answer within"),
    ],
)
def test_a_rank_that_is_lost_fails_the_requirement_and_is_named(ended, name, kind, found):
    run = ended(name)
    assert run.status == 1, run.text
    (record,) = run.report().records
    assert record["failure"]["kind"] == kind, record
    assert found in run.out, run.text
