"""The reference's watcher beside what is known without it: a trainer's folders, a log, a terminal."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from command_line import ROOT
from safetensors.torch import save_file

from reference_impl.shared_core.complete import CheckpointFolder
from reference_impl.shared_core.results import ResultsFile
from reference_impl.shared_core.watcher import CheckpointWatcher, shown, watch
from reference_impl.stored import CheckpointError


def checkpoint(directory, step, value):
    folder = directory / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    save_file({"w": torch.full((3, 2), float(value))}, folder / "model.safetensors")
    return folder


def value_of(path):
    from safetensors.torch import load_file

    return {"value": float(load_file(f"{path}/model.safetensors")["w"][0, 0])}


def folder_of(path):
    return CheckpointFolder(path, int(path.name.split("-")[1]))


# What transformers writes


def small_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=2, **sizes))


@pytest.mark.parametrize("shards", [False, True])
def test_what_transformers_saves_is_whole(tmp_path, shards):
    folder = tmp_path / "checkpoint-3"
    small_model().save_pretrained(folder, max_shard_size="5KB" if shards else "5GB")
    files = folder_of(folder).weight_files()
    there = sorted(folder.glob("*.safetensors"))
    assert files == there
    assert len(there) > 1 or not shards
    for path in there:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert folder_of(folder).weight_files() is None
        path.write_bytes(content)
    assert folder_of(folder).weight_files() == there


def test_every_prefix_of_what_is_written_is_partial(tmp_path):
    """A copy that grows byte by byte, in the order in which files are written, is whole at its end."""
    whole = checkpoint(tmp_path / "run", 7, 1.5)
    names = ["config.json", "model.safetensors"]
    growing = tmp_path / "growing" / "checkpoint-7"
    growing.mkdir(parents=True)
    for name in names:
        content = (whole / name).read_bytes()
        for length in range(len(content)):
            (growing / name).write_bytes(content[:length])
            assert folder_of(growing).weight_files() is None, (name, length)
        (growing / name).write_bytes(content)
    assert folder_of(growing).weight_files() == [growing / "model.safetensors"]


def test_what_the_reference_saves_is_whole(tmp_path):
    """Compressed models in both formats, as they are saved."""
    from reference_impl.shared_core.block import PROJECTIONS
    from reference_impl.shared_core.folders import METADATA
    from reference_impl.shared_core.projections import save_pt

    for suffix, save in (("pt", save_pt), ("safetensors", save_file)):
        folder = tmp_path / suffix / "checkpoint-1"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / METADATA).write_text('{"compressed_layer_indices": [1, 10]}')
        tensors = {"core": torch.ones(2, 3)}
        stems = [f"layer_{i}/{p}" for i in (1, 10) for p in PROJECTIONS]
        for stem in ["non_moe_weights", *stems]:
            assert folder_of(folder).weight_files() is None
            (folder / stem).parent.mkdir(exist_ok=True)
            save(tensors, folder / f"{stem}.{suffix}")
        assert len(folder_of(folder).weight_files()) == 7


@pytest.mark.parametrize(
    "index", ["", "[]", "null", "{}", '{"weight_map": null}', '{"weight_map": {}}', '{"weight_map"']
)
def test_an_index_of_another_form_is_no_checkpoint(tmp_path, index):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(index)
    assert folder_of(folder).weight_files() is None


@pytest.mark.parametrize(
    "header", [b"", b"[]", b'{"w": 1}', b'{"w": {"data_offsets": []}}', b"\xff"]
)
def test_a_header_of_another_form_is_no_checkpoint(tmp_path, header):
    folder = checkpoint(tmp_path, 1, 2.0)
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert folder_of(folder).weight_files() is None
    path.write_bytes((2**63).to_bytes(8, "little"))
    assert folder_of(folder).weight_files() is None


def test_a_digest_is_that_of_the_bytes(tmp_path):
    folder = checkpoint(tmp_path, 4, 2.5)
    content = (folder / "model.safetensors").read_bytes()
    expected = hashlib.sha256(b"model.safetensors\0%d\0" % len(content) + content).hexdigest()
    found = folder_of(folder)
    assert found.digest(found.weight_files()) == expected


def test_weights_are_read_once_while_nothing_changes(tmp_path, monkeypatch):
    checkpoint(tmp_path / "run", 4, 2.5)
    read = []
    digest = CheckpointFolder.digest
    monkeypatch.setattr(
        CheckpointFolder,
        "digest",
        lambda self, files: read.append(self.name) or digest(self, files),
    )
    results = str(tmp_path / "results.jsonl")
    watcher = CheckpointWatcher().checkpoint_watcher(
        str(tmp_path / "run"), value_of, results=results
    )
    for _ in range(4):
        watcher.poll()
    assert read == ["checkpoint-4"]
    path = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    os.utime(path, (1, 1))  # read again, and found the same
    assert watcher.poll() == []
    assert read == ["checkpoint-4"] * 2


def test_numbers_of_torch_and_numpy_are_numbers(tmp_path):
    import numpy as np

    checkpoint(tmp_path / "run", 1, 0)
    metrics = {"a": torch.tensor(0.5), "b": np.float64(0.1), "c": np.int64(2**40), "d": 3}
    results = tmp_path / "results.jsonl"
    CheckpointWatcher().checkpoint_watcher(
        str(tmp_path / "run"), lambda path: metrics, results=str(results)
    ).poll()
    found = json.loads(results.read_text())["results"]
    assert found == {"a": 0.5, "b": 0.1, "c": 2**40, "d": 3}


def test_nothing_is_made_before_there_is_a_checkpoint(tmp_path):
    results = tmp_path / "evaluations" / "results.jsonl"
    watcher = CheckpointWatcher().checkpoint_watcher(
        str(tmp_path / "run"), value_of, results=str(results)
    )
    assert watcher.poll() == []
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_damaged_is_told_of_at_once(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(CheckpointError, match=r"results\.jsonl, line 2: is not JSON"):
        CheckpointWatcher().checkpoint_watcher(str(tmp_path), value_of, results=str(path))
    path.write_bytes(b'{"a": 1}\n5\n')
    with pytest.raises(CheckpointError, match=r"line 2: is not a JSON object"):
        ResultsFile(path).read()


def test_the_rest_of_a_line_is_cut_off(tmp_path):
    file = ResultsFile(tmp_path / "results.jsonl")
    file.append({"a": "é"})
    whole = file.content()
    for length in range(1, len(whole)):
        file.path.write_bytes(whole + whole[:length])
        assert file.read() == [{"a": "é"}]
        file.append({"b": 2})
        assert file.content() == whole + b'{"b": 2}\n'


# The command


def test_watch_says_what_happened(tmp_path, capsys):
    checkpoint(tmp_path / "run", 1000, 3.25)
    checkpoint(tmp_path / "run", 900, 1.5)

    def evaluate(path):
        if path.endswith("900"):
            raise RuntimeError("no memory\nand more")
        return {**value_of(path), "arc": {"acc": 0.25}, "n": 3}

    arguments = (tmp_path / "run", evaluate, tmp_path / "results.jsonl")
    assert watch(*arguments, attempts=1, once=True) is False
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "checkpoint-900  failed: RuntimeError: no memory",
        "checkpoint-1000  value 3.25  arc/acc 0.25  n 3",
    ]
    assert watch(*arguments, attempts=1, once=True) is True
    assert capsys.readouterr().out == ""


def test_shown_results_without_metrics():
    assert shown({"checkpoint": "checkpoint-1", "results": {}}).strip() == "checkpoint-1"


PROGRAM = """
import signal, sys
from reference_impl.shared_core.watcher import watch
# A shell that runs the tests in the background has them ignore Ctrl-C, which is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
watch(sys.argv[1], lambda path: {"loss": 0.5}, sys.argv[2], interval=0.05)
print("after", flush=True)
"""


def test_watch_goes_on_until_interrupted(tmp_path):
    """The signal follows the printed line: the file of results has its line a moment earlier."""
    run, results = tmp_path / "run", tmp_path / "results.jsonl"
    command = [sys.executable, "-c", PROGRAM, str(run), str(results)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **streams) as process:
        killed_when_silent = threading.Timer(120, process.kill)
        killed_when_silent.start()
        try:
            for step in (2, 10):
                checkpoint(run, step, 1.0)
                assert process.stdout.readline() == f"checkpoint-{step}  loss 0.5\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        finally:
            killed_when_silent.cancel()
            process.kill()
    assert (process.returncode, out, err) == (0, "stopped\nafter\n", "")
    assert len(results.read_text().splitlines()) == 2
