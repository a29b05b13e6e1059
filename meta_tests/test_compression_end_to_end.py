"""The whole way on real architectures: compress, load in a fresh process, export, load that.

Also the command line, and the fit on experts that are of the form that is fitted.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from command_line import ROOT, environment
from safetensors.torch import load_file, save_file

from conformance.benchmarks import shared_core_fit as benchmark
from reference_impl.shared_core.__main__ import main
from reference_impl.shared_core.checkpoint import load_compressed_model
from reference_impl.shared_core.compression import FitOptions, compress_directory, compress_model
from reference_impl.shared_core.fit import SharedCoreFit

pytest.importorskip("transformers")

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MODELS = {
    "qwen3_moe": {
        **COMMON,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "head_dim": 8,
        "intermediate_size": 40,
        "moe_intermediate_size": 20,
        "num_experts": 6,
        "norm_topk_prob": True,
    },
    "mixtral": {
        **COMMON,
        "num_hidden_layers": 2,
        "intermediate_size": 20,
        "num_local_experts": 6,
        "tie_word_embeddings": True,
    },
}
IDS = torch.arange(22).view(2, 11) * 7 % VOCABULARY

FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
from reference_impl.shared_core.checkpoint import load_compressed_model
folder, exported, out = sys.argv[1:]
ids = torch.load(out)
model, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
with torch.no_grad():
    logits = model(input_ids=ids).logits
torch.save({"loaded": load_compressed_model(folder).logits(ids), "exported": logits}, out)
"""


def planted_model(model_type):
    """A small random model whose experts are shared cores between wrappers, moderately different."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **MODELS[model_type])
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.data = planted(*parameter.shape)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def planted(experts, d_out, d_in, rank=2, size=0.5):
    """Experts (I + U Vᵀ) C (I + U Vᵀ) of one core."""
    core = torch.randn(d_out, d_in) / math.sqrt(d_in)
    u_out, v_out = (torch.randn(experts, d_out, rank) for _ in "uv")
    u_in, v_in = (torch.randn(experts, d_in, rank) for _ in "uv")
    outer = torch.eye(d_out) + size * u_out @ v_out.mT / d_out
    return outer @ core @ (torch.eye(d_in) + size * u_in @ v_in.mT / d_in)


@pytest.fixture(scope="module", params=MODELS)
def original(request, tmp_path_factory):
    """A model, and the directory that transformers saved it to."""
    folder = tmp_path_factory.mktemp(request.param)
    model = planted_model(request.param)
    model.save_pretrained(folder / "original")
    return model, folder


def relative(found, expected):
    """The largest error over the root mean square."""
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


def test_loaded_and_exported_models_equal_the_compressed_one(original, tmp_path):
    """Saved with other weights than it was loaded with, and read by a process of its own."""
    _, folder = original
    compress_directory(folder / "original", tmp_path / "first", FitOptions(rank=3, num_steps=20))
    model = load_compressed_model(tmp_path / "first")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters().values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.01 * noise
    logits = model.logits(IDS)
    model.save(tmp_path / "saved")
    model.export(tmp_path / "exported")
    torch.save(IDS, tmp_path / "out.pt")
    names = (tmp_path / "saved", tmp_path / "exported", tmp_path / "out.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, names)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt")
    assert torch.equal(found["loaded"], logits)
    assert relative(found["exported"], logits) < 1e-5


def test_planted_experts_are_recovered(original, tmp_path):
    """The compressed model is the original where its experts have the form that is fitted."""
    model, folder = original
    options = FitOptions(rank=4, num_steps=2500, lr=1e-2)
    fitted = compress_directory(folder / "original", tmp_path / "fitted", options)
    assert max(each.relative_error for each in fitted) < 1e-3
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert relative(load_compressed_model(tmp_path / "fitted").logits(IDS), expected) < 1e-2


def test_model_in_memory_and_directory_give_the_same(original, tmp_path):
    """Fused experts in memory and experts one by one in files are the same experts."""
    model, folder = original
    options = FitOptions(rank=2, num_steps=3)
    compress_directory(folder / "original", tmp_path / "files", options)
    compress_model(model, tmp_path / "memory", options)
    logits = [load_compressed_model(tmp_path / name).logits(IDS) for name in ("files", "memory")]
    assert torch.equal(*logits)


def test_command_line_does_the_whole_job(original, tmp_path, capsys):
    """compress, inspect, convert and export; the counts are those of the formula."""
    _, folder = original
    places = {name: str(tmp_path / name) for name in ("compressed", "pt", "exported")}
    source = str(folder / "original")
    assert main(["compress", source, places["compressed"], "--rank", "2", "--steps", "5"]) == 0
    assert main(["convert", places["compressed"], places["pt"], "--format", "pt"]) == 0
    assert main(["export", places["pt"], places["exported"]]) == 0
    capsys.readouterr()
    assert main(["inspect", places["pt"]]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    of_one = 24 * 20 + 6 * 2 * 2 * (24 + 20)
    assert shown["total_params_compressed"] == f"{6 * of_one:,}"
    assert shown["total_compression_ratio"] == f"{of_one / (6 * 24 * 20):.6f}"
    index = json.loads((tmp_path / "exported/model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) > 6 * 6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["inspect", "{folder}/original"], "is missing"),
        (["inspect", "{folder}/none"], "none: is not a directory"),
        (["compress", "{folder}/original", "{tmp}/out", "--rank", "21"], "rank is 21, expected 1"),
        (["compress", "{folder}/none", "{tmp}/out", "--rank", "2"], "config.json: does not exist"),
        (["compress", "{folder}/original", "{tmp}/file", "--rank", "2"], "file: is there already"),
    ],
)
def test_mistakes_are_one_line(original, tmp_path, capsys, arguments, named):
    """A user's mistake names what is wrong, and leaves nothing behind."""
    _, folder = original
    (tmp_path / "file").write_text("not a checkpoint")
    places = {"folder": folder, "tmp": tmp_path}
    assert main([each.format(**places) for each in arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: "), error
    assert named in error.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_originals_are_never_replaced(original, tmp_path, capsys):
    """Neither kind of model takes the place of the other."""
    _, folder = original
    source, target = str(folder / "original"), str(tmp_path / "compressed")
    assert main(["compress", source, target, "--rank", "2", "--steps", "0"]) == 0
    before = {path.name: path.read_bytes() for path in (folder / "original").iterdir()}
    assert main(["compress", source, source, "--rank", "2", "--steps", "0"]) == 1
    assert "is not a compressed model" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in (folder / "original").iterdir()}
    assert main(["export", target, target]) == 1
    assert "is not an ordinary checkpoint" in capsys.readouterr().err
    assert main(["compress", source, target, "--rank", "3", "--steps", "0"]) == 0
    assert load_compressed_model(target).parameters()["layer_0.up_proj.u_in"].shape[-1] == 3


@pytest.mark.parametrize("format", ["safetensors", "pt"])
def test_a_full_disk_is_one_line(original, tmp_path, format):
    """Files that cannot grow, as on a full disk: an error that names the folder, and nothing left."""
    _, folder = original
    arguments = ["compress", folder / "original", tmp_path / "out", "--rank", "2", "--steps", "0"]
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    run = "import sys; from reference_impl.shared_core.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", limit + run, *map(str, arguments), "--format", format],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert f"error: {tmp_path / 'out'}: cannot be written" in done.stderr
    assert not list(tmp_path.iterdir())


def test_experts_far_beyond_the_last_are_refused(original, tmp_path, capsys):
    """A wrapper of the billionth expert is an error at once, and not a billion missing ones."""
    _, folder = original
    target = tmp_path / "compressed"
    options = FitOptions(rank=2, num_steps=0)
    compress_directory(folder / "original", target, options)
    path = target / "layer_0" / "up_proj.safetensors"
    tensors = load_file(path)
    further = tensors["wrappers.0.U_in"].clone()
    save_file(tensors | {"wrappers.1000000000.U_in": further}, path)
    assert main(["inspect", str(target)]) == 1
    assert f"{path}: wrappers.6.U_in: is missing" in capsys.readouterr().err


def test_benchmark_of_the_fit_records_its_bars(tmp_path):
    """On a small layer: time, memory, losses, and a verdict that follows from them."""
    output = tmp_path / "record.json"
    sizes = "--experts 3 --hidden 32 --intermediate 48 --rank 2 --steps 20 --rounds 2 --threads 1"
    command = [sys.executable, "-m", "conformance.benchmarks.shared_core_fit", *sizes.split()]
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode in (0, 1), done.stderr
    record = json.loads(output.read_text())
    assert record["bytes_of_experts"] == 3 * 3 * 32 * 48 * 4
    assert record["better"] is True
    assert record["bars"] == {"time": 1.5, "memory": 4.0}
    over = [name for name, bar in benchmark.BARS.items() if record["ratios"][name] > bar]
    assert record["within_bars"] == (not over)
    assert done.returncode == (1 if over else 0)


def test_gradients_of_the_fit_are_those_of_its_loss():
    """Written-out gradients against autograd in float64."""
    from reference_impl.shared_core.fit import error_and_gradients, room_for

    generator = torch.Generator().manual_seed(1)
    experts = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    factors = SharedCoreFit().start(experts.float(), 2, seed=0)
    factors = {
        name: factor.double() + 0.3 * torch.randn(factor.shape, generator=generator).double()
        for name, factor in factors.items()
    }
    loss = error_and_gradients(experts, factors, room_for(experts))
    leaves = {name: factor.clone().requires_grad_() for name, factor in factors.items()}
    outer = torch.eye(5) + leaves["u_out"] @ leaves["v_out"].mT
    inner = torch.eye(7) + leaves["u_in"] @ leaves["v_in"].mT
    expected = (experts - outer @ leaves["core"] @ inner).square().sum()
    gradients = torch.autograd.grad(expected, list(leaves.values()))
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
    for (name, factor), gradient in zip(factors.items(), gradients):
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_example_of_the_page_runs():
    """The Python of docs/shared_core.md, as written."""
    page = (ROOT / "docs/shared_core.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/shared_core.md", "exec"), {})
