"""The README's commands and examples run as written, from the built wheel, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


ADAPTERS = (ROOT / "docs/adapters.md").read_text()


def code_blocks(language: str, page: str = README) -> list[str]:
    """The fenced blocks of one language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def block_that_starts(language: str, start: str, page: str = README) -> str:
    """The one block that starts with ``start``."""
    (block,) = [block for block in code_blocks(language, page) if block.startswith(start)]
    return block


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder with the unpacked wheel, as ``pip install --target`` leaves it."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    built = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


SHORT = "--conformance-diagnosis 0"
"""A failure that is not compared with documented bugs, which takes up to ten seconds."""

FEWER_CASES = "--hypothesis-profile smoke"
"""Two cases of each requirement: what passes or fails with all twelve is for other tests."""


def run(command: str, folder: Path, installed: Path) -> subprocess.CompletedProcess:
    """Run a shell command of the README in ``folder``, with the wheel first on the path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CONFORMANCE_")}
    environment["PYTHONPATH"] = str(installed)
    environment.setdefault("PYTHONPYCACHEPREFIX", str(installed.parent / "compiled"))
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def adapter_folder(tmp_path):
    """An empty folder with the README's adapter in it."""
    (tmp_path / "my_adapter.py").write_text(block_that_starts("python", "# my_adapter.py"))
    return tmp_path


def test_the_adapter_is_shown_whole_in_twenty_lines():
    assert len(block_that_starts("python", "# my_adapter.py").strip().splitlines()) <= 20


def test_the_wheel_brings_its_fixtures_and_no_other_top_level_package(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"conformance", "reference_impl"}
    assert (installed / "conformance/fixtures/kill_matrix.json").is_file()
    assert (installed / "conformance/fixtures/known_bugs/attention.yaml").is_file()


def test_adapter_commands_run_as_written(adapter_folder, installed):
    """``--smoke`` and the whole run of the README's adapter end without a failure, from the wheel."""
    smoke, whole = [
        line.split("#")[0].strip()
        for line in block_that_starts("sh", "pytest --pyargs").strip().splitlines()
    ]
    result = run(smoke, adapter_folder, installed)
    assert result.returncode == 0, result.stdout
    assert "verdict partial: smoke" in result.stdout
    result = run(whole, adapter_folder, installed)
    assert result.returncode == 0, result.stdout
    assert "verdict partial" in result.stdout
    imported = run(
        "python -c 'import conformance; print(conformance.__file__)'", adapter_folder, installed
    )
    assert Path(imported.stdout.strip()).is_relative_to(installed), "not the wheel was tested"


def test_own_repository_runs_the_requirements(adapter_folder, installed):
    """An import and a fixture are all that a user's repository needs; a broken adapter is red there."""
    tests = adapter_folder / "tests"
    tests.mkdir()
    (tests / "test_conformance.py").write_text(
        block_that_starts("python", "# tests/test_conformance.py")
    )
    (tests / "conftest.py").write_text(block_that_starts("python", "# tests/conftest.py"))
    command = "python -m pytest tests -q -k 'causal or gqa'"
    result = run(command, adapter_folder, installed)
    assert result.returncode == 0, result.stdout
    assert "verdict partial" in result.stdout

    adapter = adapter_folder / "my_adapter.py"
    adapter.write_text(adapter.read_text().replace("k.shape[2] - q.shape[2]", "0"))
    result = run(command, adapter_folder, installed)
    assert result.returncode == 1, result.stdout
    assert "attention.causal.aligned-to-last-key" in result.stdout


def test_a_layer_on_several_ranks_runs_as_written(tmp_path, installed):
    """The layer of docs/adapters.md passes on real ranks, and fails without its sum."""
    layers = tmp_path / "my_layers.py"
    layers.write_text(block_that_starts("python", "# my_layers.py", ADAPTERS))
    command = block_that_starts("sh", "pytest --pyargs conformance --impl my_layers", ADAPTERS)
    result = run(f"{command.strip()} {FEWER_CASES}", tmp_path, installed)
    assert result.returncode == 0, result.stdout
    assert "5 passed, 2 declined" in result.stdout

    layers.write_text(layers.read_text().replace("Sum.apply(y)", "y"))
    result = run(f"{command.strip()} -k parallel_linear.row.sum {SHORT}", tmp_path, installed)
    assert result.returncode == 1, result.stdout
    assert "parallel_linear.row.sum (core): wrong values" in result.stdout


def test_a_sharded_model_runs_as_written(tmp_path, installed):
    """The model of docs/adapters.md passes what it offers, and fails with a sum for the mean."""
    sharding = tmp_path / "my_sharding.py"
    sharding.write_text(block_that_starts("python", "# my_sharding.py", ADAPTERS))
    command = block_that_starts("sh", "pytest --pyargs conformance --impl my_sharding", ADAPTERS)
    # Two cases of each requirement: with all twelve on real ranks it takes minutes.
    result = run(f"{command.strip()} -n 2 --smoke", tmp_path, installed)
    assert result.returncode == 0, result.stdout
    assert " failed" not in result.stdout
    assert "verdict partial: smoke" in result.stdout

    mean = "p.grad /= dist.get_world_size()"
    sharding.write_text(sharding.read_text().replace(mean, "pass"))
    rule = "flat_shards.gradient.mean"
    result = run(f"{command.strip()}.gradient.mean {SHORT}", tmp_path, installed)
    assert result.returncode == 1, result.stdout
    assert rule in result.stdout


def test_experts_run_as_written(tmp_path, installed):
    """The experts of docs/adapters.md pass what they offer, and fail with one slot a token."""
    experts = tmp_path / "my_experts.py"
    experts.write_text(block_that_starts("python", "# my_experts.py", ADAPTERS))
    command = block_that_starts("sh", "pytest --pyargs conformance --impl my_experts", ADAPTERS)
    result = run(command, tmp_path, installed)
    assert result.returncode == 0, result.stdout
    assert "61 passed" in result.stdout

    overwritten = experts.read_text().replace("index_add(", "index_copy(")
    experts.write_text(overwritten)
    result = run(f"{command.strip()}.slots {SHORT}", tmp_path, installed)
    assert result.returncode == 1, result.stdout
    assert "experts.slots.repeated (core): wrong" in result.stdout


def test_distillation_loss_runs_as_written(tmp_path, installed):
    """The loss of docs/adapters.md passes what it offers, and fails without the square of T."""
    loss = tmp_path / "my_distillation.py"
    loss.write_text(block_that_starts("python", "# my_distillation.py", ADAPTERS))
    command = block_that_starts("sh", "pytest --pyargs conformance --impl my_dis", ADAPTERS)
    result = run(f"{command.strip()} {FEWER_CASES}", tmp_path, installed)
    assert result.returncode == 0, result.stdout
    assert "40 passed" in result.stdout

    loss.write_text(loss.read_text().replace("temperature**2 * ", ""))
    result = run(f"{command.strip()}.temperature {SHORT}", tmp_path, installed)
    assert result.returncode == 1, result.stdout
    assert "distillation_loss.temperature.values (core): wrong values" in result.stdout


def test_listing_commands_run_as_written(tmp_path, installed):
    commands = block_that_starts("sh", "python -m conformance impls").strip().splitlines()
    assert len(commands) == 3
    for command in commands:
        result = run(command.split("#")[0], tmp_path, installed)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()


def test_planted_bug_fails_and_variant_passes_as_written(installed, tmp_path):
    """The gate is red for a planted bug and green for a correct variant, from the wheel."""
    bug, variant = (
        block_that_starts("sh", "pytest conformance --impl known-bug").strip().splitlines()
    )
    for command, code in ((bug, 1), (variant, 0)):
        # A selection, because making the cases of a planted bug smaller takes a minute over all.
        command = command.replace("pytest conformance", "pytest --pyargs conformance -k gqa")
        assert run(command, tmp_path, installed).returncode == code, command


def test_tox_commands_name_environments_that_exist():
    environments = set(re.findall(r"^\[testenv:(\w+)\]", (ROOT / "tox.ini").read_text(), re.M))
    named = set(re.findall(r"tox -e (\w+)", README))
    assert named == {"conformance", "tests"}
    assert named <= environments
    assert "tox -e tests" in (ROOT / ".ci/run").read_text()


def test_default_profile_and_exit_codes_are_those_of_the_code():
    from conformance.harness import profiles

    assert set(re.findall(r"\(`(gate)`, `(explore)`, `(nightly)`\)", README)[0]) <= set(
        profiles.PROFILES
    )
    for name in re.findall(r"--impl ([a-z-]+)\b", README):
        from conformance.implementations import BUNDLED

        assert name in BUNDLED or name in ("known-bug", "variant", "my", "NAME")


def test_the_numbers_of_requirements_are_those_of_the_suite():
    from conformance.harness.requirement import all_requirements

    # Those that only a GPU can be held to are not part of a plain run.
    requirements = [r for r in all_requirements().values() if not r.gpu]
    assert f"{len(requirements)} requirements in the suite" in README
    assert f"of {sum(r.level == 'core' for r in requirements)} core requirements" in README
