"""The command that shows everything on a GPU: what it runs, in which time, and what it keeps."""

import sys
import tarfile

import pytest

from conformance.benchmarks import on_gpu
from conformance.implementations import BUNDLED

QUICK = on_gpu.Command("quick", ("-c", "print('done')"))
FAILING = on_gpu.Command("failing", ("-c", "import sys; print('half'); sys.exit(3)"))
SLOW = on_gpu.Command("slow", ("-c", "print('begun', flush=True); import time; time.sleep(600)"))


def test_every_adapter_that_is_named_is_bundled(tmp_path):
    named = {*on_gpu.KERNELS, *on_gpu.MODELS, on_gpu.GATED}
    assert named <= set(BUNDLED)


def test_the_options_of_every_command_exist(tmp_path):
    """What other modules' parsers take: a misspelt option would be found on the GPU alone."""
    from conformance.benchmarks import __main__ as kernels

    [command] = on_gpu.commands("kernels", tmp_path)
    options = kernels.parse(list(command.arguments[2:]))
    assert (options.device, options.record) == ("cuda", tmp_path)
    assert options.impl == list(on_gpu.KERNELS)


def test_a_command_that_fails_or_takes_too_long_leaves_the_others_their_turn(
    tmp_path, monkeypatch, capsys
):
    commands = [FAILING, QUICK, SLOW, QUICK]
    monkeypatch.setattr(on_gpu, "commands", lambda step, folder: commands)
    found = on_gpu.run_all(["requirements"], tmp_path, budget=5)
    assert list(found.items()) == [
        ("failing", "status 3"),
        ("quick", "not begun"),
        ("slow", "ended for want of time"),
    ]
    assert (tmp_path / "slow.txt").read_text() == "begun\n"
    assert "half" in capsys.readouterr().out


def test_what_was_written_is_packed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "commands", lambda step, folder: [QUICK])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert on_gpu.main(["--output", str(tmp_path / "results.tar.gz"), "kernels"]) == 0
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert archive.extractfile("results/quick.txt").read() == b"done\n"


@pytest.mark.skipif(
    "torch" in sys.modules and sys.modules["torch"].cuda.is_available(), reason="there is a GPU"
)
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert on_gpu.main(["--output", str(tmp_path / "results.tar.gz")]) == 4
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_a_step_that_there_is_not_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        on_gpu.main(["--output", "x", "kernel"])
    assert "'kernel' is no step: expected requirements, kernels, gate" in capsys.readouterr().err
