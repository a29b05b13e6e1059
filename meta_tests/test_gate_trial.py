"""The trial of the gate on a machine: what it runs, what it counts, and when its bars are broken."""

import json
from collections import Counter

import pytest
from command_line import ROOT

from conformance.benchmarks import gate_trial as trial

RECORDS = sorted((ROOT / "conformance" / "benchmarks" / "records").glob("gate_trial*.json"))


def run(percent, **verdicts):
    rows = [
        {
            "benchmark": name,
            "verdict": verdict,
            "process_sd": 0.01,
            "round_sd": 0.02,
            "base_seconds": 0.003,
        }
        for name, verdict in verdicts.items()
    ]
    return {"injected_percent": percent, "benchmarks": rows}


def test_runs_of_every_kind_are_spread_over_the_trial():
    plan = trial.planned(20, [10.0, 3.0], 3)
    assert Counter(plan) == {0.0: 20, 10.0: 3, 3.0: 3}
    for percent in (10.0, 3.0):
        thirds = [plan[n * 26 // 3 : (n + 1) * 26 // 3] for n in range(3)]
        assert all(percent in third for third in thirds)


def test_a_false_alarm_and_a_slowdown_let_pass_break_the_bars():
    good = [run(0.0, a="OK", b="INCONCLUSIVE"), run(10.0, a="REGRESSED", b="INCONCLUSIVE")]
    assert trial.broken(good, 5.0) == []
    assert trial.broken([run(0.0, a="REGRESSED")], 5.0) == [
        "run 1: a REGRESSED, and nothing changed"
    ]
    assert trial.broken([run(10.0, a="OK")], 5.0) == ["run 1: a OK at +10 %"]
    assert trial.broken([run(3.0, a="OK")], 5.0) == []  # less than what it promises to find


def test_verdicts_are_counted_by_slowdown():
    runs = [run(0.0, a="OK", b="OK"), run(0.0, a="OK", b="VOID"), run(10.0, a="REGRESSED")]
    assert trial.counted(runs) == {"0": {"OK": 3, "VOID": 1}, "10": {"REGRESSED": 1}}
    text = trial.table(runs)
    assert "0 %            2" in text
    assert "3.00 ms     2.0 %       1.0 %" in text


def test_a_trial_goes_on_where_it_stood_and_not_with_other_settings(tmp_path):
    file = tmp_path / "record.json"
    settings = {"runs": 2, "inject": [10.0], "injected_runs": 3, "impl": "a"}
    file.write_text(json.dumps({"settings": settings, "runs": [run(0.0, a="OK")]}))
    assert trial.read_record(file, settings) == {"settings": settings, "runs": [run(0.0, a="OK")]}
    with pytest.raises(
        SystemExit, match="of a trial with other settings: impl is 'a', asked for 'b'"
    ):
        trial.read_record(file, settings | {"impl": "b"})
    assert trial.read_record(tmp_path / "none.json", {})["runs"] == []


def test_a_trial_that_goes_on_with_other_numbers_of_runs_says_so(tmp_path):
    file = tmp_path / "record.json"
    settings = {"runs": 4, "inject": [10.0], "injected_runs": 3}
    assert trial.planned(4, [10.0], 3) == [0.0, 10.0, 0.0, 10.0, 0.0, 10.0, 0.0]
    record = {"settings": settings, "runs": [run(percent, a="OK") for percent in (0.0, 10.0)]}
    file.write_text(json.dumps(record))
    changed = trial.read_record(file, settings | {"injected_runs": 1})
    assert changed["settings"] == settings, "as it was planned"
    assert changed["changes"] == [{"after": 2, "runs": 4, "injected_runs": 1}]
    assert trial.planned(4, [10.0], 1) == [0.0, 0.0, 10.0, 0.0, 0.0]
    assert trial.schedule(changed) == [0.0, 10.0, 10.0, 0.0, 0.0]
    file.write_text(json.dumps(changed))
    again = trial.read_record(file, settings | {"injected_runs": 1})
    assert again["changes"] == changed["changes"], "nothing changed since"


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_the_recorded_trials_meet_the_bars(file):
    record = json.loads(file.read_text())
    assert [each["injected_percent"] for each in record["runs"]] == trial.schedule(record)
    assert record["verdicts"] == trial.counted(record["runs"])
    detects = 3.0 if record["settings"]["device"] == "cuda" else 5.0
    assert trial.broken(record["runs"], detects) == []
