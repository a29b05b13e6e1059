"""What the regression gate says on this machine of code that did not change, and of code that did.

    python -m conformance.benchmarks.gate_trial --output record.json
    python -m conformance.benchmarks.gate_trial --device cuda --inject 3 --inject 5 --output record.json

The same adapter is base and head: so many times as it is (A/A), and so many times with the head
delayed by each of the injected slowdowns. The record has the verdict on every benchmark of every run,
and how far two copies of the base were apart; it is written after every run, and a trial that was
broken off goes on where it stood. It may go on with other numbers of runs, which the record says.

The bars: no A/A run says REGRESSED; no run with a slowdown of at least what the gate promises to find
says OK of any benchmark. Exit status 1 says that one is not met.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from conformance.benchmarks.machine import machine, rounded

Record = dict[str, Any]

MODULE = "conformance.benchmarks.gate_trial"
UNCHANGED = 0.0
NUMBERS = ("runs", "injected_runs")
"""The settings that may be others when a trial goes on."""


def planned(runs: int, injected: Sequence[float], injected_runs: int) -> list[float]:
    """The slowdowns of all runs in percent, those of one kind spread over the whole trial."""
    kinds = [(UNCHANGED, runs), *((percent, injected_runs) for percent in injected)]
    places = [((n + 0.5) / number, kind) for kind, number in kinds for n in range(number)]
    return [kind for _, kind in sorted(places)]


def stages(record: Record) -> list[tuple[int, Record]]:
    """The settings of a trial and of each change of them, with the number of runs before it."""
    found = [(0, dict(record["settings"]))]
    for change in record.get("changes", []):
        numbers = {name: change[name] for name in NUMBERS}
        found.append((change["after"], found[-1][1] | numbers))
    return found


def schedule(record: Record) -> list[float]:
    """The slowdowns of all runs of a trial: as it was planned, and from each change on as changed."""
    runs: list[float] = []
    for after, settings in stages(record):
        plan = planned(settings["runs"], settings["inject"], settings["injected_runs"])
        runs[after:] = plan[after:]
    return runs


def one_run(options: argparse.Namespace, percent: float) -> Record:
    """One gate run in a process of its own."""
    arguments = ["--base", options.impl, "--head", options.impl, "--device", options.device]
    arguments += [part for glob in options.only for part in ("--only", glob)]
    for name in ("pairs", "max_pairs", "detect"):
        if (value := getattr(options, name)) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    if percent:
        arguments += ["--slow-head", str(percent)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "conformance", "gate", *arguments, "--output", folder]
        ended = subprocess.run(command, stdout=subprocess.DEVNULL)
        file = Path(folder) / "gate.json"
        if not file.exists():
            raise SystemExit(ended.returncode or 1)
        found = json.loads(file.read_text())
    return rounded(
        {
            "injected_percent": percent,
            "verdict": found["verdict"],
            "minutes": (time.monotonic() - began) / 60,
            "id": found["machine"]["id"],
            "notes": found["notes"],
            "benchmarks": [short(row) for row in found["benchmarks"]],
        }
    )


def short(row: Record) -> Record:
    """What the record keeps of a benchmark."""
    judgement = row["details"].get("judgement") or {}
    evidence = judgement.get("confirmation") or judgement.get("screen") or {}
    return {
        "benchmark": row["benchmark"],
        "verdict": row["verdict"],
        "head": row["head"],
        "control": row["control"],
        "pairs": row["pairs"],
        "process_sd": evidence.get("process_sd"),
        "round_sd": evidence.get("round_sd"),
        "order_effect": row["details"].get("order_effect"),
        "base_seconds": row["base_seconds"],
    }


def counted(runs: Iterable[Record]) -> dict[str, dict[str, int]]:
    """How often each verdict was said of a benchmark, by the slowdown in percent."""
    found: dict[str, Counter[str]] = {}
    for run in runs:
        verdicts = found.setdefault(f"{run['injected_percent']:g}", Counter())
        verdicts.update(row["verdict"] for row in run["benchmarks"])
    return {kind: dict(counts) for kind, counts in found.items()}


def broken(runs: Iterable[Record], detects: float) -> list[str]:
    """The bars that are not met, a line each; ``detects`` in percent."""
    lines = []
    for number, run in enumerate(runs, 1):
        percent = run["injected_percent"]
        for row in run["benchmarks"]:
            if percent == UNCHANGED and row["verdict"] == "REGRESSED":
                lines.append(f"run {number}: {row['benchmark']} REGRESSED, and nothing changed")
            if percent >= detects and row["verdict"] in ("OK", "IMPROVED"):
                lines.append(f"run {number}: {row['benchmark']} {row['verdict']} at +{percent:g} %")
    return lines


def table(runs: Sequence[Record]) -> str:
    """Verdicts by slowdown, and spreads by benchmark."""
    words = ("REGRESSED", "INCONCLUSIVE", "VOID", "OK", "IMPROVED")
    lines = [f"{'slowdown':<10}{'runs':>6}" + "".join(f"{word:>14}" for word in words)]
    for kind, counts in counted(runs).items():
        number = sum(f"{run['injected_percent']:g}" == kind for run in runs)
        cells = "".join(f"{counts.get(word, 0):>14}" for word in words)
        lines.append(f"{kind + ' %':<10}{number:>6}{cells}")
    lines += ["", f"{'benchmark':<66}{'base':>10}{'round sd':>10}{'process sd':>12}"]
    for name in dict.fromkeys(row["benchmark"] for run in runs for row in run["benchmarks"]):
        rows = [row for run in runs for row in run["benchmarks"] if row["benchmark"] == name]
        spread = [
            statistics.median(values) * 100
            for key in ("round_sd", "process_sd")
            if (values := [row[key] for row in rows if row[key] is not None])
        ]
        seconds = [row["base_seconds"] for row in rows if row["base_seconds"] is not None]
        if spread and seconds:
            base = f"{statistics.median(seconds) * 1e3:.2f} ms"
            lines.append(f"{name:<66}{base:>10}{spread[0]:>8.1f} %{spread[1]:>10.1f} %")
    return "\n".join(lines)


def read_record(file: Path | None, settings: Record) -> Record:
    """The record so far, or an empty one; it says so if the numbers of runs are others from here on."""
    if file is None or not file.exists():
        return {"benchmark": MODULE, "settings": settings, "machine": machine(), "runs": []}
    record = json.loads(file.read_text())
    _, before = stages(record)[-1]
    other = sorted(name for name in settings if before.get(name) != settings[name])
    refused = [name for name in other if name not in NUMBERS]
    if refused:
        listed = ", ".join(f"{n} is {before.get(n)!r}, asked for {settings[n]!r}" for n in refused)
        raise SystemExit(f"{file} is of a trial with other settings: {listed}; name another file")
    if other:
        change = {"after": len(record["runs"]), **{name: settings[name] for name in NUMBERS}}
        record.setdefault("changes", []).append(change)
    return record


def main() -> int:
    """Run what is missing of the trial."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n")[0])
    parser.add_argument("--impl", default="torch-kernels", help="the adapter of base and head")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", action="append", help="default: attention.* and experts.*")
    parser.add_argument("--runs", type=int, default=20, help="as it is (20)")
    parser.add_argument("--inject", type=float, action="append", help="percent (10)")
    parser.add_argument("--injected-runs", type=int, default=3, help="of each slowdown (3)")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--max-pairs", type=int)
    parser.add_argument("--detect", type=float, help="percent")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.only = options.only or ["attention.*", "experts.*"]
    options.inject = options.inject or [10.0]
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    record = read_record(options.output, settings)
    plan = schedule(record)
    for number, percent in enumerate(plan[len(record["runs"]) :], len(record["runs"]) + 1):
        print(f"run {number} of {len(plan)}: +{percent:g} %", file=sys.stderr, flush=True)
        record["runs"].append(one_run(options, percent))
        record["verdicts"] = counted(record["runs"])
        if options.output is not None:
            options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["runs"]))
    detects = options.detect or (3.0 if options.device == "cuda" else 5.0)
    lines = broken(record["runs"], detects)
    for line in lines:
        print(f"not met: {line}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
