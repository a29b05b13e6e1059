"""``python -m conformance init``: what it writes, what it leaves, and that it writes all or nothing."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
from command_line import ROOT, environment

from conformance.__main__ import main
from conformance.contracts import CONTRACTS
from conformance.harness.requirement import all_requirements
from conformance.harness.settings import read_settings, required_slugs
from conformance.scaffold import adapter, files, workflows

FILES = [
    "conformance_adapter.py",
    "pyproject.toml",
    "tests/test_conformance.py",
    "tests/conftest.py",
    ".github/actions/conformance/action.yml",
    ".github/workflows/conformance.yml",
]


def init(folder, *options):
    """The exit status of the command for ``folder``."""
    return main(["init", str(folder), *options])


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, and every folder, as None."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(folder, capsys, *options) -> str:
    """The one line of a command that is refused and leaves everything as it was."""
    before = content(folder.parent)
    assert init(folder, *options) == 4
    assert content(folder.parent) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("conformance init: ")
    assert printed.err.count("\n") == 1
    return printed.err


# The adapter


@pytest.fixture(scope="module")
def functions():
    """The functions of a skeleton of every contract, as a type checker sees their names."""
    source = adapter.skeleton(CONTRACTS)
    names = {}
    typing.TYPE_CHECKING = True
    try:
        exec(compile(source, "conformance_adapter.py", "exec", dont_inherit=True), names)
    finally:
        typing.TYPE_CHECKING = False
    return names


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_function_has_the_signature_and_the_words_of_its_contract(functions, name):
    method = getattr(CONTRACTS[name].protocol, name)
    function = functions[name]
    contract = inspect.signature(method)
    parameters = [p for p in contract.parameters.values() if p.name != "self"]
    assert inspect.signature(function) == contract.replace(parameters=parameters)
    assert inspect.getdoc(function) == inspect.getdoc(method)
    assert CONTRACTS[name].signature_problem(function) is None


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_name_in_a_signature_is_imported(functions, name):
    hints = typing.get_type_hints(functions[name])
    assert set(hints) == set(functions[name].__annotations__)


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_function_declines_until_it_is_filled_in(functions, name):
    parameters = CONTRACTS[name]
    needed = {k: None for k, v in parameters.defaults.items() if v is inspect.Parameter.empty}
    with pytest.raises(NotImplementedError, match=f"{name}: call your code here"):
        functions[name](*[None] * len(parameters.positional), **needed)


def test_a_skeleton_imports_nothing_of_the_suite_and_no_torch(tmp_path):
    (tmp_path / "conformance_adapter.py").write_text(adapter.skeleton(CONTRACTS))
    code = "import sys, conformance_adapter; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "conformance", "reference_impl"}


def test_lines_of_a_skeleton_are_as_short_as_formatters_make_them():
    head = adapter.skeleton(CONTRACTS).split("\n\n\n")[0]
    assert max(map(len, head.splitlines())) <= 100


# What is written


def test_everything_is_written_and_said(tmp_path, capsys):
    assert init(tmp_path, "--contracts", "rotary, attention") == 0
    written = [path for path, data in content(tmp_path).items() if data is not None]
    assert sorted(written) == sorted(FILES)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"wrote {path}" for path in FILES]
    assert lines[-1].startswith("next: ")


def test_the_tests_import_the_contracts_that_were_asked_for(tmp_path):
    assert init(tmp_path, "--contracts", "rotary,attention,rotary") == 0
    text = (tmp_path / "tests/test_conformance.py").read_text()
    lines = [line for line in text.splitlines() if line.startswith("from ")]
    assert lines == [
        "from conformance.test_attention import *",
        "from conformance.test_rotary import *",
    ]


def test_the_workflows_are_the_files_of_the_suite(tmp_path):
    assert init(tmp_path, "--gpu") == 0
    action = ".github/actions/conformance/action.yml"
    assert (tmp_path / action).read_text() == (ROOT / action).read_text()
    templates = ROOT / "conformance/scaffold/templates"
    for name in ("conformance.yml", "conformance-gpu.yml"):
        text = (tmp_path / ".github/workflows" / name).read_text()
        assert text == (templates / name).read_text()


def test_a_split_run_has_a_workflow_of_the_same_name(tmp_path):
    assert init(tmp_path, "--split") == 0
    text = (tmp_path / workflows.CPU_GATE).read_text()
    assert text == (ROOT / "conformance/scaffold/templates/conformance-split.yml").read_text()


def test_the_wheel_brings_the_action():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = table["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included[workflows.ACTION] == "conformance/scaffold/templates/action.yml"
    assert (ROOT / workflows.ACTION).is_file()


def test_the_table_requires_what_shows_that_the_adapter_is_wired_right(tmp_path):
    assert init(tmp_path, "--contracts", "rotary,experts") == 0
    settings = read_settings(tmp_path)
    assert settings.implementation == "conformance_adapter"
    suite = all_requirements()
    required = required_slugs(settings.require, suite)
    assert set(required) == {
        r.slug for r in suite.values() if r.smoke and r.contract in ("rotary", "experts")
    }


@pytest.mark.parametrize(
    "before",
    [
        b'[project]\nname = "toy"\n',
        b'[project]\nname = "toy"',
        b'# ours\r\n[project]\r\nname = "t\xc3\xb6y"\r\n\r\n[tool.ruff]\r\nline-length = 99\r\n',
        b"[[tool.mypy.overrides]]\nmodule = []\n\n\n",
        b"",
    ],
    ids=["plain", "no last line end", "CRLF", "table of an array", "empty"],
)
def test_a_pyproject_keeps_every_byte_and_gets_the_table(tmp_path, capsys, before):
    file = tmp_path / "pyproject.toml"
    file.write_bytes(before)
    file.chmod(0o640)
    assert init(tmp_path) == 0
    after = file.read_bytes()
    assert after.startswith(before)
    assert file.stat().st_mode & 0o777 == 0o640
    assert (b"\r\n" in before) == (b"\r\n" in after)
    assert after.count(b"\n") == after.count(b"\r\n") or b"\r\n" not in after
    parsed = tomllib.loads(after.decode())
    assert parsed["tool"].pop("conformance")["implementation"] == "conformance_adapter"
    old = tomllib.loads(before.decode())
    assert parsed == {**old, "tool": old.get("tool", {})}
    assert "extended pyproject.toml" in capsys.readouterr().out


# What is left


def test_a_second_run_changes_nothing_and_says_so(tmp_path, capsys):
    init(tmp_path)
    (tmp_path / "conformance_adapter.py").write_text("mine")
    before = content(tmp_path)
    capsys.readouterr()
    assert init(tmp_path, "--contracts", "rotary") == 0
    assert content(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert [line.split(":")[0] for line in lines] == [f"left {path}" for path in FILES]
    assert lines[1] == "left pyproject.toml: it has a table [tool.conformance]"
    assert "a fixture called implementation" in lines[3]


def test_a_link_that_leads_nowhere_is_left(tmp_path):
    (tmp_path / "conformance_adapter.py").symlink_to(tmp_path / "elsewhere.py")
    assert init(tmp_path) == 0
    assert not (tmp_path / "elsewhere.py").exists()
    assert (tmp_path / "tests/conftest.py").is_file()


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    before = content(tmp_path)
    assert init(tmp_path, "--dry-run", "--gpu") == 0
    assert content(tmp_path) == before
    said = capsys.readouterr().out
    assert init(tmp_path, "--gpu") == 0
    wrote = capsys.readouterr().out
    assert said.replace("would write", "wrote").replace("would extend", "extended") == wrote


# What is in the way


def test_an_unknown_contract_is_refused_with_those_that_there_are(tmp_path, capsys):
    line = refused(tmp_path, capsys, "--contracts", "attention,atention")
    assert "no contract 'atention'" in line
    assert all(name in line for name in CONTRACTS)
    assert "no contract ''" in refused(tmp_path, capsys, "--contracts", "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[project\n", "pyproject.toml: "),
        (b"# \xff\n", "pyproject.toml: 'utf-8'"),
        (b"tool = {x = 1}\n", "cannot take a table [tool.conformance]"),
    ],
    ids=["no TOML", "no UTF-8", "tool in one line"],
)
def test_a_pyproject_that_cannot_take_the_table_stops_everything(tmp_path, capsys, text, why):
    (tmp_path / "pyproject.toml").write_bytes(text)
    assert why in refused(tmp_path, capsys)


def test_a_file_in_the_place_of_a_folder_stops_everything(tmp_path, capsys):
    (tmp_path / "tests").write_text("")
    assert "tests is a file; expected a folder" in refused(tmp_path, capsys)


@pytest.mark.parametrize("path", ["conformance_adapter.py", "pyproject.toml", "tests/conftest.py"])
def test_a_folder_in_the_place_of_a_file_stops_everything(tmp_path, capsys, path):
    (tmp_path / path).mkdir(parents=True)
    assert f"{path} is a folder; expected a file" in refused(tmp_path, capsys)


def test_a_folder_that_is_none_stops_everything(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is a file; expected a folder" in refused(tmp_path / "file", capsys)
    assert "there is no folder" in refused(tmp_path / "missing", capsys)


def test_a_read_only_folder_stops_everything(tmp_path, capsys, monkeypatch):
    locked = tmp_path / ".github"
    locked.mkdir()
    access = os.access
    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != locked and access(p, mode))
    assert f"{locked} is read-only" in refused(tmp_path, capsys)


@pytest.mark.parametrize("folder", ["tests", ".github/workflows"])
def test_a_write_that_fails_takes_back_what_was_written(tmp_path, capsys, monkeypatch, folder):
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    mkdir = Path.mkdir

    def fails(self, *arguments, **options):
        if self == tmp_path / folder:
            raise OSError(28, "No space left on device")
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", fails)
    assert "No space left on device" in refused(tmp_path, capsys)


def test_a_table_that_cannot_be_written_takes_back_the_adapter(tmp_path, capsys, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[project]\n")

    def fails(path, write):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "write_atomically", fails)
    assert "pyproject.toml cannot be written: Read-only" in refused(tmp_path, capsys)
