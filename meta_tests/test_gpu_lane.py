"""``pytest -m gpu`` on a simulated device: what runs, what is lost with it, and what is told."""

import os
import subprocess
import sys

import pytest
from command_line import ROOT, WITHOUT_DIAGNOSIS, Run, environment

from conformance.contracts import CONTRACTS
from conformance.harness import gpu_isolation

ADAPTER = """
import os
import signal
import time

import torch
from simulated_device import DEVICE, ILLEGAL_ADDRESS

from conformance.implementations.reference import Reference

reference = Reference()


def illegal_address():
    DEVICE.broken = ILLEGAL_ADDRESS


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def hangs():
    time.sleep(600)


def never_returns():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as in a kernel that waits
    time.sleep(600)


def dies():
    os.abort()


def wrong():
    raise ValueError("a plain failure")


BREAKS = {breaks}


def misbehave(q):
    here = os.environ.get("PYTEST_CURRENT_TEST", "")
    for test, how in BREAKS.items():
        if test in here and q.device.type == "cuda":
            globals()[how]()


def attention(q, k, v, *, causal=False, scale=None, mask=None, softcap=None):
    misbehave(q)
    return reference.attention(q, k, v, causal=causal, scale=scale, mask=mask, softcap=softcap)


def rotary(x, positions, **options):
    misbehave(x)
    return reference.rotary(x, positions, **options)
"""

LONGEST = 900
"""Seconds of one run, on a machine that does much else."""


def on_gpu(folder, *arguments, breaks=None, only=None, simulated=True):
    """``pytest -m gpu`` of the suite with the adapter, whose ``breaks`` are by the name of a test."""
    (folder / "adapter.py").write_text(ADAPTER.format(breaks=breaks or {}), "utf-8")
    variables = environment(installed=False)
    variables["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "meta_tests"), str(folder)))
    files = [str(ROOT / "conformance" / f"test_{name}.py") for name in ("attention", "rotary")]
    command = [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", *files),
        *(f"--rootdir={ROOT}", "--impl", "adapter", "--conformance-report", str(folder / "out")),
        *("--hypothesis-profile", "smoke"),
        *WITHOUT_DIAGNOSIS,
        *(("-p", "simulated_device") if simulated else ()),
        *(("-k", only) if only else ()),
        *arguments,
    ]
    return completed(command, variables, folder)


def completed(command, variables, folder):
    """How a command ended that leaves its report in a folder."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr, folder)


def records(run):
    """The record of each requirement that ran or was to run, by slug."""
    return {record["slug"]: record for record in run.report().records}


def kinds(run):
    """How each requirement ended: the kind of its failure, or the outcome."""
    return {
        slug: record["failure"]["kind"] if record["failure"] else record["outcome"]
        for slug, record in records(run).items()
    }


BREAKS = {
    "test_softcap_squeezes_scores": "illegal_address",
    "test_softcap_is_applied_before_masks": "no_memory",
    "test_half_split_pairs_turn": "hangs",
    "test_half_split_pairs_are_p": "never_returns",
    "test_interleaved_pairs_are_neighbours": "wrong",
}
LOST = (
    "softcap.matches or softcap.before or causal.matches or query-block or layout.half or "
    "layout.interleaved or pairs.half or pairs.interleaved"
)


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """A run in which several requirements lose the device, each in its way."""
    folder = tmp_path_factory.mktemp("lost")
    return on_gpu(folder, "--conformance-timeout", "30", breaks=BREAKS, only=LOST)


def test_what_loses_the_device_is_named_and_nothing_else(lost):
    passed = dict.fromkeys(
        [
            "attention.causal.matches-oracle",
            "attention.causal.query-block-matches-oracle",
            "attention.combined.query-block",
            "rotary.layout.half-truncated",
            "rotary.layout.interleaved",
            "rotary.layout.interleaved-to-half",
            "rotary.pairs.half-truncated",
            "rotary.pairs.interleaved-to-half",
        ],
        "pass",
    )
    assert kinds(lost) == passed | {
        "attention.softcap.matches-oracle": "raised AcceleratorError",
        "attention.softcap.before-masks": "raised OutOfMemoryError",
        "rotary.layout.half": "timed out",
        "rotary.pairs.half": "timed out",
        "rotary.pairs.interleaved": "raised ValueError",
    }, lost.text
    assert lost.status == 1, lost.text


def test_a_lost_device_is_shown_once(lost):
    assert "5 failed, 8 passed" in lost.out, lost.text
    assert lost.out.count("replacing crashed worker") == 4, lost.text
    assert "5 of 13 requirements failed" in lost.verdict


def test_the_case_of_a_lost_device_is_the_one_that_lost_it(lost):
    failure = records(lost)["attention.softcap.matches-oracle"]["failure"]
    assert "the CUDA context is broken: CUDA error: an illegal" in " ".join(failure["details"])
    assert failure["reproduction"]
    assert records(lost)["attention.softcap.matches-oracle"]["drawn"] == 1


def test_where_it_never_returned_is_told(lost):
    details = " ".join(records(lost)["rotary.pairs.half"]["failure"]["details"])
    assert "adapter.py" in details
    assert "never_returns" in details


def test_a_contract_that_goes_on_losing_the_device_is_left(tmp_path):
    run = on_gpu(
        tmp_path,
        breaks={"test_": "dies"},
        only="attention.causal",
    )
    ended = [record["outcome"] for record in records(run).values()]
    assert ended.count("fail") == gpu_isolation.ENOUGH, run.text
    assert set(ended) == {"fail", "not_run"}, run.text
    reasons = {each["reason"] for each in records(run).values() if each["outcome"] == "not_run"}
    assert all(
        reason.startswith("3 requirements of attention lost the device") for reason in reasons
    )


def test_without_xdist_the_others_do_not_run(tmp_path):
    run = on_gpu(tmp_path, "-p", "no:xdist", breaks=BREAKS, only="softcap.matches or layout.half")
    assert kinds(run)["attention.softcap.matches-oracle"] == "raised AcceleratorError", run.text
    assert kinds(run)["rotary.layout.half"] == "not_run", run.text
    assert "no fresh process without pytest-xdist" in records(run)["rotary.layout.half"]["reason"]
    assert "no isolation" in run.out


def test_without_cuda_nothing_is_drawn_and_the_verdict_says_why(tmp_path):
    run = on_gpu(tmp_path, "--impl", "reference", simulated=False)  # the adapter simulates one
    assert run.status == 6, run.text
    assert run.verdict.startswith("inconclusive: none of"), run.text
    assert run.verdict.endswith("executed: no CUDA device"), run.text
    assert {record["drawn"] for record in records(run).values()} == {0}


def test_every_contract_runs_on_the_device(tmp_path):
    """The few requirements of ``--smoke``, one or more a contract, on two GPUs that are simulated."""
    variables = environment(installed=False, SIMULATED_GPUS="2")
    variables["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "meta_tests")))
    command = [sys.executable, "-m", "pytest", "-p", "simulated_device", "-m", "gpu", "--smoke"]
    command += ["-n0", "-p", "no:cacheprovider", "--conformance-report", str(tmp_path / "out")]
    command += ["--conformance-timeout", "300"]
    run = completed(command, variables, tmp_path)
    outcomes = {(each["contract"], each["outcome"]) for each in records(run).values()}
    assert {outcome for _, outcome in outcomes} <= {"pass", "not_run", "inconclusive"}, run.text
    passed = {contract for contract, outcome in outcomes if outcome == "pass"}
    assert passed == {name for name, each in CONTRACTS.items() if each.on_device}, run.text
