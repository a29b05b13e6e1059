"""Merging the parts of a split run: the report of the whole run, or a refusal that names why."""

import copy

import pytest
from command_line import ROOT, pytest_run, start
from made_reports import CORE, EXTENDED, SUITE, ended, header_of, report_of, saved, three

from conformance.__main__ import main
from conformance.harness.verdict import judge
from conformance.reports import merging, reader, stream
from conformance.reports.files import PAGES
from conformance.reports.reader import read_report

# A real run

SLUGS = (
    "attention.causal.aligned-to-last-key",
    "attention.full.sees-every-key",
    "attention.gqa.query-head-reads-its-group",
    "attention.window.wider-than-cache",
    "rotary.output.deterministic",
    "rotary.pairs.half-truncated",
    "rotary.positions.offset",
    "rotary.positions.repeated",
)

FILES = [str(ROOT / "conformance" / f"test_{name}.py") for name in ("attention", "rotary")]


def without_times(line):
    diagnosis = line.get("diagnosis")
    timeless = {**diagnosis, "seconds": 0} if diagnosis else diagnosis
    return {**line, "duration": 0.0, **({"diagnosis": timeless} if "diagnosis" in line else {})}


def test_four_parts_of_a_run_merge_to_the_report_of_the_whole_run(tmp_path):
    def run(slugs, name, files=FILES):
        folder = tmp_path / name
        folder.mkdir()
        return pytest_run(
            folder,
            *files,
            f"--rootdir={folder}",
            "--impl=known-bug:attn-gqa-tile-not-interleave",
            "--hypothesis-profile=smoke",
            "--conformance-report=out",
            *("-k", " or ".join(slugs)),
        )

    begun = [
        start(("merged", tmp_path, 0), lambda: run(SLUGS, "whole")),
        start(("merged", tmp_path, 1), lambda: run(SLUGS[0::4], "one")),
        start(("merged", tmp_path, 2), lambda: run(SLUGS[1::4], "two")),
        start(("merged", tmp_path, 3), lambda: run(SLUGS[2::4], "three", files=FILES[::-1])),
        start(("merged", tmp_path, 4), lambda: run(SLUGS[3::4], "four")),
    ]
    whole, *parts = (found.result() for found in begun)
    assert whole.status == 1, whole.text
    folders = [str(part.folder / "out") for part in reversed(parts)]
    assert main(["merge", *folders, "--output", str(tmp_path / "merged"), "--partial"]) == 1
    expected, merged = whole.report(), read_report(tmp_path / "merged")
    assert len(expected.records) == len(SLUGS), whole.text
    assert merged.header == expected.header
    assert list(map(without_times, merged.records)) == list(map(without_times, expected.records))
    assert merged.footer == expected.footer
    assert merged.footer["verdict"] == "fail"
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == sorted(
        [reader.STREAM, *PAGES]
    )


# Made reports


def split(report, *shares):
    """Reports of the parts of a run, each of the ids in its share."""
    parts = []
    for share in shares:
        records = [record for record in report.records if record["id"] in share]
        parts.append(report_of(records, SUITE, list(share)))
    return parts


def merged(tmp_path, parts, *arguments):
    """The exit status of ``merge``."""
    folders = [str(saved(part, tmp_path / f"part{i}")) for i, part in enumerate(parts)]
    return main(["merge", *folders, "--output", str(tmp_path / "out"), *arguments])


@pytest.mark.parametrize(
    "outcomes",
    [
        ("pass", "pass", "pass"),
        ("pass", "fail", "not_offered"),
        ("pass", "inconclusive", "pass"),
        ("error", "pass", "pass"),
        ("declined", "not_run", "not_offered"),
    ],
)
def test_the_verdict_is_that_of_the_whole_run(tmp_path, outcomes):
    whole = three(*outcomes)
    parts = split(whole, [EXTENDED[0]], [CORE[1]], [CORE[0]])
    assert merged(tmp_path, parts) == whole.footer["exit_code"]
    found = read_report(tmp_path / "out")
    assert (found.header, found.records, found.footer) == (
        whole.header,
        whole.records,
        whole.footer,
    )


def test_parts_that_require_what_others_ran_are_one_green_run(tmp_path):
    """Each part alone is red, for what it did not run; the whole is not."""
    whole = three("pass", "pass", "pass", required=[*SUITE])
    parts = []
    for id in SUITE:
        record = [r for r in whole.records if r["id"] == id]
        parts.append(report_of(record, SUITE, [id], required=[*SUITE]))
        assert parts[-1].footer["exit_code"] == 6
    assert merged(tmp_path, parts) == 0


def test_a_missing_part_is_refused_unless_the_run_was_a_selection(tmp_path, capsys):
    parts = split(three("pass", "pass", "pass"), [CORE[0]], [CORE[1]])
    assert merged(tmp_path, parts) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of the 3 requirements of the suite are in none of the parts" in line
    assert EXTENDED[0] in line
    assert not (tmp_path / "out").exists()
    assert merged(tmp_path, parts, "--partial") == 0
    assert read_report(tmp_path / "out").footer["counts"]["deselected"] == 1


def test_a_requirement_in_two_parts_is_refused_by_name(tmp_path, capsys):
    parts = split(three("pass", "pass", "pass"), [CORE[0], CORE[1]], [CORE[1], EXTENDED[0]])
    assert merged(tmp_path, parts) == 4
    assert f"{CORE[1]} is planned in " in capsys.readouterr().err


def changed(part, path, value):
    """A part whose header has another value at ``path``."""
    header = copy.deepcopy(part.header)
    inner = header
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return reader.Report(header, part.records, part.footer)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("suite_version",), "9.9", "suite version"),
        (("profile",), "nightly", "profile is gate in the first and nightly in the second"),
        (("seed",), "7", "seed is not set in the first and 7 in the second"),
        (("implementation", "name"), "y", "implementation name is x in the first and y"),
        (("implementation", "version"), "2", "implementation version"),
        (("environment", "torch"), "9", "torch is 1 in the first and 9 in the second"),
        (("environment", "hypothesis"), "9", "hypothesis"),
        (("environment", "device"), "a GPU", "device"),
    ],
)
def test_parts_of_different_runs_are_refused(tmp_path, capsys, path, value, said):
    first, second = split(three("pass", "pass", "pass"), [CORE[0]], [CORE[1], EXTENDED[0]])
    assert merged(tmp_path, [first, changed(second, path, value)]) == 4
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line
    assert "part0" in line
    assert "part1" in line
    assert not captured.out


def test_parts_of_different_suites_are_refused(tmp_path, capsys):
    first = report_of([ended(CORE[0], "pass")], dict.fromkeys(CORE, "core"))
    second = report_of([ended(CORE[1], "pass")], SUITE)
    assert merged(tmp_path, [first, second]) == 4
    assert f"their suites differ, for example in {EXTENDED[0]}" in capsys.readouterr().err


def test_the_order_is_by_file_and_in_a_file_from_top_to_bottom(tmp_path):
    """As pytest collects them, whichever file a part collected first."""
    slugs = ("other.b.x", "rule.z.first", "rule.a.second")
    suite = dict.fromkeys(slugs, "core")
    late, early = (dict.fromkeys(order, "core") for order in ((*slugs[1:], slugs[0]), slugs))
    parts = [
        report_of([ended(slugs[2], "pass"), ended(slugs[1], "pass")], late),
        report_of([ended(slugs[0], "pass")], early),
    ]
    assert merged(tmp_path, parts) == 0
    found = read_report(tmp_path / "out")
    assert tuple(found.header["suite"]) == tuple(suite) == slugs
    assert tuple(found.header["planned"]) == slugs
    assert tuple(record["id"] for record in found.records) == slugs


def test_on_a_gpu_a_part_may_hold_what_has_no_place_there(tmp_path):
    """What is planned on the CPU beside a GPU is in the suite of its part alone."""
    suite = dict.fromkeys(CORE, "core")
    first = report_of([ended(CORE[0], "pass")], suite)
    second = report_of([ended(CORE[1], "pass"), ended(EXTENDED[0], "pass")], SUITE)
    parts = [changed(part, ("environment", "device"), "a GPU") for part in (first, second)]
    assert merged(tmp_path, parts) == 0
    assert read_report(tmp_path / "out").header["suite"] == SUITE


def test_what_may_differ_is_named(tmp_path, capsys):
    first, second = split(three("pass", "pass", "pass"), [CORE[0]], [CORE[1], EXTENDED[0]])
    second = changed(second, ("environment", "platform"), "Linux-9")
    second = changed(second, ("environment", "variables"), {"CONFORMANCE_PART": "2"})
    assert merged(tmp_path, [first, second]) == 0
    printed = capsys.readouterr().out
    assert "The parts differ in platform: cpu and Linux-9." in printed
    assert "The parts differ in CONFORMANCE_PART: not set and 2." in printed
    assert read_report(tmp_path / "out").header["environment"]["platform"] == "cpu and Linux-9"


def test_a_part_that_did_not_end_is_refused(tmp_path, capsys):
    first, second = split(three("pass", "pass", "pass"), [CORE[0]], [CORE[1], EXTENDED[0]])
    folders = [str(saved(part, tmp_path / name)) for part, name in ((first, "a"), (second, "b"))]
    file = tmp_path / "b" / reader.STREAM
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert main(["merge", *folders, "--output", str(tmp_path / "out")]) == 4
    assert "has no footer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_whose_requirements_never_reported_leaves_the_whole_inconclusive(tmp_path):
    ran = report_of([ended(CORE[0], "pass")], SUITE)
    head = header_of(SUITE, [CORE[1], EXTENDED[0]])
    records = [ended(CORE[1], "pass")]
    died = reader.Report(head, records, stream.footer(judge(reader.plan_of(head), records)))
    assert merged(tmp_path, [ran, died]) == 6
    assert read_report(tmp_path / "out").footer["verdict"] == "inconclusive"


def test_a_part_is_never_written_over(tmp_path, capsys):
    first, second = split(three("pass", "pass", "pass"), [CORE[0]], [CORE[1], EXTENDED[0]])
    folders = [str(saved(part, tmp_path / name)) for part, name in ((first, "a"), (second, "b"))]
    before = (tmp_path / "a" / reader.STREAM).read_bytes()
    assert main(["merge", *folders, "--output", folders[0]]) == 4
    assert "holds one of the parts" in capsys.readouterr().err
    assert (tmp_path / "a" / reader.STREAM).read_bytes() == before


def test_counts_of_the_numerics_ledger_add_up():
    def part(slugs, numerics):
        found = report_of([ended(slug, "pass") for slug in slugs], SUITE)
        return reader.Report(found.header, found.records, {**found.footer, "numerics": numerics})

    counts = {"worse": 1, "requirements": 2, "common": 3, "only_base": 0, "only_head": 4}
    base = {"base": "base.json", "factor": 1.5}
    parts = [("a", part(CORE, base | counts)), ("b", part(EXTENDED, base | counts))]
    whole, _ = merging.merge(parts)
    assert whole.footer["numerics"] == base | {name: 2 * n for name, n in counts.items()}
    parts[1] = ("b", part(EXTENDED, base | counts | {"base": "other.json"}))
    with pytest.raises(merging.CannotMerge, match="numerics base"):
        merging.merge(parts)
