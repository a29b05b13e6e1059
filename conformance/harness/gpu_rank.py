"""The process of one rank on a GPU: ``python -m conformance.harness.gpu_rank JOB``.

``JOB`` is JSON that :mod:`conformance.harness.gpu_ranks` writes: rank, group, pipe, and the lines that
make the implementation.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import pickle
import signal
import sys
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch

from conformance.harness import gpu_lane
from conformance.harness.failures import NotRun
from conformance.harness.gpu_ranks import moved, reject_elsewhere
from conformance.harness.rank_pool import PATIENCE, Raised, answer_calls, silence
from conformance.harness.subject import Subject, first_line

GIVES_PARTS_ANYWHERE = ("flat_shards",)
"""Contracts whose programs give more than what was computed, such as what a file holds."""


def serve(job: dict[str, Any]) -> None:
    """Join the group and answer calls until the pipe is closed."""
    import torch.distributed as dist

    for module in job["first"]:
        importlib.import_module(module)
    pipe = connection.Connection(job["pipe"])
    rank = job["rank"]
    with open(job["stacks"], "w") as stacks, silence():
        faulthandler.enable(file=stacks, all_threads=False)
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
        gpu_lane.before_cuda_starts()
        torch.set_num_threads(1)
        torch.cuda.set_device(rank)
        dist.init_process_group(
            job["backend"],
            init_method=f"file://{job['folder']}/rendezvous",
            rank=rank,
            world_size=job["ranks"],
            timeout=timedelta(seconds=2 * PATIENCE),
            device_id=torch.device("cuda", rank) if job["backend"] == "nccl" else None,
        )
        subject = made(job["contract"], tuple(job["lines"]))
        answer_calls(pipe, rank, lambda request: pickle.dumps(answered(subject, request)))


def made(contract: str, lines: tuple[str, ...]) -> Subject | Raised:
    """The contract's method of the implementation, which the lines make; or why they cannot."""
    namespace: dict[str, Any] = {}
    try:
        exec(compile("\n".join(lines), "<implementation>", "exec"), namespace)
        return Subject(contract, namespace[contract], device="cuda", import_lines=lines)
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        why = f"the process of a rank on a GPU cannot make the implementation ({said})"
        return Raised.of(NotRun(why))


def answered(subject: Subject | Raised, request: bytes) -> Any:
    """What the call that was sent gives, on the CPU; or what it raised."""
    if isinstance(subject, Raised):
        return subject
    gpu_lane.settle_arithmetic()
    try:
        function, arguments = pickle.loads(request)
        found = function(subject, *moved(arguments, "cuda"))
        gpu_lane.wait_for_device()
        if subject.contract.name not in GIVES_PARTS_ANYWHERE:
            reject_elsewhere(found)
        return moved(found, "cpu")
    except Exception as error:
        return Raised.of(error)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
