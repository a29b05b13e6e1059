"""The parts of the GPU lane that need no device: what is lost, what is moved, and what is told."""

import datetime
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import ROOT, environment

from conformance.contracts import CONTRACTS
from conformance.harness import gpu_isolation, gpu_lane, gpu_large, gpu_ranks, ledger, records
from conformance.harness.failures import ConformanceFailure, NotRun
from conformance.harness.flat_subject import ByName
from conformance.harness.parallel_cases import LayerCase
from conformance.harness.subject import Subject, errors_named


def caused_by(error):
    """The failure that an exception of an implementation becomes."""
    with pytest.raises(ConformanceFailure) as caught, errors_named("attention"):
        raise error
    return caught.value


@pytest.fixture
def healthy(monkeypatch):
    monkeypatch.setattr(gpu_lane, "probe", lambda: None)


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setattr(gpu_lane, "probe", lambda: "CUDA error: an illegal memory access")


def test_a_plain_failure_leaves_the_device(healthy):
    assert gpu_lane.lost_by(caused_by(ValueError("plain"))) is None
    assert gpu_lane.lost_by(ConformanceFailure("wrong values", "off")) is None


def test_out_of_memory_loses_the_device_though_it_answers(healthy):
    failure = caused_by(torch.OutOfMemoryError("20 GiB"))
    assert gpu_lane.lost_by(failure).ended is failure
    assert gpu_lane.why_lost(failure) == gpu_lane.OUT_OF_MEMORY


def test_out_of_memory_outside_the_implementation_is_not_its_failure(healthy):
    ended = gpu_lane.lost_by(torch.OutOfMemoryError("20 GiB")).ended
    assert isinstance(ended, NotRun)
    assert "no memory on the device" in str(ended)


def test_a_failure_with_a_broken_context_loses_the_device(broken):
    failure = ConformanceFailure("wrong values", "off")
    assert gpu_lane.lost_by(failure).ended is failure
    assert "illegal memory access" in failure.details[-1]


def test_an_error_that_comes_late_is_the_implementations(broken):
    ended = gpu_lane.lost_by(RuntimeError("CUDA error: misaligned address")).ended
    assert isinstance(ended, ConformanceFailure)
    assert ended.kind == "raised RuntimeError"


def test_arithmetic_is_settled_whatever_an_adapter_set():
    before = torch.get_float32_matmul_precision()
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.set_float32_matmul_precision("medium")
        gpu_lane.settle_arithmetic()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision(before)


# Ranks


@pytest.mark.parametrize("case", [LayerCase(kind="row", ranks=4, group_size=2)])
def test_a_case_of_more_ranks_than_gpus_runs_on_one(case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    fewer, coincidences = gpu_lane.on_the_gpus_there_are(case, several_ranks=False)
    assert (fewer.ranks, fewer.group_size) == (1, None)
    assert coincidences == {"one rank"} >= fewer.confusable()


def test_a_case_of_as_many_ranks_as_gpus_stays(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    case = LayerCase(kind="row", ranks=2)
    assert gpu_lane.on_the_gpus_there_are(case, several_ranks=True) == (case, frozenset())


def test_a_rule_about_several_ranks_is_not_run_on_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NotRun, match="needs 3 GPUs, and there is 1"):
        gpu_lane.on_the_gpus_there_are(LayerCase(kind="row", ranks=3), several_ranks=True)


def test_more_ranks_than_gpus_are_not_started(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    subject = Subject("attention", lambda: None, device="cuda")
    with pytest.raises(NotRun, match="needs 2 GPUs"):
        gpu_ranks.on_gpus(subject, 2, print, ())


@dataclass(frozen=True)
class Holder:
    x: torch.Tensor
    name: str = "holder"


def test_everything_that_holds_tensors_is_moved():
    meta = gpu_ranks.moved(
        [Holder(torch.ones(2)), {"a": (torch.ones(1), 3)}, ByName(b=torch.ones(1))], "meta"
    )
    assert meta[0].x.device.type == meta[1]["a"][0].device.type == "meta"
    assert isinstance(meta[2], ByName)
    assert meta[2]["b"].device.type == "meta"
    assert meta[1]["a"][1] == 3


def test_a_result_on_the_cpu_is_a_failure():
    with pytest.raises(ConformanceFailure, match="x is on the cpu"):
        gpu_ranks.reject_elsewhere([Holder(torch.ones(2))])
    gpu_ranks.reject_elsewhere([3, "text", {"a": None}])


# Isolation


def test_after_three_losses_a_contract_is_left(tmp_path):
    planned = {"contract": "rotary", "id": "rotary.layout.half[cuda]"}
    for count in range(gpu_isolation.ENOUGH):
        assert gpu_isolation.why_not_run(gpu_isolation.read_lost(tmp_path), "rotary") is None, count
        gpu_isolation.note_lost(tmp_path, planned)
    lost = gpu_isolation.read_lost(tmp_path)
    assert "3 requirements of rotary lost" in gpu_isolation.why_not_run(lost, "rotary")
    assert gpu_isolation.why_not_run(lost, "attention") is None


@pytest.mark.parametrize(
    ("path", "pyargs", "ours"),
    [
        ("conformance", False, True),
        ("conformance/test_rotary.py", False, True),
        ("conformance.test_rotary", True, True),
        ("conformance/benchmarks/bench_attention.py", False, False),
        ("tests", False, False),
        ("tests/test_conformance.py", False, False),
        ("mypackage.tests", True, False),
    ],
)
def test_only_runs_of_this_suite_are_given_a_worker(path, pyargs, ours):
    config = SimpleNamespace(
        invocation_params=SimpleNamespace(dir=ROOT, args=()),
        getoption=lambda name, default=None: pyargs,
        args=[path],
    )
    assert gpu_isolation.asks_for_suite(config) is ours


def test_stacks_tell_a_hang_from_a_death():
    planned = dict.fromkeys(("id", "slug", "level", "contract", "device"), "x")
    assert records.died(planned)["failure"]["kind"] == "process died"
    hung = records.died(planned, "Timeout (0:01:30)!\n  File adapter.py, line 3")["failure"]
    assert hung["kind"] == "timed out"
    assert "adapter.py" in hung["details"][1]


def test_contracts_without_a_device_part():
    assert {c.name for c in CONTRACTS.values() if not c.on_device} == {
        "flat_layout",
        "compression_statistics",
        "checkpoint_watcher",
    }


# The simulated device

SIMULATED = """
import copy, pickle
import torch
from simulated_device import DEVICE, ILLEGAL_ADDRESS

def raises(kind, make):
    try:
        make()
    except kind as error:
        return str(error)
    raise SystemExit(f"{make.__code__.co_firstlineno}: nothing was raised")

x, host = torch.randn(3, 4, device="cuda"), torch.randn(3, 4)
assert x.is_cuda and x.device.type == "cuda" and (x * 2).device == x.device
assert "same device" in raises(RuntimeError, lambda: x + host)
assert "same device" in raises(RuntimeError, lambda: torch.cat([x, host]))
assert "same device" in raises(RuntimeError, lambda: torch.matmul(x, host.T))
raises(TypeError, lambda: x.numpy())
assert (x + torch.tensor(2.0)).is_cuda                    # a number may be the CPU's
raises(RuntimeError, lambda: host + torch.ones((), device="cuda"))
assert x[torch.tensor([0, 2])].is_cuda                    # and so may indices
raises(RuntimeError, lambda: host[torch.tensor([0, 2], device="cuda")])
assert x.cpu().device.type == "cpu" and torch.equal(x.cpu().to("cuda"), x)
assert torch.empty(3, 4).copy_(x).device.type == "cpu"
assert torch.zeros_like(x).is_cuda and x.new_zeros(2).is_cuda and x.tolist() and x[0, 0].item()
w = torch.randn(4, 2, device="cuda", requires_grad=True)
(x @ w).sum().backward()
assert w.grad.is_cuda and torch.autograd.grad((x @ w).sum(), w)[0].is_cuda
m = torch.nn.Linear(4, 2)
weight = m.weight
assert m.to("cuda").weight is weight and weight.is_cuda and isinstance(weight, torch.nn.Parameter)
assert m(x).is_cuda and copy.deepcopy(m).weight.is_cuda
raises(RuntimeError, lambda: m(host))
assert pickle.loads(pickle.dumps(x)).is_cuda
view = x[1:]
view.zero_()
assert not x[1:].any()
DEVICE.broken = ILLEGAL_ADDRESS
assert "illegal memory" in raises(torch.AcceleratorError, lambda: x + 1)
raises(torch.AcceleratorError, lambda: x.cpu())
raises(torch.AcceleratorError, torch.cuda.synchronize)
assert (host + 1).device.type == "cpu"
"""


def test_simulated_device_is_as_strict_as_a_real_one():
    variables = environment(installed=False)
    variables["PYTHONPATH"] += f":{Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, "-c", SIMULATED],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# Known failures

FAILS = {
    "requirement": "rotary.layout.half",
    "reason": "one kernel ignores it",
    "issue": "example/repo#1",
    "expires": datetime.date(2030, 6, 1),
}


def entries(*devices):
    tables = [FAILS | ({} if device is None else {"device": device}) for device in devices]
    return ledger.parse_entries(tables, "pyproject.toml", "known_failures")


def known_on(device, *devices):
    found = ledger.select(entries(*devices), "mine", ["rotary.layout.half"], list, device)
    return [entry.device for entry in found.values()]


def test_a_known_failure_can_be_of_one_device():
    assert known_on("cuda", "cpu") == []
    assert known_on("cpu", "cpu") == ["cpu"]
    assert known_on("cuda", None) == [None]
    assert known_on("cuda", "cpu", "cuda") == ["cuda"]


def test_a_known_failure_of_an_unknown_device_is_refused():
    with pytest.raises(ledger.LedgerError, match="key 'device' must be 'cpu' or 'cuda'"):
        entries("gpu")


def test_a_known_failure_twice_for_a_device_is_refused():
    with pytest.raises(ledger.LedgerError, match="repeats"):
        known_on("cpu", None, "cpu")


def test_large_case_without_the_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    with pytest.raises(NotRun, match=r"needs 67\.2 GiB on the device, of which 1\.0 are free"):
        gpu_large.need_memory(gpu_large.LargeCase("queries"), "cuda")


def test_running_out_of_memory_in_a_large_case_is_not_a_failure(monkeypatch):
    monkeypatch.setattr(gpu_large, "BOUNDARY", [2**14])

    def attention(q, k, v):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(NotRun, match="takes more than"):
        gpu_large.assert_large_queries(
            Subject("attention", attention), gpu_large.LargeCase("queries")
        )
