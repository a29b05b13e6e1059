"""The benchmark of flat shards on a few elements: what it records, that its bars bite."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from command_line import ROOT, environment

from conformance.benchmarks import flat_shards as benchmark
from reference_impl import flat_shards

ELEMENTS = 18_000_001
TINY = ("--elements", str(ELEMENTS), "--billions", "3000000001", "--rounds", "2")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "record.json"
    command = [sys.executable, "-m", "conformance.benchmarks.flat_shards", *TINY]
    ended = subprocess.run(
        [*command, "--output", str(output)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode in (0, 1), ended.stderr
    return ended, json.loads(output.read_text())


def test_record_tells_machine_options_and_bars(done):
    _, record = done
    assert record["benchmark"] == "flat_shards"
    assert record["bars"] == benchmark.BARS == {"restore": 1.3, "reshard": 2.0}
    assert {"date", "python", "torch", "platform", "cpu"} <= set(record["machine"])
    assert record["options"]["elements"] == ELEMENTS
    assert "phase" not in record["options"]


def test_parts_are_right_and_have_times_and_memory(done):
    ended, record = done
    assert [(part["part"], part["ranks"]) for part in record["parts"]] == [
        ("restore", [2]),
        ("restore", [3]),
        ("reshard", [2, 3]),
        ("reshard", [3, 2]),
    ]
    for part in record["parts"]:
        assert part["right"] is True
        assert len(part["rounds"]) == 2
        assert part["seconds"] > 0
        assert part["copy_seconds"] > 0
        assert part["within_bar"] == (part["ratio"] <= benchmark.BARS[part["part"]])
        assert 50 * 2**20 < part["memory"]["baseline"] < part["memory"]["peak"]
        assert part["memory"]["peak"] >= part["tensors_mib"] * 2**20
    within = all(part["within_bar"] for part in record["parts"])
    assert ended.returncode == (0 if within else 1)
    assert ended.stdout.count("the bar of") == 4


def test_layout_of_billions_is_arithmetic(done):
    laid_out = done[1]["layout"]
    assert laid_out["right"] is True
    assert laid_out["elements"] == 3_000_000_001
    assert laid_out["parameters"] > 5000
    assert set(laid_out["milliseconds"]) == {"layout", "ranges_of_a_rank", "overlaps_of_a_rank"}
    assert laid_out["memory"]["peak"] < laid_out["memory"]["baseline"] + 100 * 2**20


@pytest.mark.parametrize("elements", [ELEMENTS, benchmark.ELEMENTS, benchmark.BILLIONS])
def test_shapes_have_as_many_elements_as_asked_for(elements):
    shapes = benchmark.shapes_of(elements)
    assert sum(map(math.prod, shapes.values())) == elements
    assert len(shapes) > 3


def test_bars_are_met_up_to_the_ratio():
    rounds = [{"seconds": seconds, "copy": 1.0} for seconds in (1.9, 9.0, 2.0)]
    assert benchmark.summary("reshard", (2, 3), {"rounds": rounds})["within_bar"]
    assert not benchmark.summary("restore", (2,), {"rounds": rounds})["within_bar"]
    assert benchmark.summary("reshard", (2, 3), {"rounds": rounds})["ratio"] == 2.0


def test_a_wrong_element_is_seen(monkeypatch):
    options = {"elements": 100_000, "rounds": 1, "part": [2, 3]}
    assert benchmark.reshard(options)["right"]
    right = flat_shards.reshard

    def wrong(*arguments, **more):
        made = right(*arguments, **more)
        made[1, 0][7] += 1
        return made

    monkeypatch.setattr(flat_shards, "reshard", wrong)
    assert not benchmark.reshard(options)["right"]


def test_a_buffer_that_is_not_restored_is_seen(monkeypatch):
    from reference_impl.flat_shards.unit import FlatUnit

    options = {"elements": 100_000, "rounds": 1, "part": [2]}
    assert benchmark.restore(options)["right"]
    monkeypatch.setattr(FlatUnit, "restore_parameters", lambda self: None)
    assert not benchmark.restore(options)["right"]


def test_record_on_file_is_of_full_size_and_within_the_bars():
    file = ROOT / "conformance" / "benchmarks" / "records" / "flat_shards.json"
    record = json.loads(file.read_text())
    assert record["options"]["elements"] == benchmark.ELEMENTS == 200_000_000
    assert record["layout"]["elements"] == benchmark.BILLIONS == 2_804_643_712
    assert len(record["parts"]) == 4
    for part in record["parts"]:
        assert part["right"], part["part"]
        assert part["within_bar"], part["part"]
