"""Phases of a benchmark: each is a function that runs in a process of its own, and gives a record.

So what one phase keeps in memory is not counted for the next. A benchmark passes ``--phase NAME
OPTIONS`` to its own command line, whose last line of output is the record as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

Options = dict[str, Any]
Record = dict[str, Any]


def start_phase(module: str, phase: str, options: Options) -> subprocess.Popen:
    """A fresh process that does a phase of the benchmark ``module``; its stderr is this one's."""
    command = [sys.executable, "-m", module, "--phase", phase, json.dumps(options)]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result_of(process: subprocess.Popen) -> Record:
    """What a phase gives, when it has ended; RuntimeError if it failed."""
    out, _ = process.communicate()
    if process.returncode:
        phase = process.args[process.args.index("--phase") + 1]
        raise RuntimeError(f"the phase {phase} ended with status {process.returncode}")
    return json.loads(out.splitlines()[-1])


def run_phase(module: str, phase: str, options: Options) -> Record:
    """What a phase gives in a fresh process."""
    return result_of(start_phase(module, phase, options))


def finish(record: Record, table: str, output: Path | None) -> None:
    """Print the table, and write the record if a file was asked for."""
    print(table)
    if output is not None:
        output.write_text(json.dumps(record, indent=2) + "\n")
