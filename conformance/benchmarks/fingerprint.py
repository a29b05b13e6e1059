"""Which machine numbers belong to: times are compared only where its hard part is the same.

``hard``    what changes times: the processor, versions, how times are taken; its hash is the id
``soft``    what may change times, kept to be read: clocks, limits, settings, revisions
``vector``  what was measured in the same run (:mod:`conformance.benchmarks.ceilings`)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from conformance.benchmarks.clock import METHOD
from conformance.benchmarks.machine import cpu_model

Facts = dict[str, Any]


def identity(hard: Facts) -> str:
    """Twelve hexadecimal digits of the hard part."""
    text = json.dumps(hard, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(device: str) -> Facts:
    """``id``, ``hard`` and ``soft`` of this machine for ``cpu`` or ``cuda``; values are JSON's."""
    hard = {**common_hard(), **(gpu_hard(device) if device.startswith("cuda") else cpu_hard())}
    soft = {**common_soft(), **(gpu_soft(device) if device.startswith("cuda") else {})}
    return {"id": identity(hard), "hard": hard, "soft": soft}


def common_hard() -> Facts:
    """What belongs to every device."""
    import torch

    return {
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "virtualisation": virtualisation(),
        "method": METHOD,
    }


def cpu_hard() -> Facts:
    """The processor, and how much of it there is."""
    import torch

    return {
        "device": "cpu",
        "name": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def gpu_hard(device: str) -> Facts:
    """The GPU and the libraries that compute on it."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": "cuda",
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "driver_major": (nvml_facts(device).get("driver") or "unknown").split(".")[0],
        "mig": nvml_facts(device).get("mig"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cublas": installed("nvidia-cublas", "nvidia-cublas-cu12"),
        "triton": installed("triton"),
    }


def common_soft() -> Facts:
    """Settings and state of host and torch, and the revision."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_quota": cpu_quota(),
        "platform": platform.platform(terse=True),
        "load_average": round(os.getloadavg()[0], 2),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        or os.environ.get("PYTORCH_ALLOC_CONF"),
        "transformers": installed("transformers"),
        "revision": revision(),
    }


def gpu_soft(device: str) -> Facts:
    """State of the GPU, as far as NVML tells it."""
    import torch

    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    facts = nvml_facts(device)
    facts.pop("mig", None)
    return {
        "uuid": hashlib.sha256(uuid.encode()).hexdigest()[:12],
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        **facts,
    }


def nvml_facts(device: str) -> Facts:
    """Driver, clocks in MHz, power limit in W, temperature in °C …; empty where NVML is not there.

    What a driver (or a sandbox) does not tell is left out.
    """
    facts: Facts = {}
    with suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
        queries = {
            "driver": lambda: _text(pynvml.nvmlSystemGetDriverVersion()),
            "mig": lambda: bool(pynvml.nvmlDeviceGetMigMode(handle)[0]),
            "power_limit": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "sm_clock": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "sm_clock_max": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "temperature": lambda: pynvml.nvmlDeviceGetTemperature(
                handle, pynvml.NVML_TEMPERATURE_GPU
            ),
            "persistence": lambda: bool(pynvml.nvmlDeviceGetPersistenceMode(handle)),
            "ecc": lambda: bool(pynvml.nvmlDeviceGetEccMode(handle)[0]),
        }
        for name, query in queries.items():
            with suppress(Exception):
                facts[name] = query()
    return facts


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def virtualisation() -> str:
    """``gVisor``, ``Firecracker``, ``virtual machine`` or ``none``, as far as the kernel shows it."""
    release = platform.release()
    with suppress(OSError):
        if "gvisor" in Path("/proc/version").read_text().lower() or release == "4.4.0":
            return "gVisor"
    if "-fc" in release or "firecracker" in release:
        return "Firecracker"
    with suppress(OSError):
        if " hypervisor" in Path("/proc/cpuinfo").read_text():
            return "virtual machine"
    return "none"


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Processors that the control group may use; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = path.read_text().split()
        return round(int(quota) / int(period), 2)
    return None


def revision(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout, with a plus where files differ from it; None without git."""
    with suppress(OSError, subprocess.SubprocessError):
        run = lambda *words: subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
        head = run("rev-parse", "--short=12", "HEAD")
        if head.returncode == 0:
            changed = run("status", "--porcelain", "--untracked-files=no").stdout.strip()
            return head.stdout.strip() + ("+" if changed else "")
    return None
