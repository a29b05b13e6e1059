"""Running the suite as a user does: a command line, in a process and a folder of its own."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from conformance.reports.reader import Report, read_report

ROOT = Path(__file__).resolve().parents[1]

BOUND = 120
"""Seconds after which a run counts as hanging."""

ONE = "attention.causal.aligned-to-last-key"
"""A requirement that is quick, and fails for most wrong implementations."""

WITHOUT_DIAGNOSIS = ("--conformance-diagnosis", "0")

_pool = ThreadPoolExecutor(max_workers=2)
_runs: dict[object, Future] = {}
_site: list[tempfile.TemporaryDirectory] = []
_compiled: list[tempfile.TemporaryDirectory] = []
_mine = threading.local()
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    status: int
    out: str
    err: str
    folder: Path

    def report(self) -> Report:
        """The report that the command wrote."""
        return read_report(self.folder / "out")

    @property
    def text(self) -> str:
        """Everything it printed, to show when an assertion fails."""
        return f"exit status {self.status}\n{self.out[-6000:]}\n{self.err[-3000:]}"

    @property
    def verdict(self) -> str:
        """The verdict line in the terminal."""
        lines = [line for line in self.out.splitlines() if line.startswith("verdict ")]
        assert len(lines) == 1, self.text
        return lines[0].removeprefix("verdict ")


def site() -> Path:
    """A folder for PYTHONPATH that makes the checkout look installed, entry point and all."""
    with _one_at_a_time:  # runs are begun two at a time
        if not _site:
            made = tempfile.TemporaryDirectory()
            info = Path(made.name) / "model_conformance-0.0.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                "Metadata-Version: 2.1\nName: model-conformance\nVersion: 0\n"
            )
            (info / "entry_points.txt").write_text(
                "[pytest11]\nconformance.plugin = conformance.plugin\n"
            )
            _site.append(made)
    return Path(_site[0].name)


def compiled() -> str:
    """A folder for what runs compile: a third of the time of a short one, and not for the checkout."""
    if not _compiled:
        _compiled.append(tempfile.TemporaryDirectory())
    return _compiled[0].name


def environment(*, installed: bool = True, **variables: str) -> dict[str, str]:
    """The environment of a user: nothing of ours but the path to the package."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CONFORMANCE_", "PYTEST_", "HYPOTHESIS_"))
    }
    path = [str(ROOT), str(site())] if installed else [str(ROOT)]
    # A fork of a testing process inherits its threads' settings; one thread each keeps runs cheap.
    return {
        "PYTHONPYCACHEPREFIX": compiled(),
        **inherited,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        **variables,
    }


def pytest_run(
    folder: Path,
    *arguments: str,
    installed: bool = True,
    fresh: bool = False,
    cwd: Path | None = None,
    files: dict[str, str] | None = None,
    **variables: str,
) -> Run:
    """``pytest`` with these arguments in ``folder``, after writing ``files`` there.

    In a ``fresh`` interpreter, or in a fork of one that has imported torch already.
    """
    for name, text in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    arguments = ("-p", "no:cacheprovider", *arguments)
    variables = environment(installed=installed, **variables)
    if installed and not fresh and hasattr(os, "fork"):
        return _forked_run(folder, arguments, variables, cwd or folder)
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(
        command,
        cwd=cwd or folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr, folder)


def _forked_run(
    folder: Path, arguments: tuple[str, ...], variables: dict[str, str], cwd: Path
) -> Run:
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    job = {
        "arguments": arguments,
        "environment": variables,
        "cwd": str(cwd),
        "out": str(out),
        "err": str(err),
    }
    server = _server()
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    if not select.select([server.stdout], [], [], BOUND)[0]:
        server.kill()
        raise TimeoutError(f"pytest {' '.join(arguments)} did not end")
    status = int(server.stdout.readline())
    return Run(status, out.read_text("utf-8"), err.read_text("utf-8"), folder)


def _server() -> subprocess.Popen:
    """The fork server of this thread."""
    if getattr(_mine, "server", None) is None or _mine.server.poll() is not None:
        _mine.server = subprocess.Popen(
            [sys.executable, str(ROOT / "meta_tests" / "fork_server.py")],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(_mine.server.kill)
    return _mine.server


def suite_run(folder: Path, *arguments: str, only: str = ONE, **more) -> Run:
    """A contract's file of the suite in ``folder``, with a report, for requirements ``only``.

    Without diagnosis, which takes ten seconds where nothing is known: ask for it in ``arguments``.
    """
    contract = only.split(".")[0] if "." in only else "attention"
    selection = ["-k", only] if only else []
    return pytest_run(
        folder,
        str(ROOT / "conformance" / f"test_{contract}.py"),
        f"--rootdir={folder}",
        "--conformance-report",
        str(folder / "out"),
        *WITHOUT_DIAGNOSIS,
        *selection,
        *arguments,
        **more,
    )


def start(key: object, make) -> Future:
    """Begin ``make()`` in the background, two at a time; the same key gives the same run."""
    if key not in _runs:
        _runs[key] = _pool.submit(make)
    return _runs[key]
