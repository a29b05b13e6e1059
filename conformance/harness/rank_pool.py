"""Running an implementation on several ranks: a pool of gloo processes that stays up between cases.

:func:`on_ranks` calls a function of the harness on every rank of a group and gives back what each
returned. One rank runs in this process, without a group. Several run in processes that were forked
from this one, so that they have the implementation as it is here, whatever it is made of; they stay
up for the next case. Under torchrun the group that exists is used as it is.

A rank that raises, dies or hangs ends the call in bounded time, and is named. What a rank prints is
dropped. Nothing is communicated on an error path: the pool is ended and forked anew.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import faulthandler
import gc
import io
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from conformance.harness import torchrun
from conformance.harness.failures import (
    DIED,
    HUNG,
    WAITING,
    ConformanceFailure,
    Declined,
    HarnessError,
    Inconclusive,
    NotRun,
)
from conformance.harness.memo import forget_everything
from conformance.harness.requirement import current_tally
from conformance.harness.subject import LONGEST_LINE, Subject, first_line

PATIENCE = 20.0
"""Seconds for one call on all ranks."""
SHORT_PATIENCE = 4.0
"""Seconds for the calls after one that hung."""
ENOUGH_HANGS = 2
"""After so many of one requirement it runs no further cases: making a hang smaller takes minutes."""
GRACE, SHORT_GRACE = 2.0, 0.2
"""Seconds that the other ranks have to answer when one has failed, the first time and later."""

RankFunction = Callable[..., Any]
"""Called as ``function(subject, *arguments)`` on each rank; importable by its name."""


@dataclass(frozen=True)
class Raised:
    """An exception of a rank, in a form that can travel."""

    type: str
    kind: str
    summary: str
    details: tuple[str, ...] = ()
    shown_by: str = "print(out)"
    lane: str = "exact"

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        """What is to be told of ``error``."""
        if isinstance(error, ConformanceFailure):
            where = traceback_lines(error.__cause__) if error.__cause__ else ()
            return cls(
                "ConformanceFailure",
                error.kind,
                error.summary,
                (*error.details, *where),
                error.shown_by,
                error.lane,
            )
        if isinstance(error, (Declined, Inconclusive, NotRun)):
            return cls(type(error).__name__, "", str(error))
        lines = traceback_lines(error)
        return cls("HarnessError", "", f"{type(error).__name__}: {first_line(error)}", lines)


TRACEBACK_LINES = 6


def traceback_lines(error: BaseException) -> tuple[str, ...]:
    """The innermost frames of an exception."""
    frames = traceback.format_exception(error)[-TRACEBACK_LINES:]
    lines = [line[:LONGEST_LINE] for text in frames for line in text.rstrip().split("\n")]
    return tuple(lines[-2 * TRACEBACK_LINES :])


def on_ranks(subject: Subject, ranks: int, function: RankFunction, *arguments: Any) -> list[Any]:
    """What ``function(subject, *arguments)`` returns on each of ``ranks`` ranks, in rank order.

    Raises what a rank raised, as a failure that names the rank.
    """
    subject.calls[subject.contract.name] += 1
    if subject.device == "cuda":
        if under_torchrun():
            raise NotRun("ranks on GPUs are started by the suite, and not by torchrun")
        from conformance.harness import gpu_ranks

        return gpu_ranks.on_gpus(subject, ranks, function, arguments)
    if under_torchrun():
        return _in_existing_group(subject, ranks, function, arguments)
    if ranks == 1:
        return [function(subject, *arguments)]
    return pool_of(subject, ranks).call(function, arguments)


def under_torchrun() -> bool:
    """Whether this process is a rank of torchrun, or of a group that somebody initialised."""
    import torch.distributed as dist

    return torchrun.rank() is not None or (dist.is_available() and dist.is_initialized())


@dataclass
class Lost:
    """That the ranks of an existing group did not meet, and in which requirement."""

    tally: object
    """Of the requirement; it is made smaller there, and must fail again as it did."""
    why: str


_lost: list[Lost] = []


def _in_existing_group(
    subject: Subject, ranks: int, function: RankFunction, arguments: tuple[Any, ...]
) -> list[Any]:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    if dist.get_world_size() != ranks:
        have = dist.get_world_size()
        raise Inconclusive(f"needs {ranks} ranks, and the group that exists has {have}")
    if _lost and _lost[0].tally is not current_tally():
        raise NotRun(f"the ranks lost each other in an earlier requirement: {_lost[0].why}")
    if not _lost:
        answer = _answer(subject, function, arguments)
        answers: list[Any] = [None] * ranks
        try:
            dist.all_gather_object(answers, answer)
        except RuntimeError as error:  # of the group, which cannot be used again
            mine = f" ({answer.summary})" if isinstance(answer, Raised) else ""
            why = f"rank {dist.get_rank()} of {ranks} waited for the others{mine}: {first_line(error)}"
            _lost.append(Lost(current_tally(), why))
        else:
            return _results(dict(enumerate(answers)), ranks)
    raise ConformanceFailure(WAITING, _lost[0].why)


# The pool

_pools: dict[int, RankPool] = {}
"""Pools of the method that is under test now, by their number of ranks."""
_method: list[Callable] = []


def pool_of(subject: Subject, ranks: int) -> RankPool:
    """The pool of ``ranks`` processes that have this subject; another method's pools are ended."""
    if not _method or _method[0] != subject.method:
        end_pools()
        _method[:] = [subject.method]
    pool = _pools.get(ranks)
    if pool is None:
        pool = _pools[ranks] = RankPool(subject, ranks)
    return pool


def end_pools() -> None:
    """End every process of every pool."""
    for pool in _pools.values():
        pool.end()
    _pools.clear()
    gpus = sys.modules.get("conformance.harness.gpu_ranks")
    if gpus is not None:
        gpus.end_pools()


atexit.register(end_pools)


class RankPool:
    """``ranks`` processes that are a gloo group and wait for calls."""

    def __init__(self, subject: Subject, ranks: int) -> None:
        self._check_forkable()
        self.subject, self.ranks = subject, ranks
        self.patience, self.grace = PATIENCE, GRACE
        self.workers: list[Worker] = []
        self.hung: dict[bytes, dict[int, Any]] = {}
        """What ended calls that hung, by request."""

    def _check_forkable(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            raise NotRun("ranks are forked, which a process that uses CUDA cannot be")

    def start(self) -> None:
        """Fork the processes; they meet at a file."""
        self.folder = tempfile.TemporaryDirectory(prefix="conformance-ranks-")
        self.workers = []
        for rank in range(self.ranks):
            self.workers.append(_fork(self.subject, rank, self.ranks, Path(self.folder.name)))

    def end(self) -> None:
        """Kill the processes."""
        for worker in self.workers:
            worker.kill()
        if self.workers:
            self.folder.cleanup()
        self.workers = []

    def call(self, function: RankFunction, arguments: tuple[Any, ...]) -> list[Any]:
        """See :func:`on_ranks`."""
        request = pickle.dumps((function, arguments))
        if request in self.hung:  # shown again, not waited for again
            return _results(self.hung[request], self.ranks)
        if current_tally().hangs >= ENOUGH_HANGS:
            raise Inconclusive("ranks hung in earlier cases of this requirement")
        if not self.workers:
            self.start()
        try:
            for worker in self.workers:
                with contextlib.suppress(OSError):  # its death is seen where its answer is awaited
                    worker.pipe.send_bytes(request)
            answers = self._answers()
        except BaseException:
            self.end()
            raise
        raised = [answer for answer in answers.values() if isinstance(answer, Raised)]
        if any(answer.kind in (HUNG, WAITING) for answer in raised):
            self.hung[request] = answers
            current_tally().hangs += 1
        if raised and self._must_end(raised):
            self.end()
        return _results(answers, self.ranks)

    def _must_end(self, raised: list[Raised]) -> bool:
        # A rank may be waiting for one that has failed.
        alike = len({answer.type for answer in raised}) == 1 and len(raised) == self.ranks
        return not (alike and raised[0].type == "Declined")

    def _answers(self) -> dict[int, Any]:
        """The answer of each rank that gave one, until all have, one is lost, or time is over."""
        answers: dict[int, Any] = {}
        until, failed = time.monotonic() + self.patience, False
        while len(answers) < self.ranks:
            waiting = {w.pipe: w.rank for w in self.workers if w.rank not in answers}
            ready = connection.wait(list(waiting), max(0.0, until - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                try:
                    answers[waiting[pipe]] = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    answers[waiting[pipe]] = self.workers[waiting[pipe]].death()
                if isinstance(answers[waiting[pipe]], Raised) and not failed:
                    until, failed = min(until, time.monotonic() + self.grace), True
                    self.grace = SHORT_GRACE
        if len(answers) < self.ranks and not failed:
            seconds, self.patience = self.patience, SHORT_PATIENCE
            for worker in self.workers:
                if worker.rank not in answers:
                    answers[worker.rank] = worker.hung(seconds)
        return answers


@dataclass
class Worker:
    """A process of the pool, as its parent sees it."""

    rank: int
    process: int
    pipe: connection.Connection
    stacks: Path
    """Where the process writes its stack when it is asked to."""
    gone: bool = False
    """Its number may be another process's by now."""

    def kill(self) -> None:
        """End the process, whatever it does."""
        if not self.gone:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            self.gone = True
        self.pipe.close()

    def death(self) -> Raised:
        """That the process is gone, and how it ended."""
        _, status = os.waitpid(self.process, 0)
        self.gone = True
        code = os.waitstatus_to_exitcode(status)
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return Raised("ConformanceFailure", DIED, f"its process ended {how}", self.stack())

    def stack(self) -> tuple[str, ...]:
        """The frames of the implementation that the process wrote down, the innermost first."""
        text = self.stacks.read_text() if self.stacks.exists() else ""
        frames = [line.strip() for line in text.splitlines() if line.strip().startswith("File")]
        own = [n for n, frame in enumerate(frames) if __file__ in frame]
        return tuple(f"  {frame}" for frame in frames[: own[0] if own else TRACEBACK_LINES])

    def hung(self, seconds: float) -> Raised:
        """That the process did not answer, and where it is."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGUSR1)
        time.sleep(0.2)
        lines = self.stack()
        waiting = bool(lines) and f"torch{os.sep}distributed" in lines[0]
        where = "waits for the others" if waiting else "is busy or stuck"
        summary = f"did not answer within {seconds:g} s: it {where}"
        return Raised("ConformanceFailure", WAITING if waiting else HUNG, summary, lines)


def _results(answers: dict[int, Any], ranks: int) -> list[Any]:
    """The answers in rank order, or what the rank that is to blame raised.

    ``answers`` are in the order in which they came: the first exception is the cause of the others,
    except that a rank which died shows at the ranks that waited for it.
    """
    raised = {rank: answer for rank, answer in answers.items() if isinstance(answer, Raised)}
    if not raised:
        return [answers[rank] for rank in range(ranks)]
    by_blame = sorted(raised, key=lambda rank: (DIED, HUNG).count(raised[rank].kind), reverse=True)
    first = raised[by_blame[0]]
    name = f"rank {by_blame[0]} of {ranks}"
    if first.type == "HarnessError":
        raise HarnessError("\n".join((f"{name}: {first.summary}", *first.details)))
    if first.type != "ConformanceFailure":
        skips = {"Declined": Declined, "Inconclusive": Inconclusive, "NotRun": NotRun}
        raise skips[first.type](first.summary)
    details = list(first.details)
    for rank in by_blame[1:]:
        details += (f"rank {rank}: {raised[rank].summary}", *raised[rank].details)
    silent = [str(rank) for rank in range(ranks) if rank not in answers]
    if silent:
        details.append(f"ranks that were still waiting: {', '.join(silent)}")
    raise ConformanceFailure(
        first.kind,
        f"{name}: {first.summary}",
        details=tuple(details),
        shown_by=first.shown_by,
        lane=first.lane,
    )


# In the processes of the pool


def _fork(subject: Subject, rank: int, ranks: int, folder: Path) -> Worker:
    ours, theirs = connection.Pipe()
    stacks = folder / f"stack-{rank}.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    process = forked()
    if process:
        theirs.close()
        return Worker(rank, process, ours, stacks)
    try:
        ours.close()
        _serve(subject, rank, ranks, folder, theirs, stacks)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(0)


def forked() -> int:
    """Fork this process, whose cases may have reserved more memory than can be promised twice."""
    with warnings.catch_warnings():
        # Python 3.12 warns of locks that other threads may hold. Of those there are here, torch's
        # own are not used again with one thread, and pytest-xdist's wait for messages.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return os.fork()
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            forget_everything()
            gc.collect()
            return os.fork()


def _serve(
    subject: Subject,
    rank: int,
    ranks: int,
    folder: Path,
    pipe: connection.Connection,
    stacks: Path,
) -> None:
    """Become a rank of the group, and answer calls until the pipe is closed."""
    import torch.distributed as dist

    signal.setitimer(signal.ITIMER_REAL, 0)  # the deadline is the parent's
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    # faulthandler's own timer is a thread, which is not here; to cancel it would wait for ever.
    for pool in _pools.values():  # so that a pool ends when this process's parent does
        for worker in pool.workers:
            worker.pipe.close()
    with stacks.open("w") as stack_file, silence():
        faulthandler.enable(file=stack_file, all_threads=False)
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
        torch.set_num_threads(1)  # the threads of the parent are not here
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=2 * PATIENCE),
        )
        answer_calls(pipe, rank, lambda request: _answered(subject, request))


def answer_calls(
    pipe: connection.Connection, rank: int, answered: Callable[[bytes], bytes]
) -> None:
    """Answer what comes through the pipe until it is closed; requests and answers are pickled."""
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        # Each rank draws other numbers: what must be alike on all has to be sent.
        torch.manual_seed(1000 + rank)
        random.seed(1000 + rank)
        pipe.send_bytes(answered(request))


def _answered(subject: Subject, request: bytes) -> bytes:
    try:
        function, arguments = pickle.loads(request)
        return pickle.dumps(_answer(subject, function, arguments))
    except Exception as error:
        return pickle.dumps(Raised.of(error))


def _answer(subject: Subject, function: RankFunction, arguments: tuple[Any, ...]) -> Any:
    try:
        return function(subject, *arguments)
    except Exception as error:
        return Raised.of(error)


@contextlib.contextmanager
def silence():
    """Drop what is printed: the standard streams of a test run are not this process's."""
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            with contextlib.suppress(OSError):
                os.dup2(nowhere.fileno(), stream)
        sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(nowhere.fileno(), "w", closefd=False))
        yield
