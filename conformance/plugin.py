"""The pytest plugin: options, fixtures and hooks. What they do is in ``conformance.harness``.

It is loaded in every pytest run of an environment that has this package, so it imports nothing but
pytest, and costs nothing, until a conformance requirement is collected.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conformance.harness.controller import Controller
    from conformance.harness.runner import Runner

RUNNER = pytest.StashKey["Runner"]()
CONTROLLER = pytest.StashKey["Controller"]()

OUR_PROFILES = ("gate", "explore", "nightly", "smoke")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the suite."""
    group = parser.getgroup("conformance", "model conformance")
    group.addoption(
        "--impl",
        metavar="NAME",
        help="implementation under test: a bundled adapter, known-bug:ID, variant:ID, "
        "package.module[:object] or path/to/file.py[:object] "
        "(else CONFORMANCE_IMPL, [tool.conformance] implementation, the reference)",
    )
    group.addoption(
        "--smoke",
        dest="conformance_smoke",
        action="store_true",
        help="only the few requirements, in seconds, that show whether the adapter is wired right",
    )
    group.addoption(
        "--conformance-part",
        metavar="K/N",
        type=_part,
        help="only every N-th requirement, beginning with the K-th: a run split over N machines",
    )
    group.addoption(
        "--conformance-report",
        metavar="DIR",
        help="write report.jsonl, report.html, summary.md and a badge into this folder",
    )
    group.addoption(
        "--conformance-timeout",
        metavar="SECONDS",
        type=_seconds,
        help="time for one requirement, and for importing the adapter",
    )
    group.addoption(
        "--conformance-diagnosis",
        metavar="SECONDS",
        type=_seconds_or_none,
        help="time for comparing a contract's failures with documented bugs (default 10, 0: none)",
    )
    group.addoption(
        "--numerics-record",
        metavar="FILE",
        help="store how large the errors of every requirement that passes are",
    )
    group.addoption(
        "--numerics-check",
        metavar="FILE",
        help="fail where an error is larger than in the recorded FILE by a factor",
    )
    group.addoption(
        "--numerics-factor",
        metavar="FACTOR",
        type=_factor,
        help="the factor of --numerics-check (default 1.5)",
    )


def _seconds(text: str) -> float:
    import argparse

    seconds = _finite(text)
    if seconds is None or seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _seconds_or_none(text: str) -> float:
    import argparse

    seconds = _finite(text)
    if seconds is None or seconds < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return seconds


def _finite(text: str) -> float | None:
    import math

    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _part(text: str) -> tuple[int, int]:
    import argparse

    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 1/4")
    return int(number), int(parts)


def _factor(text: str) -> float:
    import argparse

    factor = _finite(text)
    if factor is None or factor < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a factor of 1 or more")
    return factor


@pytest.hookimpl(wrapper=True)  # before xdist reads how many workers there are
def pytest_cmdline_main(config: pytest.Config):
    """With ``-m gpu`` run the suite in a process that can be replaced."""
    if _on_gpu(config):
        from conformance.harness import gpu_isolation

        gpu_isolation.arrange(config)
    return (yield)


def pytest_report_header(config: pytest.Config) -> str | None:
    """How requirements on a GPU are kept apart."""
    if not _on_gpu(config):
        return None
    from conformance.harness import gpu_isolation

    return gpu_isolation.header(config)


def _on_gpu(config: pytest.Config) -> bool:
    expression = config.getoption("markexpr", "") or ""
    if "gpu" not in expression:
        return False
    from conformance.harness.gpu_isolation import names_gpu

    return names_gpu(expression)


@pytest.hookimpl(tryfirst=True)  # before Hypothesis's own plugin loads the profile by its name
def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers, and answer for what the options ask at once."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; asked for by -m gpu")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    if config.getoption("--hypothesis-profile", None) in OUR_PROFILES:
        from conformance.harness import profiles

        profiles.register()
    asked = ("conformance_report", "numerics_record", "numerics_check", "numerics_factor")
    if any(map(config.getoption, asked)) and not hasattr(config, "workerinput"):
        _controller(config)


def _runner(config: pytest.Config) -> Runner:
    if RUNNER not in config.stash:
        from conformance.harness.runner import Runner

        config.stash[RUNNER] = Runner(config)
    return config.stash[RUNNER]


def _controller(config: pytest.Config) -> Controller:
    if CONTROLLER not in config.stash:
        from conformance.harness.controller import Controller

        config.stash[CONTROLLER] = Controller(config)
        config.pluginmanager.register(config.stash[CONTROLLER], "conformance.controller")
    return config.stash[CONTROLLER]


def _controller_of(report: pytest.TestReport) -> Controller | None:
    """The controller of the run that a report of xdist is of."""
    return report.node.config.stash.get(CONTROLLER, None)


def _requirement(item: object):
    """The requirement of an item, without importing anything for items that are not ours."""
    if "conformance.harness.requirement" not in sys.modules:
        return None
    from conformance.harness.runner import requirement_of

    return requirement_of(item)


# Fixtures


@pytest.fixture(scope="session")
def implementation(pytestconfig: pytest.Config) -> object:
    """The implementation under test; override it in your conftest.py to test your own."""
    return _runner(pytestconfig).resolved.adapter


@pytest.fixture(scope="session")
def conformance_device(request: pytest.FixtureRequest) -> str:
    """The device of the tensors: ``cpu``, or with ``-m gpu`` each of ``cpu`` and ``cuda``."""
    return getattr(request, "param", "cpu")


def _contract_fixture(contract: str):
    # Module scope: two folders may each have their own implementation, and a session-wide value
    # would be that of the first. Hypothesis forbids function scope.
    @pytest.fixture(scope="module", name=contract)
    def fixture(request: pytest.FixtureRequest, conformance_device: str):
        return _runner(request.config).subject(
            contract, lambda: request.getfixturevalue("implementation"), conformance_device
        )

    fixture.__doc__ = f"The method ``{contract}`` of the implementation under test."
    return fixture


attention = _contract_fixture("attention")
rotary = _contract_fixture("rotary")
rotary_module = _contract_fixture("rotary_module")
cached_attention = _contract_fixture("cached_attention")
gpt_checkpoint = _contract_fixture("gpt_checkpoint")
parallel_linear = _contract_fixture("parallel_linear")
weight_loader = _contract_fixture("weight_loader")
causal_lm = _contract_fixture("causal_lm")
flat_layout = _contract_fixture("flat_layout")
flat_shards = _contract_fixture("flat_shards")
moe_router = _contract_fixture("moe_router")
experts = _contract_fixture("experts")
moe_block = _contract_fixture("moe_block")
expert_parallel_block = _contract_fixture("expert_parallel_block")
shared_core = _contract_fixture("shared_core")
shared_core_fit = _contract_fixture("shared_core_fit")
shared_core_block = _contract_fixture("shared_core_block")
compression_statistics = _contract_fixture("compression_statistics")
compressed_checkpoint = _contract_fixture("compressed_checkpoint")
distillation_loss = _contract_fixture("distillation_loss")
loglikelihood = _contract_fixture("loglikelihood")
checkpoint_watcher = _contract_fixture("checkpoint_watcher")


# Collection


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With ``-m gpu`` requirements are there for the CPU and for a GPU, where they have a part."""
    requirement = _requirement(metafunc)
    if requirement is None or "conformance_device" not in metafunc.fixturenames:
        return
    from conformance.harness.gpu_isolation import names_gpu

    cuda = pytest.param("cuda", marks=pytest.mark.gpu)
    if not requirement.on_device:
        return
    if requirement.gpu:
        devices = [cuda]
    elif names_gpu(metafunc.config.getoption("markexpr", "")):
        devices = ["cpu", cuda]
    else:
        return
    metafunc.parametrize("conformance_device", devices, indirect=True, scope="session")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let ``-k`` select by slug."""
    requirement = _requirement(item)
    if requirement is not None:
        item.extra_keyword_matches.add(requirement.slug)


@pytest.hookimpl(tryfirst=True)  # before -k and -m take items away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Count the requirements, and keep those that the options ask for."""
    if not any(_requirement(item) for item in items):
        return
    smoke, part = map(config.getoption, ("conformance_smoke", "conformance_part"))
    kept = _runner(config).select(items, smoke, part)
    dropped = [item for item in items if item not in set(kept)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.hookimpl(tryfirst=True)  # before xdist tells the controller that collection is over
def pytest_collection_finish(session: pytest.Session) -> None:
    """Resolve the implementation and plan the run."""
    config = session.config
    if RUNNER not in config.stash or config.getoption("collectonly"):
        return
    from conformance.harness.runner import plan_or_stop

    plan = plan_or_stop(config.stash[RUNNER], session)
    worker = getattr(config, "workerinput", None)
    if worker is None:
        _controller(config).accept(plan)
    elif plan is not None:
        if "stop" in plan:
            session.items[:] = []
        # Renamed when it is whole: the controller reads when another worker is ready.
        path = Path(worker["conformance_plans"]) / f"{worker['workerid']}.json"
        path.with_suffix(".part").write_text(json.dumps(plan), "utf-8")
        path.with_suffix(".part").replace(path)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Tell a worker of xdist where to leave its plan."""
    node.workerinput["conformance_plans"] = _controller(node.config).folder_for_plans()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node) -> None:
    """Take the plan that a worker of xdist left."""
    _controller(node.config).read_plans()


# Running


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A requirement on a GPU does not run where the GPU is lost."""
    runner = item.config.stash.get(RUNNER, None)
    if runner is not None:
        runner.stop_if_lost(item)


@pytest.hookimpl(tryfirst=True)  # before fixtures are put away, which may be on the GPU
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A worker that lost the GPU has told so, and ends here, where xdist blames nothing else."""
    runner = item.config.stash.get(RUNNER, None)
    if runner is not None and runner.lost and hasattr(item.config, "workerinput"):
        from conformance.harness import gpu_isolation

        gpu_isolation.end_worker()


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport) -> None:
    """Note that a requirement cost a worker, and do not count it twice."""
    controller = _controller_of(report)
    if controller is not None:
        controller.worker_died(crashitem, report)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A known failure is not made smaller: it is only to fail as it did."""
    runner = item.config.stash.get(RUNNER, None)
    if runner is None or runner.entry_of(item) is None:
        return (yield)
    from conformance.harness import profiles

    with profiles.temporarily(profiles.without_shrinking(profiles.active())):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Put the record of a requirement on its report."""
    runner = item.config.stash.get(RUNNER, None)
    if runner is None or _requirement(item) is None:
        return (yield)
    error = call.excinfo.value if call.excinfo is not None else None  # pytest replaces skips
    for name in ("hypothesis_report_information", "_hypothesis_failing_examples"):
        vars(item).pop(name, None)  # our own message says it, with lines to reproduce it
    report = yield
    runner.finish_report(item, call, error, report)
    return report


# Reporting


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """The verdict, counts, failures, and what was not checked."""
    controller = config.stash.get(CONTROLLER, None)
    if controller is None or controller.verdict is None:
        return
    terminalreporter.section(controller.title)
    for colour, line in controller.lines():
        terminalreporter.write_line(line, **({colour: True} if colour else {}))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """The verdict decides the exit status, as far as it is worse than pytest's own."""
    controller = session.config.stash.get(CONTROLLER, None)
    if controller is not None:
        from conformance.harness import torchrun

        session.exitstatus = torchrun.agreed(controller.finish(int(exitstatus)))
