"""Hooks and fixtures of pytest for ``bench_*.py``: see :mod:`conformance.benchmarks.under_pytest`.

    pytest conformance/benchmarks/bench_attention.py --impl torch-sdpa --benchmark-autosave

``CUDA_VISIBLE_DEVICES= pytest …`` measures the CPU where there is a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.benchmarks import under_pytest
from conformance.benchmarks.machine import timed_device


def _asked_for(config: pytest.Config) -> bool:
    """Whether the command line names benchmarks: nothing else is to pay for them."""
    return any(Path(str(arg).split("::")[0]).name.startswith("bench_") for arg in config.args)


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark opens the storage in its own
def pytest_configure(config: pytest.Config) -> None:
    """Keep runs in a folder a machine."""
    if not _asked_for(config):
        return
    if getattr(config.option, "benchmark_storage", None) == under_pytest.DEFAULT_STORAGE:
        from conformance.benchmarks.fingerprint import fingerprint

        told = fingerprint(timed_device())
        config.option.benchmark_storage = f"{under_pytest.DEFAULT_STORAGE}/{told['id']}"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add the fingerprint; leave out what is different at every look."""
    if not _asked_for(config):
        return
    from conformance.benchmarks.fingerprint import fingerprint

    machine_info["conformance"] = fingerprint(timed_device())
    for name in under_pytest.VOLATILE:
        machine_info.get("cpu", {}).pop(name, None)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: dict, compared_benchmark: dict
) -> None:
    """Refuse to compare with times of another machine."""
    why = under_pytest.different_machine(machine_info, compared_benchmark["machine_info"])
    if _asked_for(config) and why:
        raise pytest.UsageError(why)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test a workload of the module's contracts."""
    if "workload" in metafunc.fixturenames and hasattr(metafunc.module, "CONTRACTS"):
        metafunc.parametrize("workload", under_pytest.parameters(metafunc.module.CONTRACTS))


@pytest.fixture(scope="session")
def kernels() -> under_pytest.Kernels:
    """The machine, measured once."""
    return under_pytest.Kernels.begin()


@pytest.fixture(scope="session")
def adapter(pytestconfig: pytest.Config) -> tuple[str, object]:
    """Name and adapter, as ``--impl`` and the settings choose them for the suite."""
    return under_pytest.chosen_adapter(pytestconfig)


@pytest.fixture
def kernel(benchmark, kernels, adapter):
    """Times a workload on the implementation under test."""
    return lambda workload: kernels.time(benchmark, workload, *adapter)
