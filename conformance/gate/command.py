"""``python -m conformance gate --base X --head Y``: is the head slower than the base?

X and Y are two adapters, or with ``--impl`` two git revisions of the repository around the current
folder (``.`` is the working tree as it is). Both are timed by turns in processes of their own.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.gate.result import USAGE, GateResult, Row
from conformance.gate.settings import GateSettings, read_gate_settings
from conformance.gate.sides import GateError, two_sides

if TYPE_CHECKING:
    from conformance.gate.measuring import ProcessPairs
    from conformance.gate.rule import Rule

PROGRESS_EVERY = 10.0
"""Seconds between lines of progress where nobody watches a terminal."""

INJECTED = 1.6
"""The known slowdown of the controls, as a multiple of the slowdown that is to be found."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--base", required=True, metavar="X", help="adapter or revision")
    parser.add_argument("--head", required=True, metavar="Y", help="adapter or revision")
    parser.add_argument(
        "--impl", metavar="NAME", help="the adapter; base and head are then git revisions, or ."
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="GLOB", help="benchmarks, by name"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--detect", type=_percent, metavar="PERCENT", help="the slowdown that is to be found"
    )
    parser.add_argument(
        "--margin", type=_percent, metavar="PERCENT", help="a slowdown that is let pass (1)"
    )
    parser.add_argument("--pairs", type=int, help="process pairs of the screen (8)")
    parser.add_argument("--max-pairs", type=int, help="process pairs where it is inconclusive (32)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU (1)")
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="METRIC",
        help="a deterministic metric that may become worse",
    )
    parser.add_argument(
        "--metrics-only", action="store_true", help="deterministic metrics alone: nothing is timed"
    )
    parser.add_argument(
        "--strict", action="store_true", help="an inconclusive benchmark fails, with status 6"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write gate.json, summary.md and junit.xml there"
    )
    parser.add_argument(
        "--slow-head",
        type=_percent,
        default=0.0,
        metavar="PERCENT",
        help="delay the head by so much, to see that the gate finds it",
    )


def run(options: argparse.Namespace) -> int:
    """Run the gate; the exit status (README.md)."""
    try:
        if importlib.util.find_spec("scipy") is None:
            raise GateError("the gate needs SciPy: pip install 'model-conformance[benchmarks]'")
        settings = read_gate_settings(Path.cwd())
        device = _device(options.device)
        with the_only_gate_on(device), progress_line() as progress:
            result = compare(options, settings, device, progress)
        lines = terminal_lines(result)
        if options.output is not None:
            _write(result, options.output)
    except GateError as error:
        print(f"conformance gate: {error}", file=sys.stderr)
        return USAGE
    print("\n".join(lines))
    return result.exit_code


def compare(
    options: argparse.Namespace,
    settings: GateSettings,
    device: str,
    progress: Callable[[str], None],
) -> GateResult:
    """Measure and judge every benchmark."""
    from conformance.benchmarks.workload import NoSuchWorkload, workloads
    from conformance.gate.decide import decide
    from conformance.gate.measuring import ProcessPairs

    try:
        names = [each.name for each in workloads(device, only=options.only or settings.only)]
    except NoSuchWorkload as error:
        raise GateError(str(error)) from None
    rules = {name: rule_of(name, options, settings, device) for name in names}
    with two_sides(options.base, options.head, options.impl) as (base, head):
        pairs = ProcessPairs(
            base,
            head,
            device=device,
            threads=options.threads if device == "cpu" else None,
            injected={name: rule.injected for name, rule in rules.items()},
            slow_head=options.slow_head,
            progress=progress,
        )
        timed = pairs.prepare(names)
        session = None
        if timed and not options.metrics_only:
            session = decide(pairs, timed, {name: rules[name] for name in timed})
    return result_of(options, settings, device, names, pairs, session)


def result_of(
    options: argparse.Namespace,
    settings: GateSettings,
    device: str,
    names: Sequence[str],
    pairs: ProcessPairs,
    session: Any,
) -> GateResult:
    """Every benchmark's row, and what holds for all."""
    from conformance.gate.rows import drift, not_offered, row_of

    accepted = [*options.accept, *settings.accept]
    skipped = not_offered(names, pairs)
    rows: list[Row] = [
        row_of(name, pairs, session, accepted) for name in names if name not in skipped
    ]
    notes = []
    if skipped:
        notes.append(f"{len(skipped)} of {len(names)} benchmarks are not offered by the base")
    if session is not None:
        notes.append(
            f"{session.comparisons} comparisons, {session.expected_false_flags:.2g} false flags "
            f"expected at most; {session.pairs} process pairs of benchmarks"
        )
        notes += [session.advice] if session.advice else []
    notes += drift(pairs.anchors)
    if options.slow_head:
        notes.append(f"the head was delayed by {100 * options.slow_head:g} % on purpose")
    return GateResult(
        base=described(options.base, pairs.origins["base"]),
        head=described(options.head, pairs.origins["head"]),
        device=device,
        rows=tuple(rows),
        void=session.reason if session is not None and session.verdict == "VOID" else None,
        strict=options.strict,
        notes=tuple(notes),
        details={
            "origins": pairs.origins,
            "machine": {**pairs.machine, "anchors": pairs.anchors},
            "not_offered": skipped,
            "session": session.as_json() if session is not None else None,
        },
    )


def described(name: str, origin: dict[str, Any]) -> str:
    """A side as it is shown: the user's word, and the version where there is one."""
    return f"{name} {origin['version']}" if origin.get("version") else name


def rule_of(
    benchmark: str, options: argparse.Namespace, settings: GateSettings, device: str
) -> Rule:
    """The rule of a benchmark: that of the device, with what the user says of it."""
    from conformance.gate.rule import PRESETS

    rule = PRESETS["gpu" if device == "cuda" else "cpu"]
    changes: dict[str, Any] = {}
    detects = options.detect or settings.share("detect", benchmark)
    if detects is not None:
        changes |= {"detects": detects, "injected": INJECTED * detects}
    if (margin := options.margin or settings.share("margin", benchmark)) is not None:
        changes["margin"] = margin
    if options.pairs is not None:
        changes["pairs"] = options.pairs
        changes["pairs_cap"] = max(options.pairs, rule.pairs_cap)
    if options.max_pairs is not None:
        changes["pairs_cap"] = options.max_pairs
    try:
        return replace(rule, **changes)
    except ValueError as error:
        raise GateError(f"{benchmark}: {error}") from None


@contextmanager
def the_only_gate_on(device: str) -> Iterator[None]:
    """Hold the lock of a device's timings: two gates at once would time each other."""
    place = Path(tempfile.gettempdir()) / f"conformance-gate-{os.getuid()}-{device}.lock"
    with place.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GateError(f"another gate runs on {device}; it holds {place}") from None
        yield


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """What shows one line of progress on standard error: the same line, or one now and then."""
    began = time.monotonic()
    watched = sys.stderr.isatty()
    shown = -PROGRESS_EVERY

    def show(line: str) -> None:
        nonlocal shown
        seconds = time.monotonic() - began
        if watched:
            print(f"\r\033[K[{seconds:4.0f} s] {line}"[:160], end="", file=sys.stderr, flush=True)
        elif seconds - shown >= PROGRESS_EVERY:
            shown = seconds
            print(f"[{seconds:4.0f} s] {line}", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if watched:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def terminal_lines(result: GateResult) -> list[str]:
    """What is printed at the end."""
    from conformance.gate.output import table_lines

    return list(table_lines(result))


def _device(asked: str | None) -> str:
    from conformance.benchmarks.machine import timed_device

    try:
        return timed_device(asked)
    except ValueError as error:
        raise GateError(str(error)) from None


def _write(result: GateResult, folder: Path) -> None:
    from conformance.gate.output import write_all

    try:
        write_all(result, folder)
    except OSError as error:
        raise GateError(f"--output: cannot write to {folder}: {error.strerror or error}") from None


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = 0.0
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage above 0 and below 100")
    return value / 100
