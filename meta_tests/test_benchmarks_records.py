"""Rows, records, the command and the page of the kernel benchmarks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import ROOT

from conformance.benchmarks import fingerprint, measuring, published, recording, rows
from conformance.benchmarks import page as pages
from conformance.benchmarks.__main__ import main
from conformance.benchmarks.attention_workloads import prefill
from conformance.benchmarks.ceilings import Ceilings
from conformance.benchmarks.cells import number, percent, table
from conformance.benchmarks.clock import CpuClock
from conformance.benchmarks.experts_workloads import CompressedWorkload, ExpertsWorkload, Shape
from conformance.benchmarks.measuring import Bench, DeviceLost, paced
from conformance.benchmarks.workload import workloads
from conformance.implementations.grouped_experts import FoldedGroupedExperts
from conformance.implementations.reference import Reference
from conformance.implementations.torch_sdpa import TorchSDPA

TINY = prefill(64, 32, (4, 2), 16, True, "float32")
SHAPE = Shape("tiny", 4, 2, 16, 24)
DENSE = ExpertsWorkload(SHAPE, 20, "uniform", "float32")
COMPRESSED = CompressedWorkload(SHAPE, 4, 20, "uniform", "float32")
CEILINGS = Ceilings({"float32": 1e12}, 1e11, 1e-6)


# Rows


def test_quartiles():
    assert rows.quartiles([1, 2, 3, 4, 5]) == {"median": 3, "q1": 2, "q3": 4, "number": 5}
    assert rows.quartiles([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0, "number": 1}


def test_a_row_from_known_times():
    work = TINY.work()
    row = rows.timed_row(
        TINY,
        [[0.001, 0.001, 0.003], [0.002, 0.002, 0.002]],
        anchor=("other", [[0.001], [0.001]]),
        product=1e12,
        copy=1e9,
        counters={"launches": 3},
        exposed=2,
    )
    assert row["status"] == rows.TIMED
    assert row["seconds"] == {"median": 0.002, "q1": 0.00125, "q3": 0.002, "number": 6}
    assert row["tflops"] == pytest.approx(work.flops / 0.002 / 1e12, rel=1e-4)
    assert row["gbps"] == pytest.approx(work.bytes / 0.002 / 1e9, rel=1e-4)
    assert row["share"]["product"] == pytest.approx(row["tflops"], rel=1e-4)
    assert row["share"]["copy"] == pytest.approx(row["gbps"], rel=1e-4)
    assert row["anchor"] == {"impl": "other", "seconds": 0.001, "ratio": 1.5}
    assert json.loads(json.dumps(row)) == row


def test_what_is_common_to_a_round_drops_out_of_the_ratio():
    drifting = [[1.0 * k] for k in (1, 2, 4, 8)]
    assert rows.paired_ratio(drifting, [[0.5 * k] for k in (1, 2, 4, 8)]) == 2.0


def test_rows_without_a_ceiling_or_an_anchor():
    row = rows.timed_row(TINY, [[1.0]], anchor=None, product=None, copy=1e9, counters={})
    assert row["anchor"] is None
    assert row["share"]["product"] is None


def test_significant_digits():
    assert rows.significant({"a": [1.23456789, 3], "b": 1234567.0}) == {
        "a": [1.2346, 3],
        "b": 1234600.0,
    }


def test_a_reason_is_one_line():
    row = rows.untimed_row(TINY, rows.FAILED, "first\n  second " + "x" * 1000)
    assert row["reason"].startswith("first second xxx")
    assert len(row["reason"]) <= 300


# Measuring


def bench(**options):
    return Bench("cpu", CpuClock(), CEILINGS, rounds=3, launches=2, **options)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measuring, "LONGEST", 0.05)


def test_a_row_beside_its_anchor():
    row = bench().row(TINY, "reference", Reference())
    assert row["status"] == rows.TIMED
    assert row["anchor"]["impl"] == "torch-sdpa"
    assert row["anchor"]["ratio"] > 0
    assert row["counters"]["launches"] > 1
    assert row["seconds"]["number"] <= 6


def test_a_call_that_cannot_be_counted_is_timed_all_the_same(monkeypatch):
    def broken(running):
        raise NotImplementedError("no rule\nfor this")

    monkeypatch.setattr(measuring, "counters", broken)
    row = bench().row(TINY, "torch-sdpa", TorchSDPA())
    assert row["status"] == rows.TIMED
    assert row["counters"] == {"uncounted": "NotImplementedError: no rule for this"}


def test_the_anchor_itself_has_none():
    row = bench().row(TINY, "torch-sdpa", TorchSDPA())
    assert row["status"] == rows.TIMED
    assert row["anchor"] is None
    assert row["counters"]["backend"] == "flash"


def test_compressed_experts_are_beside_dense_ones():
    row = bench().row(COMPRESSED, "folded", FoldedGroupedExperts())
    assert row["anchor"]["impl"] == "torch-experts-grouped"
    assert row["name"] == COMPRESSED.name


@pytest.mark.parametrize("name", [each.name for each in workloads("cpu")])
def test_a_bundled_adapter_computes_each_workload(name):
    [workload] = workloads("cpu", only=[name])
    row = bench().row(workload, "reference", Reference())
    assert row["status"] == rows.TIMED, row


class Broken:
    def __init__(self, error):
        self.error = error

    def attention(self, q, k, v, *, causal=False):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotImplementedError("needs CUDA"), rows.DECLINED),
        (torch.OutOfMemoryError("tried to allocate 45 GiB"), rows.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), rows.OUT_OF_MEMORY),
        (RuntimeError("shapes do not fit\nand more"), rows.FAILED),
    ],
)
def test_what_raises_is_a_row(error, status):
    row = bench().row(TINY, "broken", Broken(error))
    assert row["status"] == status
    assert str(error).split("\n")[0] in row["reason"]


def test_what_is_wrong_is_a_row():
    class Wrong:
        def attention(self, q, k, v, *, causal=False):
            return Reference().attention(q, k, v)

    row = bench().row(TINY, "wrong", Wrong())
    assert row["status"] == rows.WRONG
    assert "off by" in row["reason"]


def test_what_turns_wrong_while_it_is_timed_is_a_row():
    class Tired:
        calls = 0

        def attention(self, q, k, v, *, causal=False):
            self.calls += 1
            return Reference().attention(q, k, v, causal=causal and self.calls < 5)

    assert bench().row(TINY, "tired", Tired())["status"] == rows.WRONG


def test_what_is_not_offered_is_no_row_and_options_decline():
    assert bench().row(DENSE, "torch-sdpa", TorchSDPA()) is None

    class NoCausal:
        def attention(self, q, k, v):
            return q

    row = bench().row(TINY, "none", NoCausal())
    assert (row["status"], row["reason"]) == (rows.DECLINED, "does not take 'causal'")


def test_when_the_time_is_up_nothing_more_begins():
    row = bench(deadline=0.0).row(TINY, "reference", Reference())
    assert row["status"] == rows.OVER_BUDGET


def test_an_anchor_that_does_not_run_is_none_or_the_next(monkeypatch):
    key = ("attention", "cpu")
    monkeypatch.setitem(measuring.ANCHORS, key, ("torch-sdpa-cudnn",))
    row = bench().row(TINY, "reference", Reference())
    assert row["status"] == rows.TIMED
    assert row["anchor"] is None
    monkeypatch.setitem(measuring.ANCHORS, key, ("torch-sdpa-cudnn", "torch-sdpa-math"))
    assert bench().row(TINY, "reference", Reference())["anchor"]["impl"] == "torch-sdpa-math"
    assert bench().row(TINY, "torch-sdpa-math", TorchSDPA())["anchor"] is None


def test_a_lost_device_is_said(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access\nand hints")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(DeviceLost, match=r"^CUDA error: an illegal memory access$"):
        measuring.release("cuda")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(1e-6, (10, 5)), (0.0009, (10, 5)), (0.0025, (10, 2)), (0.004, (10, 1)), (1.0, (3, 1))],
)
def test_slow_launches_have_fewer_rounds(seconds, expected):
    assert paced(seconds, 10, 5) == expected


def test_turns_of_the_sides_alternate(monkeypatch):
    seen = []
    own = bench()
    rounds = own.round

    def round(running, turn, launches):
        seen.append(type(getattr(running.method, "__self__", None)).__name__)
        return rounds(running, turn, launches)

    monkeypatch.setattr(own, "round", round)
    own.row(TINY, "reference", Reference())
    timed = seen[-6:]
    assert timed == ["Reference", "TorchSDPA", "TorchSDPA", "Reference", "Reference", "TorchSDPA"]


# Fingerprints


def test_fingerprint_of_a_cpu():
    told = fingerprint.fingerprint("cpu")
    assert told["id"] == fingerprint.identity(told["hard"])
    assert len(told["id"]) == 12
    assert {"name", "torch", "python", "threads", "method", "virtualisation"} <= set(told["hard"])
    assert {"load_average", "revision", "matmul_precision"} <= set(told["soft"])
    json.dumps(told)


def test_hard_facts_decide_the_identity():
    hard = fingerprint.fingerprint("cpu")["hard"]
    assert fingerprint.identity(dict(reversed(hard.items()))) == fingerprint.identity(hard)
    assert fingerprint.identity({**hard, "torch": "9"}) != fingerprint.identity(hard)


def test_fingerprint_of_a_pretended_gpu(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        total_memory=80 << 30,
        major=9,
        minor=0,
        uuid="secret",
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    facts = {"driver": "580.65.06", "mig": False, "power_limit": 700.0}
    monkeypatch.setattr(fingerprint, "nvml_facts", lambda device: dict(facts))
    told = fingerprint.fingerprint("cuda")
    assert told["hard"]["driver_major"] == "580"
    assert told["hard"]["capability"] == "9.0"
    assert told["soft"]["power_limit"] == 700.0
    assert "secret" not in json.dumps(told)
    facts.update(power_limit=300.0, driver="580.99")
    assert fingerprint.fingerprint("cuda")["id"] == told["id"]
    facts.update(driver="590.1")
    assert fingerprint.fingerprint("cuda")["id"] != told["id"]


def test_without_nvml_there_are_no_facts():
    assert isinstance(fingerprint.nvml_facts("cuda:0"), dict)


# Records


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        ("torch-sdpa", "kernels-abc-torch-sdpa.json"),
        ("package.module:Class", "kernels-abc-package.module-Class.json"),
        ("../some/path/mine.py:obj", "kernels-abc-mine.py-obj.json"),
        ("known-bug:attn-x", "kernels-abc-known-bug-attn-x.json"),
    ],
)
def test_names_of_records(implementation, name):
    assert recording.record_name("abc", implementation) == name


def made_record(
    implementation="torch-sdpa-cudnn", device="cpu", name="Some CPU", every=(), share=0.5
):
    """A record of made-up times: ``share`` of ceilings of 800 TFLOP/s and 3 TB/s."""
    record = recording.new_record(
        implementation,
        device,
        {"id": "0123456789ab", "hard": {"device": device, "name": name}, "soft": {}},
        {"rounds": 2},
    )
    backend = {"torch-sdpa-cudnn": "cudnn", "torch-sdpa-flash": "flash"}.get(implementation)
    for workload in every:
        work = workload.work()
        seconds = max(work.flops / 8e14, work.bytes / 3e12) / share
        record["rows"].append(
            rows.timed_row(
                workload,
                [[seconds], [seconds]],
                anchor=None,
                product=8e14,
                copy=3e12,
                counters={"backend": backend or "grouped_mm", "launches": 1, "peak_bytes": 1 << 20},
            )
        )
    ceilings = Ceilings({"bfloat16": 8e14}, 3e12, 2e-6).as_json()
    record["ceilings"] = {"begin": ceilings, "end": ceilings}
    record["complete"] = True
    record["machine"] = {**record["machine"], "date": "2026-01-02", "load_average": 0.5}
    return record


def test_a_record_is_saved_row_by_row(tmp_path):
    record, path, lines, seen = made_record(), tmp_path / "record.json", [], []
    offered = iter([{"made": 1}, None, {"made": 2}])

    def save(made):
        recording.write_record(made, path)
        seen.append((len(json.loads(path.read_text())["rows"]), made["complete"]))

    record.update(rows=[], complete=False)
    row_of = lambda workload: next(offered) and rows.untimed_row(workload, rows.DECLINED, "why")
    recording.fill(record, [TINY] * 3, row_of, save=save, progress=lines.append)
    assert seen == [(1, False), (2, False), (2, True)]
    assert len(lines) == 2
    assert "declined: why" in lines[0]
    assert not list(tmp_path.glob("*.part"))
    assert recording.read_record(path)["rows"] == record["rows"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "is no record of kernels"),
        ("{", "Expecting"),
        ('{"benchmark": "kernels", "format": 99}', "has format 99, expected 1"),
    ],
)
def test_a_bad_record_is_one_line(tmp_path, text, says, capfd):
    path = tmp_path / "kernels-a-b.json"
    path.write_text(text)
    with pytest.raises(recording.BadRecord, match=says):
        recording.read_record(path)
    arguments = ["--records", str(tmp_path), "--output", str(tmp_path / "page.md")]
    assert pages.main(arguments) == 4
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_drift_of_the_ceilings():
    record = made_record()
    record["ceilings"]["end"] = Ceilings({"bfloat16": 4e14}, 3.3e12, 2e-6).as_json()
    moved = recording.drift(record)
    assert moved == {"copy": pytest.approx(0.1), "product bfloat16": pytest.approx(-0.5)}
    assert recording.drift({**record, "ceilings": {}}) == {}


def test_a_run_ends_well_unless_something_is_wrong():
    record = made_record(every=[TINY])
    assert recording.ended_well(record)
    for status, well in ((rows.DECLINED, True), (rows.OUT_OF_MEMORY, True), (rows.WRONG, False)):
        assert recording.ended_well({"rows": [rows.untimed_row(TINY, status, "")]}) is well


# The command


def test_the_command_writes_a_record(tmp_path, capfd, monkeypatch):
    threads = torch.get_num_threads()
    only = "attention.decode.*"
    arguments = ["--impl", "torch-sdpa", "--device", "cpu", "--only", only, "--rounds", "2"]
    assert main([*arguments, "--record", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    [path] = tmp_path.glob("*.json")
    record = recording.read_record(path)
    assert path.name == recording.record_name(record["fingerprint"]["id"], "torch-sdpa")
    assert record["complete"]
    assert [row["status"] for row in record["rows"]] == [rows.TIMED]
    assert set(record["ceilings"]) == {"begin", "end"}
    assert record["options"]["rounds"] == 2
    assert "TFLOP/s" in capfd.readouterr().out


def test_the_command_lists_workloads(capfd):
    assert main(["--list", "--device", "cpu"]) == 0
    assert capfd.readouterr().out.split() == [each.name for each in workloads("cpu")]


WRONG = """
def attention(q, k, v, *, causal=False):
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1)[:, :, : q.shape[2]]
"""


def test_the_command_fails_for_wrong_output(tmp_path, capfd):
    file = tmp_path / "wrong_attention.py"
    file.write_text(WRONG)
    arguments = ["--impl", str(file), "--device", "cpu", "--only", "attention.decode.*"]
    assert main(arguments) == 1
    assert "wrong" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "nothing*"], "no workload for cpu is called 'nothing*'"),
        (["--impl", "torch-sdap"], "did you mean torch-sdpa"),
        (["--impl", "torch-load"], "offers none of attention, experts, shared_core_block"),
        (["--budget", "0"], "--budget is 0, expected seconds above 0"),
        (["--rounds", "0"], "--rounds is 0, expected 1 at least"),
        (["--record", "/no/such/folder"], "there is no folder /no/such/folder"),
    ],
)
def test_mistakes_are_one_line(arguments, says, capfd):
    assert main(["--device", "cpu", *arguments]) == 4
    said = capfd.readouterr().err
    assert says in said
    assert said.startswith("conformance: ")
    assert len(said.splitlines()) == 1


def test_no_cuda_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 4
    assert capfd.readouterr().err == (
        "conformance: --device cuda: torch finds no CUDA device here\n"
    )


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "conformance.benchmarks", "--only", "x*", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4
    assert done.stderr.startswith("conformance: no workload")


# The page


@pytest.fixture(scope="module")
def gpu_records():
    every = workloads("cuda")
    attention = [w for w in every if w.contract == "attention"]
    experts = [w for w in every if w.contract == "experts"]
    name = "NVIDIA H100 80GB HBM3"
    made = [
        made_record("torch-sdpa-cudnn", "cuda", name, attention, 0.7),
        made_record("torch-sdpa-flash", "cuda", name, attention, 0.3),
        made_record("here:TorchGroupedExperts", "cuda", name, experts, 0.2),
    ]
    made[0]["rows"].append(rows.untimed_row(attention[0], rows.OUT_OF_MEMORY, "no | memory"))
    return made


@pytest.fixture(scope="module")
def gpu_page(gpu_records):
    return pages.page(gpu_records)


def test_page_has_tables_plots_and_reasons(gpu_page):
    text, files = gpu_page
    assert text.startswith("# Kernel benchmarks\n")
    for heading in (
        "## NVIDIA H100 80GB HBM3",
        *("### Attention: prefill", "### Attention: decode", "### Experts", "### Not timed"),
        "### Against published figures",
    ):
        assert f"\n{heading}\n" in text
    assert "### Compressed experts" not in text
    linked = {
        line.split("(benchmarks/")[1].rstrip(")") for line in text.splitlines() if "![" in line
    }
    assert linked == set(files)
    assert {name.partition("-")[2] for name in files} == {
        *("roofline.svg", "prefill-d128-causal.svg", "experts-qwen3.svg", "experts-mixtral.svg")
    }
    assert "no / memory" in text


def test_every_line_of_a_table_has_as_many_cells(gpu_page):
    text, _ = gpu_page
    width = 0
    for line in text.splitlines():
        if line.startswith("|"):
            width = width or line.count("|")
            assert line.count("|") == width, line
        else:
            width = 0


def test_a_row_of_the_page(gpu_page):
    case = "| `prefill.b1.16384x16384.h16x16.d128.causal.bfloat16` | `torch-sdpa-cudnn` |"
    [line] = [each for each in gpu_page[0].splitlines() if each.startswith(case)]
    work = prefill(16384, 16384, (16, 16), 128, True, "bfloat16").work()
    milliseconds = 1e3 * work.flops / (0.7 * 8e14)
    assert line.split(" | ")[2] == number(milliseconds)
    assert "| 560 |" in line
    assert "| 70% |" in line


def test_published_figures_are_of_the_same_kernel(gpu_page):
    text, _ = gpu_page
    lines = {tuple(c.strip() for c in x.split("|")[1:3]): x for x in text.splitlines() if "|" in x}
    case = "`prefill.b*.4096x4096.h16x16.d128.full.bfloat16`"
    assert "560 (the same kernel: `torch-sdpa-cudnn`) | 92% |" in lines[case, "cuDNN"]
    assert (
        "240 (the same kernel: `torch-sdpa-flash`) | 65% **low**" in lines[case, "FlashAttention-2"]
    )
    assert "560 (the fastest: `torch-sdpa-cudnn`) | 88% |" in lines[case, "FlashAttention-3"]
    backward = "`train.b*.4096x4096.h16x16.d128.full.bfloat16 (backward)`"
    assert "560 (the same kernel: `torch-sdpa-cudnn`) | 112% |" in lines[backward, "cuDNN"]
    assert "70% **low**" in text, "decoding below the bar is marked"


@pytest.mark.parametrize("figure", published.FIGURES, ids=lambda f: f"{f.workload}-{f.kernel}")
def test_a_published_figure_is_of_a_workload_and_of_that_gpu(figure):
    from fnmatch import fnmatchcase

    assert any(fnmatchcase(each.name, figure.workload) for each in workloads("cuda"))
    assert 100 < figure.tflops < 989
    assert figure.source


def test_published_figures_are_for_h100_and_h200_alone():
    assert published.is_published_model("NVIDIA H200")
    assert published.is_published_model("NVIDIA H100 80GB HBM3")
    assert not published.is_published_model("NVIDIA A100-SXM4-80GB")
    record = made_record("torch-sdpa-cudnn", "cuda", "NVIDIA A100", workloads("cuda")[:1])
    assert "Against published" not in pages.page([record])[0]


def test_records_of_one_machine_stand_together_gpus_first(gpu_records):
    cpu = made_record("reference", every=workloads("cpu"))
    cpu["fingerprint"] = {**cpu["fingerprint"], "id": "ffffffffffff"}
    groups = pages.by_machine([cpu, *gpu_records])
    assert [len(group) for group in groups.values()] == [3, 1]
    assert pages.by_machine([made_record()]) == {}, "a record without times has no section"


def test_a_cut_record_says_so():
    cut = {**made_record(every=[TINY]), "complete": False}
    assert "cut short" in pages.page([cut])[0]


def test_a_busy_machine_is_told():
    record = made_record(every=[TINY])
    assert pages.BUSY_NOTE not in pages.page([record])[0]
    record["ceilings"]["end"] = {**record["ceilings"]["end"], "copy": 1e12}
    assert pages.BUSY_NOTE in pages.page([record])[0]


def test_page_and_plots_are_the_same_twice(gpu_records, gpu_page):
    assert pages.page(gpu_records) == gpu_page


def test_writing_the_page_removes_plots_of_before(tmp_path, gpu_records, capfd):
    for record in gpu_records:
        path = tmp_path / recording.record_name("0123456789ab", record["implementation"])
        recording.write_record(record, path)
    output = tmp_path / "docs.md"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "old.svg").write_text("")
    assert pages.main(["--records", str(tmp_path), "--output", str(output)]) == 0
    text, files = pages.page(recording.read_records(tmp_path), "docs")
    assert output.read_text() == text
    assert {p.name for p in (tmp_path / "docs").iterdir()} == set(files)
    assert "3 records" in capfd.readouterr().out


def test_no_records_is_one_line(tmp_path, capfd):
    assert pages.main(["--records", str(tmp_path), "--output", str(tmp_path / "x.md")]) == 4
    assert "no record of kernels with times" in capfd.readouterr().err


def test_the_committed_page_is_that_of_the_committed_records():
    records = recording.read_records()
    assert records, "no record is committed"
    text, files = pages.page(records)
    again = "write it anew: python -m conformance.benchmarks.page"
    assert (ROOT / "docs" / "benchmarks.md").read_text() == text, again
    assert {p.name for p in (ROOT / "docs" / "benchmarks").glob("*.svg")} == set(files), again


def test_numbers():
    assert [number(x) for x in (0, 0.01234, 1.234, 12.34, 123.4, 1234.5, 999.9)] == [
        *("0", "0.0123", "1.23", "12.3", "123", "1,234", "1,000")
    ]
    assert [percent(x) for x in (None, 0.051, 0.5, 1.2)] == ["–", "5.1%", "50%", "120%"]
    assert table(("a", "b"), [("1", "2")]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


# Under pytest


def under_pytest(folder, *arguments):
    """``pytest`` on the benchmarks as a user calls it."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    # In a worker of pytest-xdist, pytest-benchmark would write nothing.
    for name in ("CONFORMANCE_IMPL", "PYTEST_XDIST_WORKER"):
        env.pop(name, None)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_pytest_benchmark_stores_rows_by_machine(tmp_path):
    file = Path("conformance/benchmarks/bench_attention.py")
    done = under_pytest(
        ROOT,
        *(str(file), "--impl", "torch-sdpa", "-k", "decode", "--benchmark-json"),
        str(tmp_path / "out.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads((tmp_path / "out.json").read_text())
    told = stored["machine_info"]["conformance"]
    assert told["id"] == fingerprint.identity(told["hard"])
    [one] = stored["benchmarks"]
    assert one["extra_info"]["status"] == rows.TIMED
    assert one["extra_info"]["counters"]["backend"] == "flash"
    assert one["stats"]["rounds"] == 20


def test_pytest_skips_what_is_not_offered_and_refuses_what_is_unknown():
    file = "conformance/benchmarks/bench_experts.py"
    done = under_pytest(ROOT, file, "--impl", "torch-sdpa", "-k", "mixtral")
    assert done.returncode == 0, done.stdout
    assert "2 skipped" in done.stdout
    done = under_pytest(ROOT, file, "--impl", "torch-sdap", "-k", "mixtral")
    assert done.returncode == 4
    assert "did you mean torch-sdpa" in done.stdout + done.stderr


def test_wrong_output_fails_under_pytest(tmp_path):
    (tmp_path / "wrong_attention.py").write_text(WRONG)
    file = "conformance/benchmarks/bench_attention.py"
    done = under_pytest(ROOT, file, "--impl", str(tmp_path / "wrong_attention.py"), "-k", "decode")
    assert done.returncode == 1
    assert "WrongOutput" in done.stdout


def test_times_of_another_machine_are_not_compared():
    from conformance.benchmarks.under_pytest import different_machine

    hard = {"name": "a", "torch": "2"}
    here = {"conformance": {"hard": hard}}
    assert different_machine(here, here) is None
    why = different_machine(here, {"conformance": {"hard": {**hard, "torch": "1"}}})
    assert why == "the stored times are of another machine: torch '1' and here '2'"
    assert different_machine(here, {}) is not None


def test_marks_of_a_timer_are_differences_of_events():
    from conformance.benchmarks.clock import EventTimer

    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def elapsed_time(self, end):
            calls.append("elapsed")
            return 2.5

    cuda = SimpleNamespace(Event=Event, synchronize=lambda: calls.append("synchronize"))
    timer = EventTimer(cuda)
    start = timer()
    assert timer() - start == 0.0025
    assert calls == ["record", "record", "synchronize", "elapsed"]
    assert hash(timer)


def test_workloads_can_be_made_with_another_dtype():
    assert replace(TINY, dtype="float16").name.endswith("float16")


def test_reading_records_and_the_page_need_no_torch_and_no_matplotlib():
    modules = "conformance.benchmarks.page, conformance.benchmarks.__main__"
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"torch", "matplotlib", "transformers", "scipy"}
