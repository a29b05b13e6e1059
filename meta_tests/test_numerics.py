"""The numerics ledger: what it stores, when it says worse, and what it refuses, as users meet it."""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch
from command_line import ROOT, site, start, suite_run
from numerics_factors import errors_of
from small_losses import LOSSES

from conformance.correct_variants import all_correct_variants
from conformance.harness import numerics, numerics_run
from conformance.harness.calls import Call
from conformance.harness.numerics import NumericsError, Recording, compare, parse, share
from conformance.harness.numerics_run import NumericsRun
from conformance.harness.tolerance import NOISE, POOLED, ErrorStatistics, expect, measure
from conformance.implementations.reference import Reference

RUN = {
    "suite_version": "1",
    "implementation": "mine 2",
    "profile": "gate",
    "seed": None,
    "device": "cpu",
    "torch": "2.13",
    "hypothesis": "6",
    "cpu": "x86_64 AVX512",
}
ID = "attention.full.matches-oracle"
LANE = "precision bfloat16 output"


def recording(*rows, id=ID, output=LANE, **differently):
    """A recording of one output, with a case for every item; a row may be a number for all four."""
    cases = {
        f"{number:08x}": [(row,) * 4 if isinstance(row, float) else row]
        for number, row in enumerate(rows)
    }
    return Recording({**RUN, **differently}, {id: {output: cases}})


def worst(base, head, **options):
    """The worst row of a comparison."""
    return compare(base, head, [ID], **options).rows[0]


# The floor that shares are of


def test_the_floor_is_the_limit_before_its_factors():
    value = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4)
    noise = value.abs()
    alone = expect(value, [], noise, torch.bfloat16)
    for name, factor in dataclasses.asdict(NOISE).items():
        assert getattr(alone.limits, name) == factor * getattr(alone.floor, name) > 0
    variant = value + 0.25
    pooled = expect(value, [variant], noise, torch.bfloat16)
    assert pooled.floor == measure(variant, value)
    for name, factor in dataclasses.asdict(POOLED).items():
        assert getattr(pooled.limits, name) == factor * getattr(pooled.floor, name)


def test_the_floor_is_widened_as_the_limits_are():
    value = torch.ones(2, 3, dtype=torch.float64)
    made = expect(value, [], value, torch.float16)
    assert made.widened(3).floor.largest == 3 * made.floor.largest
    raised = made.allowing(0.5)
    assert raised.floor.largest == pytest.approx(made.floor.largest + 0.5)
    assert raised.limits.largest == pytest.approx(made.limits.largest + 0.5)


# What is stored


@pytest.mark.parametrize(
    ("error", "floor", "expected"),
    [
        (0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0),
        (1.0, 4.0, 0.25),
        (1.0, 3.0, 0.3333),
        (1.0, 0.0, numerics.LARGEST_SHARE),
        (1.0, 1e-300, numerics.LARGEST_SHARE),
    ],
)
def test_a_share_is_finite_and_of_four_digits(error, floor, expected):
    assert share(error, floor) == expected


def made(*lines, case="Case(1)", dtype=torch.bfloat16, name="output"):
    call = Call("attention", lines, ("q",), (), dtype, SimpleNamespace(name=case))
    one = ErrorStatistics(1, 1, 1, 1)
    return numerics.measured(call, name, "precision", one, one)


def test_a_case_is_known_by_its_fields_and_the_source_of_the_call():
    first = made("q = 1")
    assert first == made("q = 1")
    assert first.output == "precision bfloat16 output"
    others = [made("q = 2"), made("q = 1", case="Case(2)")]
    assert len({first.case, *(other.case for other in others)}) == 3
    assert made("q = 1", name="lse").output == "precision bfloat16 lse"


def test_repetitions_of_a_case_are_kept_apart_and_all_is_sorted():
    entry = numerics.entry_of([made("z"), made("a", name="a"), made("z"), made("b")])
    assert list(entry) == sorted(entry)
    cases = entry["precision bfloat16 output"]
    assert list(cases) == sorted(cases)
    assert sorted(len(repetitions) for repetitions in cases.values()) == [1, 2]
    json.dumps(entry, allow_nan=False)


def test_a_file_is_read_as_it_was_written():
    wrote = recording(0.25, (0.0, 1.5, 1e-5, numerics.LARGEST_SHARE), seed="7")
    read = parse(wrote.text(), "base.json")
    assert read.text() == wrote.text()
    assert compare(wrote, read, [ID]).common == 2
    assert read.comparisons == wrote.comparisons == 2


def test_a_file_does_not_depend_on_the_order_of_the_run():
    ids = ["b.c.d", "a.b.c"]
    entry = recording(0.5).entries[ID]
    one, other = (Recording(RUN, {id: entry for id in order}) for order in (ids, ids[::-1]))
    assert one.text() == other.text()


def damaged(**changes):
    return json.dumps({**json.loads(recording(0.5).text()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a file of --numerics-record (no JSON)"),
        ("hello", "is not a file of --numerics-record (no JSON)"),
        ("[1, 2]", "is not a file of --numerics-record (its format is not"),
        ("{}", "is not a file of --numerics-record (its format is not"),
        ("3", "is not a file of --numerics-record (its format is not"),
        (recording(0.5).text()[:-4], "is cut off or damaged; record it again"),
        (recording(0.5).text()[:40], "is cut off or damaged; record it again"),
        (damaged(version=2), "has format version 2, expected 1"),
        (damaged(version=None), "has format version None, expected 1"),
        (damaged(requirements=[]), "a comparison is not 4 numbers from 0"),
        (damaged(requirements={ID: []}), "a comparison is not 4 numbers from 0"),
        (damaged(requirements={ID: {LANE: 3}}), "a comparison is not 4 numbers from 0"),
        (damaged(requirements={ID: {LANE: {"a": 3}}}), "a comparison is not 4 numbers"),
        (damaged(requirements={ID: {LANE: {"a": [[1, 2, 3]]}}}), "a comparison is not 4 numbers"),
        (damaged(requirements={ID: {LANE: {"a": [[1, 2, 3, -1]]}}}), "is not 4 numbers from 0"),
        (damaged(requirements={ID: {LANE: {"a": [[1, 2, 3, True]]}}}), "is not 4 numbers from 0"),
        (damaged(requirements={ID: {LANE: {"a": [["x"] * 4]}}}), "is not 4 numbers from 0"),
        (
            recording(0.5).text().replace("0.5,", "NaN,"),
            "is damaged: a comparison is not 4 numbers from 0",
        ),
        (recording(0.5).text().replace('"device": "cpu",', ""), "is damaged: it has no device"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(text, message):
    with pytest.raises(NumericsError) as refusal:
        parse(text, "base.json")
    assert message in str(refusal.value)
    assert "base.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


# When it is worse


def test_the_same_errors_are_not_worse():
    found = compare(recording(0.5, 0.25), recording(0.5, 0.25), [ID])
    assert {row.factor for row in found.rows} == {1}
    assert len(found.rows) == 4
    assert not found.worse
    assert (found.common, found.only_base, found.only_head) == (2, 0, 0)


@pytest.mark.parametrize(("factor", "worse"), [(1.4, False), (1.5, False), (1.6, True)])
def test_a_larger_error_is_worse_from_the_factor_on(factor, worse):
    assert bool(compare(recording(0.5), recording(0.5 * factor), [ID]).worse) is worse
    assert not compare(recording(0.5 * factor), recording(0.5), [ID]).worse
    assert not compare(recording(0.5), recording(0.5 * factor), [ID], 2.0).worse


def test_one_statistic_is_enough():
    row = worst(recording((0.5, 0.5, 0.5, 0.25)), recording((0.5, 0.5, 0.5, 1.0)))
    assert (row.statistic, row.factor) == ("gain", 4)
    assert row.statistic == numerics.STATISTICS[3]


def test_statistics_are_in_the_order_of_the_tolerance():
    names = [field.name.replace("_", " ") for field in dataclasses.fields(ErrorStatistics)]
    assert list(numerics.STATISTICS) == names


def test_an_error_far_below_the_floor_says_nothing():
    assert worst(recording(0.0), recording(0.0)).factor == 1
    assert worst(recording(0.0), recording(0.09)).factor == 1
    assert worst(recording(0.0001), recording(0.01)).factor == 1
    assert worst(recording(0.0), recording(0.4)).factor == pytest.approx(4)
    semantic = {"output": "semantic float32 output"}
    assert worst(recording(0.0, **semantic), recording(0.19, **semantic)).factor == 1
    assert worst(recording(0.0, **semantic), recording(0.4, **semantic)).factor == 2


def test_a_requirement_is_judged_by_the_root_mean_square_of_its_cases():
    row = worst(recording(0.3, 0.4), recording(0.3, 1.2))
    assert row.base == pytest.approx((0.125) ** 0.5)
    assert row.head == pytest.approx((0.765) ** 0.5)
    assert row.cases == 2


def test_lanes_are_apart():
    base, head = recording(0.5), recording(0.5)
    base.entries[ID]["semantic float32 output"] = {"a": [(0.5,) * 4]}
    head.entries[ID]["semantic float32 output"] = {"a": [(1.5,) * 4]}
    found = compare(base, head, [ID])
    assert {row.lane for row in found.worse} == {"semantic"}
    assert [row.factor for row in found.rows] == [3] * 4 + [1] * 4


def test_only_what_both_have_is_compared():
    base, head = recording(0.5, 0.5, 9.0), recording(0.5, 0.5)
    head.entries[ID]["precision bfloat16 lse"] = {"a": [(9.0,) * 4]}
    found = compare(base, head, [ID])
    assert (found.common, found.only_base, found.only_head) == (2, 1, 1)
    assert not found.worse


def test_a_repetition_is_held_against_the_same_repetition():
    base, head = recording((0.5,) * 4), recording((0.5,) * 4)
    base.entries[ID][LANE]["00000000"].append((0.9,) * 4)
    head.entries[ID][LANE]["00000000"].append((0.9,) * 4)
    assert {row.factor for row in compare(base, head, [ID]).rows} == {1}
    head.entries[ID][LANE]["00000000"].pop()
    found = compare(base, head, [ID])
    assert (found.common, found.only_base) == (1, 1)


def test_requirements_that_were_not_asked_for_do_not_count():
    base = recording(0.5)
    base.entries["attention.lse.finite"] = {LANE: {"a": [(0.5,) * 4]}}
    found = compare(base, recording(0.5), [ID])
    assert (found.common, found.only_base) == (1, 0)
    assert found.requirements == 1


def test_the_worst_comes_first():
    ids = ["a.b.c", "a.b.d", "a.b.e"]
    base = Recording(RUN, {id: {LANE: {"x": [(0.5,) * 4]}} for id in ids})
    head = Recording(RUN, {id: {LANE: {"x": [(e,) * 4]}} for id, e in zip(ids, (1.0, 2.0, 0.5))})
    found = compare(base, head, ids)
    assert [row.id for row in found.rows[::4]] == ["a.b.d", "a.b.c", "a.b.e"]
    assert {row.id for row in found.worse} == {"a.b.c", "a.b.d"}


def test_what_is_not_alike_is_said():
    found = compare(recording(0.5, torch="2.11", seed="3"), recording(0.5), [ID])
    assert found.differences == (
        "seed 3 in the base, none here",
        "torch 2.11 in the base, 2.13 here",
    )


@pytest.mark.parametrize(("name", "value"), [("device", "NVIDIA H100"), ("suite_version", "0")])
def test_another_device_or_suite_is_refused(name, value):
    with pytest.raises(NumericsError, match=rf"base.json was recorded with .* {value}, this run"):
        numerics.must_match(recording(0.5, **{name: value}), RUN, "base.json")
    numerics.must_match(recording(0.5), RUN, "base.json")


# In a run


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.json"
    path.write_text(recording(0.5, 0.5).text())
    return path


def ended(head, *, status=0, **options):
    """A run that measured what is in ``head``, and its exit status."""
    options = {name: str(value) for name, value in options.items()}
    run = NumericsRun(options.get("record"), options.get("check"))
    run.begin(RUN, [ID])
    for id, entry in head.entries.items():
        run.take(id, entry)
    return run, run.finish(status)


def said(run):
    return [text for _, text in run.lines]


def test_a_head_that_is_as_good_passes(base):
    run, status = ended(recording(0.5, 0.5), check=base)
    assert status == 0
    assert said(run) == [
        "numerics  worse in 0 of 1 requirement: limit 1.5 times the base, 2 comparisons in common"
    ]


def test_a_head_that_is_worse_fails_and_shows_by_how_much(base):
    run, status = ended(recording(1.0, 1.0), check=base)
    assert status == 1
    first, *table = said(run)
    assert first.startswith("numerics  worse in 1 of 1 requirement: ")
    assert len(table) == 6
    assert table[2].split() == [ID, "precision", "gain", "0.5", "1", "2.00"]
    assert f"| `{ID}` | precision | gain | 0.5 | 1 | 2.00 |" in run.markdown()
    assert run.summary()["worse"] == 1


@pytest.mark.parametrize("status", [1, 2, 3, 4, 6])
def test_the_exit_status_is_never_made_better(base, status):
    assert ended(recording(1.0, 1.0), check=base, status=status)[1] == status
    assert ended(recording(0.5, 0.5), check=base, status=status)[1] == status


def test_nothing_in_common_is_no_pass(base):
    run, status = ended(recording(0.5, 0.5, output="precision float16 output"), check=base)
    assert status == 6
    assert said(run) == [
        f"numerics  nothing in common with {base}: 2 comparisons only in the base, "
        "2 only in this run"
    ]


def test_more_rows_than_fit_are_counted(tmp_path):
    ids = [f"a.b.c{n}" for n in range(numerics_run.MOST_ROWS)]
    base = Recording(RUN, {id: {LANE: {"x": [(0.5,) * 4]}} for id in ids})
    head = Recording(RUN, {id: {LANE: {"x": [(1.0,) * 4]}} for id in ids})
    lines = numerics_run.table(compare(base, head, ids))
    assert lines[-1] == f"  … and {3 * len(ids)} more"


def test_a_recording_is_the_base_of_the_next_run(tmp_path):
    path = tmp_path / "new" / "folder" / "base.json"
    run, status = ended(recording(0.5, 0.25), record=path)
    assert status == 0
    assert said(run) == [f"numerics  recorded 2 comparisons of 1 requirement in {path}"]
    assert [each.name for each in path.parent.iterdir()] == ["base.json"]
    assert ended(recording(0.5, 0.25), check=path)[1] == 0


@pytest.mark.parametrize("status", [2, 3])
def test_a_run_that_did_not_end_is_no_base(base, status):
    before = base.read_text()
    run, ends = ended(recording(0.9), record=base, status=status)
    assert (base.read_text(), ends) == (before, status)
    assert said(run) == ["numerics  not recorded: the run did not end"]


def test_an_empty_recording_is_not_written(base):
    before = base.read_text()
    run, status = ended(Recording(RUN, {}), record=base)
    assert (status, base.read_text()) == (6, before)
    assert said(run)[0].startswith("numerics  not recorded: no requirement that passed compares")


def test_a_write_that_fails_leaves_the_older_file(base, monkeypatch):
    before = base.read_text()

    def full(self, text, *arguments, **options):
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(base), "write_text", full)
    run, status = ended(recording(0.9), record=base)
    assert (status, base.read_text()) == (4, before)
    assert said(run) == [f"numerics  not recorded: cannot write {base}: No space left on device"]
    assert [each.name for each in base.parent.iterdir()] == ["base.json"]


def test_places_that_cannot_be_used_are_refused_at_once(tmp_path, base):
    for options, message in (
        ({"check": tmp_path / "none.json"}, "there is no file"),
        ({"check": tmp_path}, "cannot read"),
        ({"record": tmp_path}, "it is not a file"),
        ({"record": base / "below.json"}, "cannot write"),
        ({"record": base, "check": base}, "are both"),
    ):
        with pytest.raises(NumericsError, match=message) as refusal:
            ended(recording(0.5), **options)
        assert "\n" not in str(refusal.value)
    with pytest.raises(NumericsError, match="needs a base"):
        NumericsRun(None, None, 2.0)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NumericsError, match="not a file of --numerics-record"):
        numerics_run.read_base(binary)


# From the command line

ONLY = "attention.full.matches or attention.gqa.multi-query or attention.extreme.single-key"
ADAPTERS = ROOT / "meta_tests" / "small_losses.py"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run that recorded the reference."""
    return start(
        ("numerics", "base"),
        lambda: suite_run(
            tmp_path_factory.mktemp("base"),
            "--impl=reference",
            "--numerics-record=base.json",
            only=ONLY,
        ),
    ).result()


def checked(tmp_path, recorded, *arguments, change=None, only=ONLY):
    """A run that was checked against the recorded one, of which a copy may be changed."""
    base = recorded.folder / "base.json"
    if change:
        base = tmp_path / "changed.json"
        base.write_text(
            json.dumps({**json.loads(recorded.folder.joinpath("base.json").read_text()), **change})
        )
    return suite_run(tmp_path, f"--numerics-check={base}", *arguments, only=only)


def numerics_lines(run):
    return [line for line in run.out.splitlines() if line.startswith("numerics  ")]


def test_two_recordings_of_the_same_are_equal_byte_for_byte(tmp_path, recorded):
    assert recorded.status == 0, recorded.text
    again = suite_run(tmp_path, "-n2", "--impl=reference", "--numerics-record=base.json", only=ONLY)
    assert again.status == 0, again.text
    first = (recorded.folder / "base.json").read_bytes()
    assert first == (again.folder / "base.json").read_bytes()
    value = json.loads(first)
    assert len(value["requirements"]) == 3
    lanes = {output.split()[0] for e in value["requirements"].values() for output in e}
    assert lanes == {"semantic", "precision"}


def test_the_same_implementation_is_as_good_as_itself(tmp_path, recorded):
    run = checked(tmp_path, recorded, "--impl=reference")
    assert run.status == 0, run.text
    (line,) = numerics_lines(run)
    assert line.startswith("numerics  worse in 0 of 3 requirements: "), run.text
    assert "only" not in line
    footer = run.report().footer["numerics"]
    assert (footer["worse"], footer["requirements"], footer["only_base"]) == (0, 3, 0)


@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_a_loss_inside_the_tolerance_fails_the_check_and_not_the_verdict(
    tmp_path, recorded, workers
):
    run = checked(tmp_path, recorded, f"--impl={ADAPTERS}:RoundedScores", *workers)
    assert run.status == 1, run.text
    assert run.verdict.startswith("partial: 3 of "), run.text
    assert {record["outcome"] for record in run.report().records} == {"pass"}
    assert numerics_lines(run)[0].startswith("numerics  worse in 2 of 3 requirements"), run.text
    assert any("implementation reference" in line for line in numerics_lines(run))
    assert run.report().footer["numerics"]["worse"] == 2
    summary = (run.folder / "out" / "summary.md").read_text()
    assert "### Numerics" in summary
    assert "| `attention.full.matches-oracle` | precision | " in summary


def test_a_requirement_that_failed_is_recorded_without(tmp_path):
    run = suite_run(
        tmp_path,
        "--impl=known-bug:attn-gqa-tile-not-interleave",
        "--numerics-record=base.json",
        only="attention.gqa.multi-query or attention.gqa.query-head",
    )
    assert run.status == 1, run.text
    kept = json.loads((tmp_path / "base.json").read_text())["requirements"]
    assert list(kept) == ["attention.gqa.multi-query"]


def test_other_cases_are_nothing_in_common(tmp_path, recorded):
    run = checked(tmp_path, recorded, "--impl=reference", only="attention.scale.zero")
    assert run.status == 6, run.text
    assert numerics_lines(run)[0].startswith("numerics  nothing in common with "), run.text


def test_another_torch_is_said_and_another_seed_too(tmp_path, recorded):
    change = {"torch": "0.1", "seed": "7"}
    run = checked(tmp_path, recorded, "--impl=reference", change=change)
    assert run.status == 0, run.text
    assert "numerics  seed 7 in the base, none here" in numerics_lines(run)
    assert any(line.startswith("numerics  torch 0.1 in the base") for line in numerics_lines(run))


@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_another_device_ends_the_run_in_one_line(tmp_path, recorded, workers):
    run = checked(tmp_path, recorded, "--impl=reference", *workers, change={"device": "TPU"})
    assert run.status == 4, run.text
    (line,) = [line for line in run.err.splitlines() if line.startswith("ERROR: ")]
    assert "was recorded with device TPU, this run has cpu" in line
    assert "Traceback" not in run.out + run.err, run.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--numerics-check=none.json",), "there is no file"),
        (("--numerics-check=pyproject.toml",), "is not a file of --numerics-record"),
        (("--numerics-check=none.json", "-n2"), "there is no file"),
        (("--numerics-factor=2",), "needs a base"),
        (("--numerics-record=.",), "it is not a file"),
        (("--numerics-check=base.json", "--numerics-factor=x"), "'x' is not a factor of 1 or more"),
        (("--numerics-check=base.json", "--numerics-factor=nan"), "is not a factor of 1 or more"),
    ],
)
def test_wrong_options_end_the_run_in_one_line(tmp_path, arguments, message):
    run = suite_run(tmp_path, *arguments, files={"pyproject.toml": "[tool.x]\n"})
    assert run.status == 4, run.text
    assert message in run.err, run.text
    assert "Traceback" not in run.out + run.err, run.text


def test_a_gpu_run_without_a_gpu_is_recorded_for_what_ran(tmp_path):
    run = suite_run(
        tmp_path, "-m", "gpu", "--numerics-record=base.json", CUDA_VISIBLE_DEVICES="", only=ONLY
    )
    assert run.status == 6, run.text
    assert not (tmp_path / "base.json").exists()
    assert "numerics  not recorded" in run.out


def test_what_is_compared_on_a_gpu_is_recorded_by_its_device(tmp_path):
    environment = {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(site()), str(ROOT / "meta_tests"))),
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = suite_run(
        tmp_path,
        *("-m", "gpu", "-p", "simulated_device"),
        *("--impl=reference", "--numerics-record=base.json"),
        only="attention.gqa.multi-query",
        fresh=True,
        **environment,
    )
    assert run.status == 0, run.text
    value = json.loads((tmp_path / "base.json").read_text())
    assert value["device"] == "Simulated GPU"
    assert list(value["requirements"]) == ["attention.gqa.multi-query[cuda]"]


# Losses

SOME = {
    "attention": [
        "attention.full.matches-oracle",
        "attention.gqa.matches-oracle",
        "attention.causal.matches-oracle",
        "attention.window.matches-oracle",
    ],
    "rotary": [
        "rotary.layout.half",
        "rotary.layout.interleaved",
        "rotary.positions.far",
        "rotary.partial.every-scaling",
    ],
}
"""Requirements that stand for their contract here; docs/numerics.md has the whole contracts."""


@pytest.fixture(scope="module")
def reference():
    made = {contract: errors_of(Reference(), contract, slugs) for contract, slugs in SOME.items()}
    assert all(len(made[c][0].entries) == len(SOME[c]) for c in SOME)
    return {contract: recording for contract, (recording, _) in made.items()}


@pytest.mark.parametrize("loss", LOSSES[:7], ids=lambda loss: loss.__name__)
def test_a_loss_passes_its_requirements_and_fails_the_ledger(reference, loss):
    contract = next(contract for contract in SOME if hasattr(loss, contract))
    head, failed = errors_of(loss(), contract, SOME[contract])
    assert not failed
    found = compare(reference[contract], head, head.entries)
    assert (found.only_base, found.only_head) == (0, 0)
    assert found.worse
    assert {row.lane for row in found.worse} == {"precision"}


@pytest.mark.parametrize(
    "name", ["attn-head-by-head", "attn-keys-reversed", "attn-float64-inside", "rotary-polar"]
)
def test_another_order_of_the_same_steps_is_not_worse(reference, name):
    variant = all_correct_variants()[name]
    head, failed = errors_of(variant.make(), variant.contract, SOME[variant.contract])
    assert not failed
    found = compare(reference[variant.contract], head, head.entries)
    assert found.common
    assert not found.worse
