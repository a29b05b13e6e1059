"""Runs pytest command lines in forks of a process that has imported torch already.

Importing torch is nine tenths of what a short run costs. One job a line of JSON on stdin, its exit
status a line on stdout. Every job has a process, a folder, an environment, temporary files and output
files of its own; only the interpreter's start is shared.
"""

import json
import os
import sys
import tempfile

import pytest
import torch

from conformance.harness.requirement import all_requirements


def child(job: dict, temporary: str) -> None:
    """Run a job and end, without what Python does at its end: that is the parent's here."""
    status = 70
    try:
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["environment"])
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
        for descriptor, name, mode in (
            (0, os.devnull, "r"),
            (1, job["out"], "w"),
            (2, job["err"], "w"),
        ):
            with open(name, mode) as stream:
                os.dup2(stream.fileno(), descriptor)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.path.insert(0, "")  # as python -m pytest has it
        sys.argv = ["pytest", *job["arguments"]]
        status = int(pytest.main())
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    all_requirements()
    for line in sys.stdin:
        # Ranks that a job started may end a moment after it.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            process = os.fork()
            if process == 0:
                child(json.loads(line), temporary)
            _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
