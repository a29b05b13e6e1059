"""What a benchmark says of the machine, and of the process that it measures; imports no torch."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def machine() -> Record:
    """What the numbers depend on."""
    from importlib.metadata import version

    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "platform": platform.platform(terse=True),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
    }


def cpu_model() -> str:
    """The processor's name, with family and model where the name alone says little."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    name = fields.get("model name", platform.machine())
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def memory() -> dict[str, int]:
    """Resident bytes of this process, now and at most so far."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(fields[field].split()[0]) * 1024
        for name, field in (("now", "VmRSS"), ("peak", "VmHWM"))
    }


def timed_device(asked: str | None = None) -> str:
    """``cpu`` or ``cuda``: what is asked for, else a GPU where torch finds one.

    ValueError, in one line, for a GPU that is not there.
    """
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ValueError("--device cuda: torch finds no CUDA device here")
    return asked or ("cuda" if there else "cpu")


def warm_up() -> None:
    """Have torch set up its threads, so that they count as baseline and not as loading."""
    import torch

    with torch.inference_mode():
        torch.ones(64, 64) @ torch.ones(64, 64)


def rounded(value: Any) -> Any:
    """The same record with four digits behind the point."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value
