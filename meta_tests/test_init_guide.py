"""docs/pull_requests.md: its commands and examples run as written, its tables are those of the code."""

from __future__ import annotations

import argparse
import datetime
import inspect
import re
import shlex
import tomllib

import pytest
from command_line import ROOT
from test_readme import block_that_starts, code_blocks, installed, run  # noqa: F401
from test_workflows import ACTION
from toy_repository import ATTENTION

from conformance.contracts import CONTRACTS
from conformance.gate import command as gate
from conformance.harness import verdict
from conformance.harness.ledger import NEEDED, OPTIONAL
from conformance.harness.settings import read_settings
from conformance.scaffold import command as scaffold

GUIDE = (ROOT / "docs/pull_requests.md").read_text()
ADAPTERS = (ROOT / "docs/adapters.md").read_text()


def commands(start: str) -> list[str]:
    """The lines of the block that starts so, without comments."""
    lines = block_that_starts("sh", start, GUIDE).strip().splitlines()
    return [line.partition("  #")[0].strip() for line in lines]


def test_the_guide_leads_from_nothing_to_a_gate(tmp_path, installed):  # noqa: F811
    """From the wheel, in an empty folder, with the commands and the adapter of the guide."""
    init = commands("pip install")[-1]
    made = run(init, tmp_path, installed)
    assert made.returncode == 0, made.stderr
    (tmp_path / "my_model").mkdir()
    (tmp_path / "my_model/layers.py").write_text(ATTENTION)
    adapter = block_that_starts("python", "# conformance_adapter.py", GUIDE)
    (tmp_path / "conformance_adapter.py").write_text(adapter)

    smoke, _, own = commands("python -m pytest --pyargs conformance --smoke")
    for command in (smoke, f"{own} --smoke"):
        ended = run(command, tmp_path, installed)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "verdict partial: smoke" in ended.stdout

    layers = tmp_path / "my_model/layers.py"
    layers.write_text(layers.read_text().replace("k.shape[2] - q.shape[2]", ""))
    ended = run(smoke, tmp_path, installed)
    assert ended.returncode == 1, ended.stdout
    assert "attention.causal.aligned-to-last-key (core): wrong keys" in ended.stdout


def test_the_tables_of_the_guide_are_settings_and_an_entry_has_every_key(tmp_path):
    text = "\n".join(code_blocks("toml", GUIDE))
    (tmp_path / "pyproject.toml").write_text(text)
    settings = read_settings(tmp_path)
    assert settings.implementation == "conformance_adapter"
    assert settings.require
    (entry,) = tomllib.loads(text)["tool"]["conformance"]["known_failures"]
    assert entry.keys() == {**NEEDED, **OPTIONAL}.keys()
    assert entry["expires"] > datetime.date(2026, 1, 1)


def test_every_command_has_the_options_that_it_is_shown_with(monkeypatch, capsys):
    shown = [
        shlex.split(line, comments=True)[3:]
        for block in code_blocks("sh", GUIDE)
        for line in block.splitlines()
        if line.startswith("python -m conformance ")
    ]
    parsers = {"init": scaffold.add_options, "gate": gate.add_options}
    assert {words[0] for words in shown} == {"init", "gate"}
    for name, *arguments in shown:
        parser = argparse.ArgumentParser()
        parsers[name](parser)
        parser.parse_args(arguments)
    options = set(re.findall(r"`(--[a-z-]+)`", GUIDE[: GUIDE.index("## Fill in")]))
    parser = argparse.ArgumentParser()
    scaffold.add_options(parser)
    assert options <= {name for action in parser._actions for name in action.option_strings}


def test_the_verdicts_and_exit_codes_are_those_of_the_code():
    section = GUIDE[GUIDE.index("## The verdict") : GUIDE.index("## The action")]
    rows = re.findall(r"^\| `(\w+)` \| (\d) \|", section, re.MULTILINE)
    source = inspect.getsource(verdict.judge)
    assert {word for word, _ in rows} == {"pass", "partial", "fail", "inconclusive"}
    assert all(f'"{word}"' in source for word, _ in rows)
    codes = {verdict.OK, verdict.FAILED, verdict.BROKEN_HARNESS, verdict.USAGE, verdict.TOO_FEW}
    assert {int(code) for _, code in rows} == codes


def test_the_table_of_inputs_is_that_of_the_action():
    section = GUIDE[GUIDE.index("## The action") : GUIDE.index("## On several runners")]
    rows = re.findall(r"^\| `([\w-]+)` \|([^|]*)\|", section, re.MULTILINE)
    assert [name for name, _ in rows] == list(ACTION["inputs"])
    for name, default in rows:
        if name != "token":
            assert default.strip().strip("`") == ACTION["inputs"][name]["default"]
    for output in ACTION["outputs"]:
        assert f"`{output}`" in section


@pytest.mark.parametrize("page", [GUIDE, ADAPTERS], ids=["pull_requests.md", "adapters.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page)
    assert links
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_the_table_of_contracts_has_each_with_its_arguments():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)\(([^)]*)\)` \|", ADAPTERS, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(CONTRACTS)
    for name, method, arguments in rows:
        contract = CONTRACTS[name]
        options = ("*", "options") if contract.defaults else ()
        assert method == name
        assert arguments == ", ".join((*contract.positional, *options))
