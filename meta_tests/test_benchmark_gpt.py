"""The benchmark of checkpoint loading on a tiny checkpoint: what it records, that its bar bites."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from command_line import ROOT

from conformance.benchmarks import gpt_checkpoint as benchmark
from reference_impl.gpt.config import parameter_count

TINY = ("--layers", "6", "--width", "128", "--vocabulary", "300", "--tokens", "8", "--rounds", "1")
NAME = "conformance.benchmarks.gpt_checkpoint"


def run(folder, *options):
    """The command as a user runs it."""
    command = [sys.executable, "-m", NAME, *TINY, "--folder", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    ended = run(folder, "--output", str(folder / "record.json"))
    assert ended.returncode in (0, 1), ended.stderr
    return ended, folder, json.loads((folder / "record.json").read_text())


def test_record_names_machine_options_and_bar(done):
    _, _, record = done
    assert record["benchmark"] == "gpt_checkpoint"
    assert record["bar"] == {"peak_over_file": 2.5}
    machine = record["machine"]
    assert {"date", "python", "torch", "platform", "cpu", "load_average"} <= set(machine)
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > 2**30
    options = record["options"]
    assert (options["layers"], options["width"], options["rounds"]) == (6, 128, 1)
    assert "folder" not in options


@pytest.mark.parametrize("index", [0, 1], ids=["mixed", "float32"])
def test_record_of_a_variant(done, index):
    variant = done[2]["variants"][index]
    assert variant["dtype"] == ("mixed", "float32")[index]
    elements = 4 * 384 * 128 + 6 * 12 * 128**2 + 384 * 128 + 32
    assert variant["file"]["elements"] == elements
    stored = elements * 4 - (0 if index else 4 * 384 * 128 * 2)
    assert stored < variant["file"]["bytes"] < stored + 50_000
    assert variant["finite"] is True
    (turn,) = variant["rounds"]
    assert turn["implementation"]["logits"] == [1, 8, 384]
    assert turn["torch.load"]["tensors"] == turn["load_state_dict"]["tensors"] == 4 + 6 * 4 + 2
    assert set(variant["load_time_ratio"]) == {"torch.load", "load_state_dict"}
    assert set(variant["seconds"]["load"]) == set(benchmark.CONTESTANTS)
    assert set(variant["load_added_over_file"]) == set(benchmark.CONTESTANTS)
    assert min(variant["seconds"]["load"].values()) > 0


@pytest.mark.parametrize("index", [0, 1], ids=["mixed", "float32"])
def test_memory_is_that_of_the_process_that_loads(done, index):
    variant = done[2]["variants"][index]
    memory = variant["rounds"][0]["implementation"]["memory"]
    assert 50 * 2**20 < memory["baseline"] <= memory["peak_of_load"] <= memory["peak"]
    assert memory["after_load"] <= memory["peak_of_load"]
    # The kernel counts ru_maxrss in batches of pages a processor; both are the same peak.
    assert memory["ru_maxrss"] == pytest.approx(memory["peak"], rel=0.05)
    assert variant["peak_bytes"] == max(memory["peak"], memory["ru_maxrss"])
    assert variant["peak_over_file"] == pytest.approx(
        variant["peak_bytes"] / variant["file"]["bytes"], abs=1e-3
    )


def test_bar_bites(done):
    """An interpreter with torch is many times a tiny file."""
    ended, _, record = done
    assert ended.returncode == 1
    assert not any(variant["within_bar"] for variant in record["variants"])
    assert ended.stdout.count("OVER the bar of 2.5") == 2


def test_bar_is_met_below_two_and_a_half_files():
    turn = {
        "implementation": {
            "seconds": {"import": 1.0, "load": 3.0, "answer": 1.0},
            "memory": {"baseline": 200, "peak_of_load": 1300, "peak": 2400, "ru_maxrss": 2450},
            "finite": True,
        },
        "torch.load": {"seconds": {"load": 1.0}, "memory": {"baseline": 0, "peak_of_load": 1000}},
        "load_state_dict": {
            "seconds": {"load": 2.0},
            "memory": {"baseline": 0, "peak_of_load": 2000},
        },
    }
    found = benchmark.summary({"bytes": 1000}, [turn])
    assert found["within_bar"]
    assert found["peak_over_file"] == 2.45
    assert found["load_added_over_file"] == {
        "implementation": 1.1,
        "torch.load": 1.0,
        "load_state_dict": 2.0,
    }
    assert found["load_time_ratio"] == {"torch.load": 3.0, "load_state_dict": 1.5}
    turn["implementation"]["memory"]["ru_maxrss"] = 2500
    assert not benchmark.summary({"bytes": 1000}, [turn])["within_bar"]


def test_progress_is_on_stderr_and_the_file_is_gone(done):
    ended, folder, _ = done
    assert "30/30" in ended.stderr
    assert "/30" not in ended.stdout
    assert [path.name for path in folder.iterdir()] == ["record.json"]


def test_any_implementation_of_the_contract_can_run(tmp_path):
    output = tmp_path / "record.json"
    implementation = "conformance.implementations.reference:Reference"
    options = ("--impl", implementation, "--dtype", "float32", "--output", str(output))
    ended = run(tmp_path, *options)
    assert "30/30" not in ended.stderr, "the progress bar is our own loader's"
    (variant,) = json.loads(output.read_text())["variants"]
    assert variant["finite"]


def test_checkpoint_is_what_the_training_script_leaves(tmp_path):
    options = vars(benchmark.parse([*TINY])) | {"dtype": "mixed", "path": str(tmp_path / "it.pt")}
    benchmark.write(options)
    content = torch.load(options["path"], weights_only=True)
    assert set(content) == {"step", "code", "model", "optimizers", "val_loss"}
    assert all(key.startswith("_orig_mod.") for key in content["model"])
    in_bfloat16 = {k for k, tensor in content["model"].items() if tensor.dtype == torch.bfloat16}
    tables = [f"value_embeds.{i}" for i in range(3)]
    assert in_bfloat16 == {f"_orig_mod.{name}.weight" for name in ("embed", *tables)}


def test_full_size_is_the_published_one():
    full = vars(benchmark.parse([]))
    assert parameter_count(benchmark.small_config(full)) == 275_742_784


def test_records_on_file_are_of_full_size_and_within_the_bar():
    files = sorted((ROOT / "conformance" / "benchmarks" / "records").glob("gpt_checkpoint*.json"))
    assert files
    for file in files:
        record = json.loads(file.read_text())
        for variant in record["variants"]:
            assert variant["file"]["elements"] == 275_742_784, file.name
            assert variant["within_bar"], file.name
