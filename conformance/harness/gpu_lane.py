"""The requirements on a CUDA device: how arithmetic is set, and what to do when the device is lost.

A kernel that writes out of bounds breaks the context of its process: from then on every call on the
device raises, in this requirement and in all that follow. Out of memory and a hang leave a device that
nothing can be said about either. So such a failure ends its requirement at once, with the case that it
was found with, and the process is not used again (:mod:`conformance.harness.gpu_isolation`).
Imports no torch itself.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from typing import Any

from conformance.harness.failures import ConformanceFailure, NotRun

SECONDS = 60.0
"""Time for one requirement on a GPU, where the user gives none."""
HARD_FACTOR = 1.5
"""A call that never returns to Python ends the process after this many times the deadline."""

OUT_OF_MEMORY, BROKEN, TIMED_OUT = "out of memory", "the CUDA context is broken", "timed out"
"""Why a device is lost."""


class DeviceLost(BaseException):
    """The device cannot be used any more in this process; ``ended`` is how the requirement ends.

    Not an Exception: Hypothesis would look for a smaller case, and every case fails now.
    """

    def __init__(self, why: str, ended: ConformanceFailure | NotRun) -> None:
        super().__init__(why)
        self.ended = marked(ended, why)


def marked(ended: BaseException, why: str) -> BaseException:
    """The same exception, which from now on says that the device is lost."""
    ended.device_lost = why
    return ended


def why_lost(error: BaseException | None) -> str | None:
    """Why the device is lost, if that is what an exception came of."""
    return getattr(error, "device_lost", None)


def before_cuda_starts() -> None:
    """Let matrix products of cuBLAS give the same bits in each call; read when CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def settle_arithmetic() -> None:
    """Full float32 products, and 16-bit products that are added up in float32.

    Set before each case, for an adapter that changes a setting of the process would change what the
    next one is compared with. In a call of its own an adapter may do as it likes, and is held to the
    limits of the dtype that it was given.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


ONE_RANK = frozenset({"one rank"})
WORLDS = ("ranks", "saved_on", "loaded_on")
"""Fields of cases that are numbers of ranks."""


def on_the_gpus_there_are(case: Any, several_ranks: bool) -> tuple[Any, frozenset[str]]:
    """The case on as many ranks as it has, or on one where there are fewer GPUs.

    Also the coincidence that this brings about. With ``several_ranks`` such a case is not run.
    """
    import torch

    worlds = {name: getattr(case, name) for name in WORLDS if hasattr(case, name)}
    needed, have = max(worlds.values(), default=1), torch.cuda.device_count()
    if needed <= have:
        return case, frozenset()
    if several_ranks:
        raise NotRun(f"needs {needed} GPUs, and there {'is' if have == 1 else 'are'} {have}")
    fewer: dict[str, Any] = {name: 1 for name in worlds}
    if hasattr(case, "group_size"):
        fewer["group_size"] = None
    return replace(case, **fewer), ONE_RANK


def wait_for_device() -> None:
    """Let a kernel that failed raise here, and not in a call that has nothing to do with it."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def probe() -> str | None:
    """What is wrong with the device: a kernel is run, and its result is looked at; None if nothing."""
    import torch

    try:
        torch.cuda.synchronize()
        total = int(torch.ones(3, device="cuda").sum().item())
    except Exception as error:
        return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
    return None if total == 3 else f"three ones add up to {total}"


def lost_by(error: Exception) -> DeviceLost | None:
    """What an exception of a case means for the device; None where it can be used as before."""
    if why_lost(error):  # that of a rank
        return DeviceLost(why_lost(error), error)
    causes = list(chain_of(error))
    if any(is_out_of_memory(each) for each in causes):
        free_memory()
        if isinstance(error, ConformanceFailure):
            return DeviceLost(OUT_OF_MEMORY, error)
        return DeviceLost(OUT_OF_MEMORY, NotRun(f"no memory on the device for the case: {error}"))
    wrong = probe()
    if wrong is None:
        return None
    if not isinstance(error, ConformanceFailure):  # an error that came late, where values are read
        kind = f"raised {type(error).__name__}"
        said = str(error).split("\n")[0] or "no message"
        error = ConformanceFailure(kind, f"after the call the device {kind}: {said}")
    error.details += (f"{BROKEN}: {wrong}",)
    return DeviceLost(BROKEN, error)


def chain_of(error: BaseException | None):
    """An exception and what it came of, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device (and not the host) had no memory left."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def free_memory() -> None:
    """Give back what the allocator keeps."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def has_cuda() -> bool:
    """Whether there is a CUDA device that torch can use."""
    import torch

    return torch.cuda.is_available()
