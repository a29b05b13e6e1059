"""What of a call is the same in every run: launches, memory, operations, the kernels that ran.

Such numbers are compared exactly; they catch most regressions without a clock.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conformance.benchmarks.running import Running

Counters = dict[str, int | str]

BACKENDS = (
    ("cudnn", ("cudnn",)),
    ("flash", ("flash_fwd", "flash_bwd", "flash_attention")),
    ("efficient", ("fmha_cutlass", "efficient_attention")),
    ("triton", ("triton_",)),
    ("grouped_mm", ("grouped", "groupproblem")),
    ("math", ("attention_math",)),
)
"""Backends by parts of the names of their kernels or operators, in lower case."""


COMPILED = ("Torch-Compiled Region", "CompiledFunction")
"""How the profiler's names of compiled code begin."""

TRITON_KERNELS = ("CompiledKernel", "StaticallyLaunchedCudaKernel")
"""Types of loaded kernels, Triton's own and inductor's."""


def counters(running: Running) -> Counters:
    """Exact metrics of one call, after those calls that compile and allocate for good.

    ``launches``: operators that torch dispatches on the CPU (of code that is compiled, or that cannot
    be watched so, all that the profiler sees), or kernels on CUDA. ``allocated_bytes`` in all and
    ``peak_bytes`` at once beyond the inputs, by torch's allocator. ``flops`` as torch's
    ``FlopCounterMode`` counts them, on the CPU, of operators that it knows, where nothing is compiled.
    ``backend``: which of the known ones ran, or ``other``. Where something was compiled: ``graphs`` and
    ``graph_breaks``; where Triton kernels ran, ``triton_registers``, ``triton_spills`` and
    ``triton_shared_bytes``, the most of any.
    """
    for turn in range(2):
        running.launch(turn)
    running.last = None  # what is let go of during the call would count as given back by it
    call = lambda: running.launch(0)
    return on_cuda(call) if running.device.startswith("cuda") else on_cpu(call)


class Operators(TorchDispatchMode):
    """Names of the operators that torch dispatches, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def on_cpu(call: Callable[[], Any]) -> Counters:
    """See :func:`counters`."""
    events = profiled(call)
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    memory = {"allocated_bytes": sum(s for s in sizes if s > 0), "peak_bytes": peak(sizes)}
    names = [event.name() for event in events if event.name() != "[memory]"]
    made: Counters = {"launches": len(names), **memory, "backend": backend(names)}
    if any(name.startswith(COMPILED) for name in names):
        return made | compilation(call)
    try:
        with FlopCounterMode(display=False) as flops, Operators() as operators:
            call()
    except NotImplementedError:  # no such mode sees FlexAttention uncompiled; the profiler does
        return made
    counted = flops.get_total_flops()
    return made | {"launches": len(operators.names)} | ({"flops": counted} if counted else {})


def on_cuda(call: Callable[[], Any]) -> Counters:
    """See :func:`counters`."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    output = call()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    del output
    total, now = "allocated_bytes.all.allocated", "allocated_bytes.all.current"
    memory = {
        "allocated_bytes": after[total] - before[total],
        "peak_bytes": after["allocated_bytes.all.peak"] - before[now],
    }
    events = profiled(call, cuda=True)
    found = kernels(events)
    # Without the driver's profiling interface no kernel is seen; that is not a count of none.
    made: Counters = {"launches": len(found), **memory, "backend": backend(found)}
    made = made if found else dict(memory)
    made |= triton_resources(gc.get_objects(), set(found))
    if any(event.name().startswith(COMPILED) for event in events):
        made |= compilation(call)
    return made


def kernels(events: Iterable[Any]) -> list[str]:
    """Names of the kernels among a profiler's events, without copies and annotations.

    Annotations of the host appear a second time on the device, under the same name.
    """
    names: dict[bool, list[str]] = {True: [], False: []}
    for event in events:
        names[str(event.device_type()).endswith("CUDA")].append(event.name())
    of_host = set(names[False])
    skipped = ("Memcpy", "Memset")
    return [n for n in names[True] if not n.startswith(skipped) and n not in of_host]


def profiled(call: Callable[[], Any], *, cuda: bool = False) -> list[Any]:
    """Events of torch's profiler over one call; those of memory are named ``[memory]``."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with (
        warnings.catch_warnings(action="ignore"),  # that a second profile clears the first
        profile(activities=activities, profile_memory=not cuda) as done,
    ):
        call()
        if cuda:
            torch.cuda.synchronize()
    return done.profiler.kineto_results.events()


def peak(sizes: list[int]) -> int:
    """The largest sum of allocations (positive) and releases (negative) so far."""
    highest = now = 0
    for size in sizes:
        now += size
        highest = max(highest, now)
    return highest


def backend(names: list[str]) -> str:
    """The known backends among kernels or operators, joined by a plus; ``other`` if there is none."""
    lower = [name.lower() for name in names]
    found = [
        known for known, parts in BACKENDS if any(part in name for part in parts for name in lower)
    ]
    return "+".join(found) or "other"


def compilation(call: Callable[[], Any]) -> Counters:
    """Graphs and graph breaks of compiling the call anew."""
    if "torch._dynamo" not in sys.modules:
        return {}
    from torch._dynamo.utils import counters as counted

    torch._dynamo.reset()
    counted.clear()
    call()
    return {
        "graphs": counted["stats"]["unique_graphs"],
        "graph_breaks": sum(counted["graph_break"].values()),
    }


def triton_resources(objects: Iterable[Any], names: set[str]) -> Counters:
    """Registers, spills and shared memory of those loaded Triton kernels that have these names.

    The kernels are looked for among ``objects``, all that Python holds: no public call lists them.
    """
    found = [
        kernel
        for kernel in objects
        if type(kernel).__name__ in TRITON_KERNELS and getattr(kernel, "name", None) in names
    ]
    if not found:
        return {}
    shared = (getattr(k, "shared", None) or getattr(k.metadata, "shared", 0) for k in found)
    return {
        "triton_registers": max(int(kernel.n_regs or 0) for kernel in found),
        "triton_spills": max(int(kernel.n_spills or 0) for kernel in found),
        "triton_shared_bytes": max(map(int, shared)),
    }
