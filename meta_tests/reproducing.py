"""Runs the lines that reproduce failures, each against the bug and against the reference.

A process of its own, which has never differentiated anything: lines may fork. It reads ids of planted
bugs from its input, or module:register:name of near misses, and answers each with a line of JSON.
"""

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed
from mutants import Broken

from conformance.harness import profiles
from conformance.harness.failures import ConformanceFailure
from conformance.harness.messages import reproduction
from conformance.harness.requirement import all_requirements
from conformance.known_bugs import PlantedBug, all_known_bugs

SECONDS = 240
"""After which a process is taken to hang; the longest takes 40 s beside other work."""
BROKEN = "as broken"
"""How a line ends that imports bugs or near misses; the next one makes the adapter."""
OF_REFERENCE = (
    "from conformance.implementations.reference import Reference",
    "adapter = Reference()",
)


def named(id: str) -> tuple[PlantedBug | Broken, tuple[str, ...]]:
    """A planted bug, or a near miss, and the lines that make its adapter."""
    if ":" not in id:
        made = f"adapter = broken()[{id!r}].make()"
        return all_known_bugs()[id], (
            f"from conformance.known_bugs import all_known_bugs {BROKEN}",
            made,
        )
    module, register, name = id.split(":")
    made = f"adapter = broken[{name!r}].make()"
    bug = getattr(import_module(module), register)[name]
    return bug, (f"from {module} import {register} {BROKEN}", made)


def failure_of(id: str) -> dict[str, Any]:
    """How the requirement fails that a bug breaks, and the lines that reproduce it."""
    settings = profiles.without_shrinking(profiles.PROFILES["gate"])
    bug, made = named(id)
    lines = (*made, f"{bug.contract} = adapter.{bug.contract}")
    with profiles.temporarily(settings):
        try:
            all_requirements()[bug.breaks].check(getattr(bug.make(), bug.contract))
        except ConformanceFailure as failure:
            failure.import_lines = lines
            return {
                "kind": failure.kind,
                "ranks": getattr(failure.call.case, "ranks", 1),
                "lines": reproduction(failure),
            }
    raise AssertionError(f"{bug.breaks} passes for {id}")


def of_reference(lines: list[str]) -> list[str]:
    """The same lines with the reference in the place of the bug."""
    at = next(number for number, line in enumerate(lines) if line.endswith(BROKEN))
    return [*lines[:at], *OF_REFERENCE, *lines[at + 2 :]]


def ran(lines: list[str]) -> dict[str, Any]:
    """What lines print, they or programs that they start, and the exception that they end with."""
    error = None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as printed:
        os.dup2(printed.fileno(), 1)
        os.chdir(folder)
        with open(1, "w", closefd=False) as output, contextlib.redirect_stdout(output):
            try:
                exec(compile("\n".join(lines), "<reproduction>", "exec"), {"__name__": "__main__"})
            except BaseException as raised:
                error = type(raised).__name__, without_places(str(raised))
        os.chdir("/")
        printed.seek(0)
        return {"printed": without_places(printed.read()), "error": error}


def without_places(text: str) -> str:
    """Text without what is another in each process: addresses and names of temporary folders."""
    folders = rf"({re.escape(tempfile.gettempdir())}|/dev/shm)/[\w-]+"
    return re.sub(rf"0x[0-9a-f]+|{folders}", "…", text)


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` gives, done in a forked process."""
    return in_children([work])[0]


def in_children(works: list[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each of ``works`` gives, done in forked processes side by side.

    Their temporary files are deleted here: they do not end as Python does, which would delete them.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        children = [started(work, temporary) for work in works]
        return [ended(*child) for child in children]


def started(work: Callable[[], dict[str, Any]], temporary: str) -> tuple[int, int]:
    """A forked process that works, and the end of a pipe from which to read what ``work`` gives."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
        answer(work, write)
    os.close(write)
    return child, read


def ended(child: int, read: int) -> dict[str, Any]:
    """What a process has answered, when it has ended."""
    with open(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"broken": f"not finished in {SECONDS} s"}


def answer(work: Callable[[], dict[str, Any]], pipe: int) -> NoReturn:
    """End this process when it has written what ``work`` gives, in time."""
    signal.alarm(SECONDS)
    try:
        found = work()
    except BaseException as error:
        found = {"broken": f"{type(error).__name__}: {error}"}
    with open(pipe, "w") as file:
        json.dump(found, file)
    os._exit(0)


def on_each_rank(lines: list[str], ranks: int) -> list[dict[str, Any]]:
    """What lines do on each rank: processes with the environment that torchrun gives them."""
    if ranks == 1:
        return [in_child(lambda: ran(lines))]
    with store_served() as port:
        group = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }

        def ran_on(rank: int) -> dict[str, Any]:
            os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
            return ran(lines)

        return in_children([partial(ran_on, rank) for rank in range(ranks)])


@contextlib.contextmanager
def store_served() -> Iterator[int]:
    """The port of a store in which ranks can meet, and which is there until all have ended.

    A process serves it, as under torchrun. Not this one: the store has a thread, and a fork made while
    the thread resolves a name leaves the lock of the resolver to a child in which nobody opens it.
    """
    told, tell = os.pipe()
    wait, end = os.pipe()
    server = os.fork()
    if not server:
        os.close(end)
        store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(tell, str(store.port).encode())
        os.close(tell)
        os.read(wait, 1)  # nothing comes: the other end is closed
        os._exit(0)
    os.close(tell)
    os.close(wait)
    try:
        with open(told) as pipe:
            port = int(pipe.read())
        yield port
    finally:
        os.close(end)
        os.waitpid(server, 0)


def reproduced(id: str) -> dict[str, Any]:
    """A failure, and what its lines do on each rank with the bug and with the reference."""
    found = in_child(lambda: failure_of(id))
    if "broken" not in found:
        found["bug"] = on_each_rank(found["lines"], found["ranks"])
        found["reference"] = on_each_rank(of_reference(found["lines"]), found["ranks"])
    return {"id": id, **found}


def import_what_lines_import() -> None:
    """Once, and not in each of the forks: it takes seconds there, and their own work less than one."""
    import torch._dynamo  # noqa: F401 (by optimizers)
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401


def refuse_threads() -> None:
    """A fork has none of the other threads, and all the locks that they held."""
    threads = Path("/proc/self/task")
    if threads.is_dir() and len(list(threads.iterdir())) > 1:
        raise SystemExit("reproducing: this process forks and has more than one thread")


def main() -> None:
    torch.set_num_threads(1)
    all_requirements()
    import_what_lines_import()
    for line in sys.stdin:
        refuse_threads()
        print(json.dumps(reproduced(line.strip())), flush=True)


if __name__ == "__main__":
    main()
