"""The gate's table in pyproject.toml: read strictly, and refused in one line."""

import re

import pytest
from command_line import ROOT

from conformance.gate.settings import GateSettings, Override, read_gate_settings
from conformance.gate.sides import GateError
from conformance.harness.settings import read_settings

PAGE = (ROOT / "docs" / "regression_gate.md").read_text()
GOOD = re.search(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)[1]


def written(folder, text):
    (folder / "pyproject.toml").write_text(text)
    return folder


def test_no_file_and_no_table_are_no_settings(tmp_path):
    assert read_gate_settings(tmp_path) == GateSettings()
    assert read_gate_settings(written(tmp_path, "[tool.conformance]")) == GateSettings()


def test_everything_that_can_be_set_is_read_and_left_alone_by_the_suite(tmp_path):
    found = read_gate_settings(written(tmp_path, GOOD))
    assert found == GateSettings(
        only=("attention.*",),
        accept=("peak_bytes",),
        detect=0.05,
        margin=0.01,
        overrides=(Override("attention.decode.*", detect=0.1),),
    )
    assert read_settings(tmp_path).implementation is None


def test_the_last_override_that_has_it_counts(tmp_path):
    more = """
[[tool.conformance.benchmarks.overrides]]
benchmark = "attention.*"
margin = 2.5
"""
    found = read_gate_settings(written(tmp_path, GOOD + more))
    assert found.share("detect", "attention.prefill.x") == 0.05
    assert found.share("detect", "attention.decode.x") == 0.1
    assert found.share("margin", "attention.decode.x") == 0.025
    assert found.share("margin", "experts.x") == 0.01
    assert read_gate_settings(tmp_path / "none").share("margin", "experts.x") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmarks = 3", "tool.conformance.benchmarks must be a table"),
        ("benchmarks.detekt = 3", "unknown key 'detekt' (did you mean detect?)"),
        ("benchmarks.detect = '3'", "benchmarks.detect is '3', expected a number of percent"),
        ("benchmarks.detect = true", "benchmarks.detect is True, expected a number of percent"),
        ("benchmarks.margin = 0", "benchmarks.margin is 0, expected a number of percent above 0"),
        ("benchmarks.margin = nan", "benchmarks.margin is nan, expected a number of percent"),
        ("benchmarks.only = 'a'", "benchmarks.only must be a list of strings"),
        ("benchmarks.overrides = {}", "benchmarks.overrides must be a list of tables"),
        ("benchmarks.overrides = [3]", "benchmarks.overrides[0] must be a table"),
        ("benchmarks.overrides = [{}]", "benchmarks.overrides[0].benchmark must be a string"),
        (
            "benchmarks.overrides = [{benchmark = 'a', delta = 1}]",
            "benchmarks.overrides[0]: unknown key 'delta'",
        ),
        ("benchmarks.detect = ", "pyproject.toml: Invalid value"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, message):
    with pytest.raises(GateError) as raised:
        read_gate_settings(written(tmp_path, f"[tool.conformance]\n{text}\n"))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
