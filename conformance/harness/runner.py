"""The process that runs requirements: it resolves the implementation, and records how each ended.

Nothing happens until a requirement is collected. With xdist a worker writes its plan into a file that
the :class:`~conformance.harness.controller.Controller` reads; else they are the same process.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance.harness import gpu_isolation, gpu_lane, ledger, records, torchrun, verdict
from conformance.harness.environment import describe_environment, describe_implementation
from conformance.harness.failures import ConformanceFailure, NotOffered, NotRun
from conformance.harness.gpu_isolation import names_gpu
from conformance.harness.numerics import entry_of, made_by
from conformance.harness.numerics_run import ATTRIBUTE, asks_for_numerics
from conformance.harness.records import PROPERTY, REPORTED_PHASES
from conformance.harness.resolve import CannotResolve, Resolved, from_fixture, resolve
from conformance.harness.settings import Settings, SettingsError, read_settings, required_slugs
from conformance.reports.stream import header

if TYPE_CHECKING:
    from conformance.harness.requirement import Requirement
    from conformance.harness.subject import Subject

CAPTURED = 4000
"""Characters of captured output that a failing requirement shows."""


DIAGNOSED = (records.FAIL, records.LEDGER_MISMATCH)
"""Outcomes of which it is asked what the failure is; a known failure is known."""


class BrokenSuite(RuntimeError):
    """The requirements of the suite cannot be imported."""


def requirement_of(item: object) -> Requirement | None:
    """The requirement that a pytest item checks, if it checks one."""
    module = sys.modules.get("conformance.harness.requirement")
    if module is None:
        return None
    found = getattr(getattr(item, "function", None), "requirement", None)
    return found if isinstance(found, module.Requirement) else None


class Runner:
    """Resolves the implementation, gives it to the requirements, and records how each ended."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.collected = 0
        self.items: dict[str, dict[str, Any]] = {}
        """What each selected item is, by its node id."""
        self.settings = Settings()
        self.resolved: Resolved | None = None
        self.known: dict[str, dict[str, ledger.Entry]] = {}
        """Known failures by device and slug."""
        self.explicit = False
        self.lost: str | None = None
        """How this process lost the GPU."""

    @property
    def plan_folder(self) -> Path | None:
        """The folder that a worker of xdist shares with the controller."""
        worker = getattr(self.config, "workerinput", {})
        return Path(worker["conformance_plans"]) if "conformance_plans" in worker else None

    @property
    def seconds(self) -> float | None:
        """Time for one requirement, where the user gave one."""
        return self.config.getoption("conformance_timeout")

    def select(
        self, items: list[pytest.Item], smoke: bool, part: tuple[int, int] | None = None
    ) -> list[pytest.Item]:
        """The items that a run is left with.

        Taken out are, with ``--smoke``, all but the few, and without ``-m gpu`` what only a GPU can be
        held to: it takes most of a card's memory, which nobody expects of a plain run. Of what is left
        ``part`` (k, n) keeps every n-th requirement from the k-th on: all parts together are the run.
        """
        self.collected = sum(requirement_of(item) is not None for item in items)
        gpu = names_gpu(self.config.getoption("markexpr", ""))

        def asked_for(item: pytest.Item) -> bool:
            found = requirement_of(item)
            return found is None or ((found.smoke or not smoke) and (gpu or not found.gpu))

        kept = [item for item in items if asked_for(item)]
        if part is None:
            return kept
        # By slug, so that a requirement on two devices is in one part.
        slugs = dict.fromkeys(found.slug for item in kept if (found := requirement_of(item)))
        number, parts = part
        mine = set(list(slugs)[number - 1 :: parts])
        return [item for item in kept if not (found := requirement_of(item)) or found.slug in mine]

    def plan(self, session: pytest.Session) -> dict[str, Any] | None:
        """Everything that the controller needs to know; None where there is nothing to do."""
        chosen = [item for item in session.items if requirement_of(item) is not None]
        if not self.collected or (not chosen and len(session.items) and not self._asked_for()):
            return None
        suite = suite_requirements()
        self.settings = read_settings(self.config.rootpath)
        required = required_slugs(self.settings.require, suite)
        self._prepare_torch()
        profile, seed = self._activate_profile()
        workers = getattr(self.config, "workerinput", {}).get("workercount", 1)
        torchrun.check(workers=workers, repeatable=seed is not None or _draws_alike())
        implementation = self._choose(session, chosen)
        entries = [*self.settings.known_failures, *ledger.bundled_entries()]
        self.known = {
            device: ledger.select(entries, implementation["name"], suite, _planted_ids, device)
            for device in ledger.DEVICES
        }
        self.items = planned_items(chosen)
        gpu = names_gpu(self.config.getoption("markexpr", ""))
        could_hold = self._could_hold(suite, gpu)
        head = header(
            implementation=implementation,
            environment=describe_environment(_device(gpu)),
            profile=profile,
            seed=seed,
            smoke=bool(self.config.getoption("conformance_smoke")),
            planned=[item["id"] for item in self.items.values()],
            suite=could_hold,
            # One list serves runs on a CPU and on a GPU; each answers for what it could hold.
            required=[slug for slug in required if slug in could_hold],
        )
        return {"header": head, "items": self.items, "numerics": made_by(head, _cpu())}

    def _could_hold(self, suite: Mapping[str, Requirement], gpu: bool) -> dict[str, str]:
        """Slug to level of what this run could have held.

        What only a GPU can be held to counts where one was asked for; what has no part on a GPU does
        not count there, unless it runs on the CPU beside it.
        """
        planned = {item["slug"] for item in self.items.values()}
        return {
            slug: found.level
            for slug, found in suite.items()
            if slug in planned or (found.on_device if gpu else not found.gpu)
        }

    def _asked_for(self) -> bool:
        options = ("--impl", "--smoke", "--conformance")
        return any(str(a).startswith(options) for a in self.config.invocation_params.args)

    def _choose(self, session: pytest.Session, chosen: list[pytest.Item]) -> dict[str, Any]:
        """Resolve the implementation, unless a fixture of the user's gives it."""
        option, variable = self.config.getoption("impl"), os.environ.get("CONFORMANCE_IMPL")
        self.explicit = bool(option or variable)
        if not self.explicit and chosen and (place := _overridden(session, chosen[0])):
            name = f"the fixture implementation in {place}"
            return {"name": name, "version": None, "file": place, "chosen_by": "fixture"}
        choices = {
            "--impl": option,
            "CONFORMANCE_IMPL": variable,
            "pyproject.toml": self.settings.implementation,
            "default": "reference",
        }
        chosen_by, name = next((by, name) for by, name in choices.items() if name)
        seconds = {} if self.seconds is None else {"seconds": self.seconds}
        with quiet():
            self.resolved = resolve(name, **seconds)
        return describe_implementation(self.resolved, chosen_by, self.config.rootpath)

    def _activate_profile(self) -> tuple[str, str | None]:
        """Choose the settings of Hypothesis for requirements; other tests keep theirs."""
        from conformance.harness import profiles

        seed = self.config.getoption("--hypothesis-seed", None)
        name = self.config.getoption("--hypothesis-profile", None)
        if self.config.getoption("conformance_smoke"):
            name = "smoke"
        profiles.activate(name or "gate", seed=seed)
        return name or "gate", None if seed is None else str(seed)

    def _prepare_torch(self) -> None:
        import torch

        from conformance.harness import deadline, requirement

        torch.set_num_threads(1)
        if self.seconds is not None:
            requirement.DEFAULT_DEADLINE["seconds"] = self.seconds
        # Output is captured while a test runs; the stacks of a hang must reach the user.
        with contextlib.suppress(OSError):
            if self.plan_folder is not None and names_gpu(self.config.getoption("markexpr", "")):
                worker = self.config.workerinput["workerid"]
                file = gpu_isolation.stack_file(self.plan_folder, worker)
                deadline.stacks_go_to(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
            else:
                deadline.stacks_go_to(os.dup(2))

    def subject(self, contract: str, implementation: Callable[[], object], device: str) -> Subject:
        """The contract's method of the implementation; NotOffered where it has none."""
        if device == "cuda" and not gpu_lane.has_cuda():
            raise NotRun("no CUDA device")
        resolved = self.resolved
        if not self.explicit:
            adapter = implementation()
            if resolved is None or adapter is not resolved.adapter:
                try:
                    resolved = from_fixture(adapter, "fixture implementation")
                except CannotResolve as error:
                    raise pytest.UsageError(f"conformance: {error}") from None
        method = getattr(resolved.adapter, contract, None)
        if not callable(method):
            raise NotOffered(f"the implementation has no {contract}")
        from conformance.harness.subject import Subject

        return Subject(
            contract, method, device=device, import_lines=resolved.import_lines(contract)
        )

    def entry_of(self, item: pytest.Item) -> ledger.Entry | None:
        """The known failure that an item is about."""
        found = requirement_of(item)
        planned = self.items.get(item.nodeid)
        if found is None or planned is None:
            return None
        return self.known[planned["device"]].get(found.slug)

    def stop_if_lost(self, item: pytest.Item) -> None:
        """Raise NotRun where a requirement on a GPU cannot run any more."""
        planned = self.items.get(item.nodeid)
        if planned is None or planned["device"] != "cuda":
            return
        if self.lost:
            raise NotRun(f"{self.lost}, and there is no fresh process without pytest-xdist")
        if self.plan_folder is not None:
            lost = gpu_isolation.read_lost(self.plan_folder)
            if why := gpu_isolation.why_not_run(lost, planned["contract"]):
                raise NotRun(why)

    def _note_if_lost(self, planned: Mapping[str, Any], error: BaseException | None) -> None:
        why = gpu_lane.why_lost(error)
        in_a_worker = hasattr(self.config, "workerinput")
        if why and (in_a_worker or why != gpu_lane.OUT_OF_MEMORY):
            self.lost = f"the device was lost in {planned['id']} ({why})"

    def finish_report(
        self, item: pytest.Item, call: pytest.CallInfo, error: BaseException | None, result: Any
    ) -> None:
        """Put the record on pytest's report, and make the report say what the record says."""
        found = requirement_of(item)
        planned = self.items.get(item.nodeid)
        if found is None or planned is None:
            return
        result.sections = [(name, _last_part(text)) for name, text in result.sections]
        if call.when not in REPORTED_PHASES or (call.when == "setup" and error is None):
            return
        self._note_if_lost(planned, error)
        outcome, reason = records.outcome_of(error, call.when)
        record = records.make_record(
            planned,
            outcome,
            reason,
            duration=call.duration,
            tally=found.last_tally if call.when == "call" else None,
            error=error,
        )
        entry = self.entry_of(item)
        if entry is not None:
            self._settle(found, entry, record)
        if record["outcome"] in DIAGNOSED and isinstance(error, ConformanceFailure):
            record["diagnosis"] = records.clean(self._diagnose(item, found, error))
        _show(result, record, error, item)
        result.user_properties = [
            *(p for p in result.user_properties if p[0] != PROPERTY),
            (PROPERTY, json.dumps(record, allow_nan=False)),
        ]
        if asks_for_numerics(self.config) and record["outcome"] == records.PASS:
            setattr(result, ATTRIBUTE, entry_of(found.last_tally.errors))

    def _diagnose(
        self, item: pytest.Item, found: Requirement, failure: ConformanceFailure
    ) -> dict[str, Any] | None:
        """What the failure is, in the record's form; its message says it, too."""
        subject = item.funcargs.get(found.contract)
        failing = found.last_tally.failing
        given = self.config.getoption("conformance_diagnosis")
        if given == 0 or subject is None or not failing or found.gpu or gpu_lane.why_lost(failure):
            return None
        if torchrun.several_ranks():  # it ends by the clock, and each rank has its own
            return None
        from conformance.diagnosis import search, wording

        if failure.kind in search.NOT_REPEATED:
            return None
        seconds = search.SECONDS if given is None else given
        workers = getattr(self.config, "workerinput", {}).get("workercount", 1)
        with quiet():  # what the implementation prints is not captured any more
            failure.diagnosis = search.diagnose(
                found, subject, failure, failing, seconds=seconds / workers
            )
        return wording.as_data(failure.diagnosis)

    def _settle(self, found: Requirement, entry: ledger.Entry, record: dict[str, Any]) -> None:
        failure = record["failure"]
        outcome, reason = ledger.settle(
            entry,
            record["outcome"],
            failure["kind"] if failure else None,
            today=datetime.date.today(),
            kind_of_bug=lambda bug: _kind_of_bug(found, bug),
        )
        record["ledger"] = entry.as_json()
        record["outcome"], record["reason"] = outcome, records.clean(reason or record["reason"])


def plan_or_stop(runner: Runner, session: pytest.Session) -> dict[str, Any] | None:
    """The plan of the run, or one line that says why there is none, in a form that can travel."""
    if session.testsfailed and not session.config.getoption("continue_on_collection_errors"):
        return None  # pytest reports the files that cannot be collected, and stops
    try:
        return runner.plan(session)
    except (CannotResolve, SettingsError, ledger.LedgerError, torchrun.CannotRun) as error:
        return {"stop": f"conformance: {error}", "exit_code": verdict.USAGE}
    except BrokenSuite as error:
        return {
            "stop": f"conformance: broken harness: {error}",
            "exit_code": verdict.BROKEN_HARNESS,
        }


def suite_requirements() -> dict[str, Requirement]:
    """Every requirement, whether this run collected it or not."""
    from conformance.harness.requirement import all_requirements

    try:
        return all_requirements()
    except Exception as error:
        raise BrokenSuite(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def planned_items(chosen: list[pytest.Item]) -> dict[str, dict[str, Any]]:
    """What each item is, by node id. Ids are slugs, with the device and a number where needed."""
    planned: dict[str, dict[str, Any]] = {}
    taken: set[str] = set()
    for item in chosen:
        found = requirement_of(item)
        params = getattr(getattr(item, "callspec", None), "params", {})
        device = params.get("conformance_device", "cpu")
        id = base = found.slug if device == "cpu" else f"{found.slug}[{device}]"
        number = 2
        while id in taken:
            id, number = f"{base}#{number}", number + 1
        taken.add(id)
        planned[item.nodeid] = {
            "id": id,
            "slug": found.slug,
            "level": found.level,
            "contract": found.contract,
            "device": device,
        }
    return planned


@contextlib.contextmanager
def quiet():
    """Swallow what an adapter prints while it is imported: it can be megabytes."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _overridden(session: pytest.Session, item: pytest.Item) -> str | None:
    """Where the user overrides the fixture ``implementation``, if anywhere."""
    definitions = session._fixturemanager.getfixturedefs("implementation", item) or ()
    for definition in reversed(definitions):
        module = definition.func.__module__
        if module != "conformance.plugin":
            file = getattr(sys.modules.get(module), "__file__", None) or module
            path = Path(file)
            root = session.config.rootpath
            return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        return None
    return None


def _planted_ids() -> Iterable[str]:
    from conformance.known_bugs import all_known_bugs

    return all_known_bugs()


def _kind_of_bug(found: Requirement, bug: str) -> str | None:
    """The kind of failure of a requirement against a planted bug; None where it does not fail."""
    from conformance.harness import profiles
    from conformance.known_bugs import all_known_bugs

    planted = all_known_bugs()[bug]
    if planted.contract != found.contract:
        return None
    method = getattr(planted.make(), planted.contract)
    with profiles.temporarily(profiles.without_shrinking(profiles.active())):
        try:
            found.check(method)
        except ConformanceFailure as failure:
            return failure.kind
        except Exception:
            return None
    return None


def _show(result: Any, record: dict[str, Any], error: BaseException | None, item: Any) -> None:
    """Make pytest's own report (progress letter, text, junit) agree with the record."""
    outcome, reason = record["outcome"], record["reason"]
    place = (str(item.path), (item.location[1] or 0) + 1)
    if outcome == records.PASS:
        return
    if outcome == records.KNOWN_FAILURE:
        result.outcome, result.wasxfail = "skipped", reason
        result.longrepr = (*place, f"known failure: {reason}")
    elif outcome == records.LEDGER_MISMATCH:
        result.outcome = "failed"
        result.longrepr = f"{record['id']}: {reason}" + (f"\n\n{error}" if error else "")
    elif outcome == records.FAIL:
        result.outcome, result.longrepr = "failed", str(error)
    elif outcome == records.ERROR:
        result.outcome = "failed"  # pytest's traceback stays: it is the suite's own fault
        if isinstance(error, pytest.UsageError):
            result.longrepr = reason
    else:
        result.outcome = "skipped"
        result.longrepr = (*place, f"{verdict.WORDS[outcome]}: {reason}")
    if outcome != records.KNOWN_FAILURE and hasattr(result, "wasxfail"):
        del result.wasxfail  # a mark in the user's code is no entry of the ledger


def _draws_alike() -> bool:
    """Whether another process draws the same cases with the active profile."""
    from conformance.harness import profiles

    return profiles.active().derandomize


def _last_part(text: str) -> str:
    if len(text) <= CAPTURED:
        return text
    return f"… ({len(text) - CAPTURED} characters left out)\n{text[-CAPTURED:]}"


def _cpu() -> str:
    """The family of the processor and its widest vector instructions that torch uses."""
    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _device(gpu: bool) -> str:
    if not gpu:
        return "cpu"
    if not gpu_lane.has_cuda():
        return "no CUDA device"
    import torch

    return torch.cuda.get_device_name()
