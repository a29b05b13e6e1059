"""The clock of a GPU's multiprocessors, where NVML can be read: is a change of time one of cycles?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress


def sm_clock_reader(device: str) -> Callable[[], int | None]:
    """A function that reads the clock in MHz; it gives None where there is none to be read.

    The device is found by its identity, for its number among those that CUDA shows (which the
    environment may restrict) need not be NVML's.
    """
    if not device.startswith("cuda"):
        return lambda: None
    with suppress(Exception):  # whatever is missing or forbidden: then nothing is read
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        read = lambda: int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        read()
        return read
    return lambda: None
