"""``python -m conformance gate`` as a user calls it, with real processes."""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT

GOOD = """\
import torch.nn.functional as F

def attention(q, k, v, *, causal=False):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
"""
# One more copy of the keys: right, and it shows in bytes and launches.
WASTEFUL = GOOD.replace("    return", "    k = k.clone()\n    return")
WRONG = GOOD.replace("is_causal=causal", "is_causal=not causal")
DYING = GOOD.replace("    return", "    import os; os._exit(3)\n    return")
DECODE = "attention.decode.*"
HANGS = 900
"""Seconds after which a gate hangs: on a busy machine the control's claims may have to be confirmed."""


def gate(folder, *arguments):
    command = [sys.executable, "-m", "conformance", "gate", *arguments]
    # The lock of the device is in TMPDIR: gates of other tests that run now are not to be seen.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=HANGS
    )


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """The user's repository: ``mine.attention`` in src, good in the first commit, then wasteful."""
    source = tmp_path / "src"
    source.mkdir()
    git(tmp_path, "init", "-q")
    for text in (GOOD, WASTEFUL):
        (source / "mine.py").write_text(text)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-qm", "change")
    return tmp_path


def test_revisions_are_compared_by_what_does_not_depend_on_the_machine(repository):
    arguments = ["--base", "HEAD~1", "--head", "HEAD", "--impl", "mine", "--only", DECODE]
    ended = gate(repository, *arguments, "--metrics-only", "--device", "cpu", "--output", "out")
    assert ended.returncode == 1, ended.stderr
    document = json.loads((repository / "out" / "gate.json").read_text())
    [row] = document["benchmarks"]
    worse = {each["metric"] for each in row["changes"] if each["direction"] == "worse"}
    assert {"launches", "allocated_bytes"} <= worse
    assert "gate  REGRESSED: 1 REGRESSED of 1 benchmarks" in ended.stdout
    assert Path(document["origins"]["base"]["below"]).name == "mine.py"
    assert document["origins"]["base"]["below"] != document["origins"]["head"]["below"]
    # What the user accepts does not fail.
    accepted = [arg for metric in worse for arg in ("--accept", metric)]
    ended = gate(repository, *arguments, "--metrics-only", "--device", "cpu", *accepted)
    assert ended.returncode == 0, ended.stderr


def test_times_of_both_sides_and_of_both_controls_are_compared(repository):
    """What the verdict is depends on how quiet the machine is; the exit status is the one of it."""
    arguments = ["--base", ".", "--head", ".", "--impl", "mine", "--only", DECODE]
    # Seven pairs are the fewest that any bound can be had from.
    few = ["--pairs", "7", "--max-pairs", "7", "--device", "cpu", "--output", "out"]
    ended = gate(repository, *arguments, *few)
    document = json.loads((repository / "out" / "gate.json").read_text())
    [row] = document["benchmarks"]
    statuses = {"OK": 0, "INCONCLUSIVE": 6, "VOID": 6, "REGRESSED": 1}
    assert ended.returncode == statuses[document["verdict"]], ended.stdout + ended.stderr
    assert f"gate  {document['verdict']}: " in ended.stdout
    assert row["pairs"] == 7
    assert row["details"]["median_seconds"].keys() == {"base", "head", "control", "slowed"}
    assert all(seconds > 0 for seconds in row["details"]["median_seconds"].values())


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (WRONG, "REGRESSED attention.prefill.*: the head: wrong output: "),
        (DYING, "REGRESSED attention.prefill.*: the head: process died or hung: "),
    ],
)
def test_a_head_that_is_wrong_or_dies_is_named(tmp_path, head, reason):
    (tmp_path / "base.py").write_text(GOOD)
    (tmp_path / "head.py").write_text(head)
    arguments = ["--base", "base.py", "--head", "head.py", "--only", "attention.prefill.*causal*"]
    ended = gate(tmp_path, *arguments, "--metrics-only", "--device", "cpu")
    assert ended.returncode == 1, ended.stderr
    assert re.search(reason, ended.stdout), ended.stdout


def test_what_the_base_does_not_offer_is_not_compared(tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    arguments = ["--base", "mine.py", "--head", "mine.py", "--only", "experts.*skewed*"]
    ended = gate(tmp_path, *arguments, "--device", "cpu")
    assert ended.returncode == 6, ended.stderr
    assert "1 of 1 benchmarks are not offered by the base" in ended.stdout
    assert "gate  INCONCLUSIVE: no benchmark was compared" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "nonsense", "--head", "mine.py"], "nonsense: unknown implementation"),
        (["--base", "HEAD", "--head", "x", "--impl", "mine"], "'x' is no revision of the reposit"),
        (["--only", "atention.*"], "no workload for cpu is called 'atention.*'"),
        (["--detect", "0.5"], "expected margin < detects"),
        (["--detect", "none"], "'none' is not a percentage above 0 and below 100"),
        (["--pairs", "3"], "3 process pairs give no bound"),
        (["--device", "cuda"], "--device cuda: torch finds no CUDA device"),
    ],
)
def test_a_mistake_is_said_in_one_line(repository, arguments, message):
    if "--device" in arguments and sys.modules["torch"].cuda.is_available():
        pytest.skip("there is a CUDA device")
    (repository / "mine.py").write_text(GOOD)
    sides = [] if "--base" in arguments else ["--base", "mine.py", "--head", "mine.py"]
    ended = gate(repository, *sides, *arguments)
    assert ended.returncode in (2, 4)
    assert sum(message in line for line in ended.stderr.splitlines()) == 1
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_an_adapter_that_no_revision_has_is_refused(repository, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.py").write_text(GOOD)
    arguments = ["--base", "HEAD~1", "--head", "HEAD", "--impl", str(elsewhere / "other.py")]
    ended = gate(repository, *arguments, "--only", DECODE, "--metrics-only", "--device", "cpu")
    assert ended.returncode == 4
    assert "imports nothing from the revision" in ended.stderr


def test_two_gates_do_not_time_each_other(tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    place = tmp_path / f"conformance-gate-{os.getuid()}-cpu.lock"
    with place.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ended = gate(tmp_path, "--base", "mine.py", "--head", "mine.py", "--device", "cpu")
    assert ended.returncode == 4
    assert "another gate runs on cpu" in ended.stderr


def test_without_scipy_it_says_what_to_install(tmp_path):
    hidden = "import sys; sys.modules['scipy'] = None\nfrom conformance.__main__ import main\n"
    call = "sys.exit(main(['gate', '--base', 'a', '--head', 'b']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", hidden + call]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ended.returncode == 4
    assert "the gate needs SciPy" in ended.stderr
    assert "Traceback" not in ended.stderr
