"""The suite on the ranks of torchrun, over two nodes: one report, one status, no rank left waiting.

Two agents of torchrun on this machine are two nodes to each other: they share a port and no process.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys

import pytest
from command_line import BOUND, ROOT, environment, pytest_run, start
from test_readme import code_blocks

from conformance.harness import torchrun
from conformance.reports.reader import read_report

ROW_SUM = "parallel_linear.row.sum"

LAYERS = '''"""A row-parallel layer whose sum reaches the ranks below a number only."""

import torch
import torch.distributed as dist

REACHED = {reached}


class Row(torch.nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())
        self.bias = None if bias is None else torch.nn.Parameter(bias.clone())

    def forward(self, x):
        y = torch.nn.functional.linear(x, self.weight)
        total = y.detach().clone()
        dist.all_reduce(total)
        y = y + (total - y.detach()) if dist.get_rank() < REACHED else y
        return y if self.bias is None else y + self.bias

    def shards(self):
        return dict(self.named_parameters())


def parallel_linear(kind, weights):
    if kind != "row" or not dist.is_initialized():
        raise NotImplementedError(f"no {{kind}} here")
    part = weights["weight"].chunk(dist.get_world_size(), 1)[dist.get_rank()]
    return Row(part, weights.get("bias"))
'''

LOCAL = '''"""A test that fails on one rank alone."""

import os


def test_this_is_the_first_rank():
    assert os.environ["RANK"] == "0"
'''


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def shown_commands() -> list[str]:
    """The commands of docs/pull_requests.md, one a node."""
    page = (ROOT / "docs/pull_requests.md").read_text()
    lines = [text.replace("\\\n", " ").strip() for text in code_blocks("sh", page)]
    found = [line for line in lines if line.startswith("torchrun ")]
    assert len(found) == 2
    return found


def on_two_nodes(folder, *arguments, reached=2):
    """Exit status and output of the agent of each node, one rank a node."""
    (folder / "layers.py").write_text(LAYERS.format(reached=reached))
    (folder / "test_local.py").write_text(LOCAL)
    port = free_port()
    agents = []
    for line in shown_commands():
        words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
        given = {"first.example": "127.0.0.1", "29500": str(port), "my_layers": "layers"}
        command = [given.get(word, word) for word in words]
        command += ["-p", "no:cacheprovider", f"--rootdir={folder}", *arguments]
        agents.append(
            subprocess.Popen(
                [*command, "-k", f"{ROW_SUM} or first_rank"],
                cwd=folder,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [agent.communicate(timeout=2 * BOUND)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(agent.returncode, output) for agent, output in zip(agents, outputs)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A right layer, a layer that is wrong on the second rank, and a test that fails there."""
    made = {}
    for name, arguments, reached in (
        ("right", (), 2),
        ("wrong", (), 1),
        ("local", ("test_local.py",), 2),
    ):
        folder = tmp_path_factory.mktemp(name)
        run = start(
            ("nodes", name), lambda f=folder, a=arguments, r=reached: on_two_nodes(f, *a, reached=r)
        )
        made[name] = (folder, run)
    return {name: (folder, run.result()) for name, (folder, run) in made.items()}


def test_a_right_implementation_is_green_on_every_node(runs):
    _, nodes = runs["right"]
    for status, output in nodes:
        assert status == 0, output
        assert "verdict partial: 1 of" in output


@pytest.mark.parametrize("name", ["right", "wrong", "local"])
def test_there_is_one_whole_report(runs, name):
    """Every rank runs pytest with the same folder; a stream of two runs would be refused."""
    folder, nodes = runs[name]
    report = read_report(folder / "out")
    (record,) = report.records
    assert record["slug"] == ROW_SUM
    assert record["executed"] or name == "wrong", nodes[0][1]
    assert report.footer["verdict"] == ("fail" if name == "wrong" else "partial")


def test_what_one_rank_gets_wrong_is_red_on_every_node_and_names_the_rank(runs):
    _, nodes = runs["wrong"]
    for status, output in nodes:
        assert status == 1, output
        assert f"{ROW_SUM} (core): wrong values" in output
        assert "output of rank 1 differs" in output
        assert "exitcode  : 1 " in output


def test_all_ranks_end_as_the_worst_of_them(runs):
    _, nodes = runs["local"]
    for status, output in nodes:
        assert status == 1, output
        assert "exitcode  : 1 " in output
    assert "2 passed" in nodes[0][1], "the first rank failed by itself"
    assert "1 failed, 1 passed" in nodes[1][1]


# What needs no second rank


UNDER = {torchrun.STARTED: "none", "RANK": "0", "WORLD_SIZE": "2"}


def refused(folder, *arguments, **variables):
    run = pytest_run(
        folder, "--pyargs", "conformance.test_parallel_linear", *arguments, **UNDER, **variables
    )
    assert "Traceback" not in run.err, run.text
    return run


def test_a_profile_that_draws_at_random_needs_a_seed(tmp_path):
    run = refused(tmp_path, "--hypothesis-profile=explore")
    assert run.status == 4, run.text
    assert "this profile draws at random: give --hypothesis-seed" in run.err


def test_a_rank_is_one_process(tmp_path):
    run = refused(tmp_path, "-n", "2", "-k", ROW_SUM)
    assert run.status == 4, run.text
    assert "under torchrun a rank is one process: leave out -n 2" in run.out + run.err


@pytest.mark.parametrize(("rank", "reports"), [("0", True), ("1", False), (None, True)])
def test_the_first_rank_reports_and_so_does_a_run_without_ranks(monkeypatch, rank, reports):
    for name in UNDER:
        monkeypatch.delenv(name, raising=False)
    if rank is not None:
        for name, value in {**UNDER, "RANK": rank}.items():
            monkeypatch.setenv(name, value)
    assert torchrun.reports() is reports
    assert torchrun.several_ranks() is (rank is not None)


def test_without_torchrun_a_status_stays_and_anything_may_run(monkeypatch):
    for name in UNDER:
        monkeypatch.delenv(name, raising=False)
    torchrun.check(workers=8, repeatable=False)
    assert torchrun.agreed(6) == 6
