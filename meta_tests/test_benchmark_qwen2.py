"""The benchmark of loading a Qwen2 directory on two ranks: bars at true size, and that they bite."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from command_line import ROOT, environment

from conformance.benchmarks.qwen2_loading import BARS

NAME = "conformance.benchmarks.qwen2_loading"
TINY = ("--layers", "2", "--vocabulary", "3000")

READS_ALL = """
from pathlib import Path
from reference_impl.qwen2.engine import CausalLM

class ReadsAll(CausalLM):
    def causal_lm(self, directory, **options):
        self.whole = Path(directory, "model.safetensors").read_bytes()
        return super().causal_lm(directory, **options)
"""


def run(folder, *options):
    """The command as a user runs it, and its record."""
    output = folder / "record.json"
    command = [sys.executable, "-m", NAME, "--folder", str(folder), "--output", str(output)]
    ended = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert output.exists(), ended.stderr
    return ended, json.loads(output.read_text())


def test_record_tells_machine_shapes_and_every_rank(tmp_path):
    ended, record = run(tmp_path, *TINY)
    assert record["benchmark"] == "qwen2_loading"
    assert record["bars"] == BARS == {"bytes_read": 0.55, "memory_added": 0.60}
    assert {"date", "python", "torch", "platform", "cpu"} <= set(record["machine"])
    assert record["options"]["shape"]["vocab_size"] == 3000
    assert "path" not in record["options"]
    elements = 3000 * 896 + 2 * (896 * (2 * 896 + 2 * 128) + 3 * 896 * 4864 + 1152 + 2 * 896) + 896
    assert record["file"]["elements"] == elements
    assert 2 * elements < record["file"]["bytes"] < 2 * elements + 20_000
    read = record["one_rank"]["bytes_read"]
    assert record["file"]["bytes"] <= read < 1.1 * record["file"]["bytes"]
    assert len(record["ranks"]) == 2
    assert record["ranks"][0]["logits"] == [1, 8, 3000]
    assert record["finite"] is True
    assert "rank 1 of 2" in ended.stdout
    assert ended.returncode == (0 if record["within_bars"] else 1)


def test_a_rank_that_reads_everything_is_over_the_bar(tmp_path):
    adapter = tmp_path / "reads_all.py"
    adapter.write_text(READS_ALL)
    ended, record = run(tmp_path, *TINY, "--impl", f"{adapter}:ReadsAll")
    assert record["ratios"]["bytes_read"] > 0.7
    assert record["within_bars"] is False
    assert ended.returncode == 1


@pytest.mark.slow
def test_two_ranks_of_true_size_read_and_hold_about_half_each(tmp_path):
    """The shapes of Qwen2.5-0.5B in bfloat16: 494,032,768 elements, 942 MiB."""
    ended, record = run(tmp_path)
    assert record["file"]["elements"] == 494_032_768
    assert record["ratios"]["bytes_read"] <= BARS["bytes_read"], ended.stdout
    assert record["ratios"]["memory_added"] < BARS["memory_added"], ended.stdout
    assert record["finite"] is True
    assert ended.returncode == 0, ended.stdout
