"""``python -m conformance.benchmarks --impl NAME``: time the kernels of an implementation.

    python -m conformance.benchmarks --impl torch-sdpa --impl torch-flex-compiled --record
    python -m conformance.benchmarks --bundled --device cuda --budget 600 --record
    python -m conformance.benchmarks --list

Exit status: 0; 1 where an output was wrong or a call failed; 4 for a mistake of the user.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

MISTAKE = 4
CONTRACTS = ("attention", "experts", "shared_core_block")
"""What there are workloads of."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print a line a row; the exit status."""
    options = parse(arguments)
    from conformance.benchmarks.machine import timed_device
    from conformance.benchmarks.workload import NoSuchWorkload, workloads
    from conformance.harness.resolve import CannotResolve

    try:
        device = timed_device(options.device)
        chosen = workloads(device, only=options.only)
        if options.list:
            print("\n".join(each.name for each in chosen))
            return 0
        if options.budget is not None and options.budget <= 0:
            raise ValueError(f"--budget is {options.budget:g}, expected seconds above 0")
        if options.rounds < 1:
            raise ValueError(f"--rounds is {options.rounds}, expected 1 at least")
        if options.record is not None and not options.record.is_dir():
            raise ValueError(f"--record: there is no folder {options.record}")
        adapters = implementations(options)
    except (NoSuchWorkload, CannotResolve, ValueError) as error:
        print(f"conformance: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    return measure(options, device, chosen, adapters)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    from conformance.benchmarks.recording import RECORDS

    parser = argparse.ArgumentParser(
        prog="python -m conformance.benchmarks",
        description="Time of attention and of experts, beside an anchor, with outputs checked.",
    )
    add = parser.add_argument
    add("--impl", action="append", metavar="NAME", help="as for the suite; may be repeated")
    add("--bundled", action="store_true", help="every bundled adapter that can be imported")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--only", action="append", default=[], metavar="GLOB", help="workloads by name")
    add("--list", action="store_true", help="print the names of the workloads, and end")
    add("--rounds", type=int, default=10, help="of each row (default 10)")
    add("--seed", type=int, default=0, help="of all inputs (default 0)")
    add("--threads", type=int, default=1, help="of torch on the CPU (default 1)")
    add("--budget", type=float, metavar="SECONDS", help="begin no row after so long")
    add(
        "--record",
        nargs="?",
        type=Path,
        const=RECORDS,
        metavar="FOLDER",
        help="write kernels-FINGERPRINT-NAME.json (default folder: the package's records)",
    )
    return parser.parse_args(arguments)


def implementations(options: argparse.Namespace) -> dict[str, object]:
    """Adapters by the names given; CannotResolve for one that is none.

    Of the bundled ones those that cannot be imported here are left out with a line.
    """
    import os

    from conformance.harness.resolve import CannotResolve, resolve
    from conformance.implementations import BUNDLED

    names = list(options.impl or [])
    found = {name: resolve(name).adapter for name in names}
    for name in BUNDLED if options.bundled else ():
        try:
            found.setdefault(name, resolve(name).adapter)
        except CannotResolve as error:
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        name = os.environ.get("CONFORMANCE_IMPL") or "reference"
        found[name] = resolve(name).adapter
    offering = {n: a for n, a in found.items() if any(hasattr(a, c) for c in CONTRACTS)}
    for name in names:
        if name not in offering:
            wanted = ", ".join(CONTRACTS)
            raise ValueError(f"implementation {name!r} offers none of {wanted}")
    return offering


def measure(options: argparse.Namespace, device: str, chosen: list, adapters: dict) -> int:
    """Rows of every adapter, and the records."""
    import torch

    from conformance.benchmarks.ceilings import measure_ceilings
    from conformance.benchmarks.clock import clock_for
    from conformance.benchmarks.fingerprint import fingerprint
    from conformance.benchmarks.measuring import Bench, DeviceLost
    from conformance.benchmarks.recording import (
        DRIFT,
        drift,
        ended_well,
        fill,
        new_record,
        record_name,
        write_record,
    )

    if device == "cpu":
        torch.set_num_threads(options.threads)
    end = time.monotonic() + (options.budget or float("inf"))
    clock, dtypes = clock_for(device), sorted({each.dtype for each in chosen})
    told = fingerprint(device)
    say = lambda text: print(text, flush=True)
    say(f"{told['hard']['name']}, fingerprint {told['id']}, {len(chosen)} workloads")
    asked = {"rounds": options.rounds, "seed": options.seed, "only": options.only}
    well = True
    for name, adapter in adapters.items():
        record = new_record(name, device, told, asked)
        ceilings = measure_ceilings(device, clock, dtypes)
        record["ceilings"]["begin"] = ceilings.as_json()
        bench = Bench(device, clock, ceilings, options.rounds, seed=options.seed, deadline=end)
        save = lambda made: None
        if options.record is not None:
            path = options.record / record_name(told["id"], name)
            save = lambda made, path=path: write_record(made, path)
        row_of = lambda workload: bench.row(workload, name, adapter)  # noqa: B023
        try:
            fill(record, chosen, row_of, save=save, progress=say)
        except DeviceLost as error:
            say(f"the device is lost: {error}")
            return 1
        record["ceilings"]["end"] = measure_ceilings(device, clock, dtypes).as_json()
        save(record)
        for what, share in drift(record).items():
            if abs(share) > DRIFT:
                say(f"the {what} ceiling moved by {share:+.1%} during the run")
        well &= ended_well(record)
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
