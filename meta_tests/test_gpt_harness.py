"""The harness of ``gpt_checkpoint``: its damage damages, its failures can be repeated by hand."""

import contextlib
import io
import random
import sys
import types
from pathlib import Path

import pytest
import torch

from conformance.harness import profiles
from conformance.harness.failures import ConformanceFailure, Declined
from conformance.harness.gpt_cases import GPTCase
from conformance.harness.gpt_damage import DAMAGES, FILES_OF_A_CASE, byte_damages, damaged_call
from conformance.harness.gpt_oracle import oracle
from conformance.harness.messages import reproduction
from conformance.harness.requirement import all_requirements
from reference_impl.gpt import CheckpointError, CheckpointReader, GPTBatched
from reference_impl.gpt.__main__ import main

NUMBERS = (("which", 5), ("place", 1234), ("kind", 3))
REQUIREMENTS = {k: r for k, r in all_requirements().items() if r.contract == "gpt_checkpoint"}


def case(**fields):
    defaults = {"layers": 8, "heads": 2, "head_dim": 8, "wrapped": "", "tokens": 5}
    return GPTCase(**(defaults | {"extra": NUMBERS} | fields))


def failure_of(slug, method):
    """The failure of a requirement, on the first case that shows it."""
    settings = profiles.without_shrinking(profiles.PROFILES["gate"])
    with profiles.temporarily(settings), pytest.raises(ConformanceFailure) as caught:
        REQUIREMENTS[slug].check(method)
    return caught.value


class Transposed(GPTBatched):
    def attention(self, layer, x_BTC, value_BTC, lambdas, visible_B1TT):
        block = self.blocks[layer]
        block.o_w.data = block.o_w.data.t()
        try:
            return super().attention(layer, x_BTC, value_BTC, lambdas, visible_B1TT)
        finally:
            block.o_w.data = block.o_w.data.t()


class TransposedReader(CheckpointReader):
    model_class = Transposed


class Lenient(CheckpointReader):
    """Fills what is missing with zeros, leaves out what is left over, takes any value."""

    def check_layout(self, config):
        pass

    def read(self, key):
        return self.tensors[key].read().float()


class Saving(GPTBatched):
    def save(self, path, **entries):
        torch.save({"model": self.state()}, path)


class SavingReader(CheckpointReader):
    model_class = Saving


@pytest.mark.parametrize(
    ("reader", "slug"),
    [
        (TransposedReader, "gpt_checkpoint.function.small"),
        (TransposedReader, "gpt_checkpoint.padding.left"),
        (TransposedReader, "gpt_checkpoint.documents.separate"),
        (Lenient, "gpt_checkpoint.refuses.left-over-tensor"),
        (Lenient, "gpt_checkpoint.refuses.not-finite"),
        (SavingReader, "gpt_checkpoint.save.failing"),
    ],
)
def test_the_lines_that_reproduce_a_failure_run_by_themselves(reader, slug, monkeypatch):
    """Pasted into an interpreter, with the adapter imported, they run and show the fault."""
    adapter = types.SimpleNamespace(gpt_checkpoint=reader)
    monkeypatch.setitem(sys.modules, "my_adapter", adapter)
    failure = failure_of(slug, reader)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec("\n".join(reproduction(failure)), {})
    assert printed.getvalue().strip()


def test_a_transposed_projection_is_told_in_the_failure():
    text = str(failure_of("gpt_checkpoint.function.small", TransposedReader))
    assert "gpt_checkpoint.function.small (core): wrong values" in text
    assert "features differs from the oracle" in text


@pytest.mark.parametrize("format", ["small", "medium"])
@pytest.mark.parametrize("name", DAMAGES)
def test_every_kind_of_damage_is_refused_by_name(name, format):
    """Whatever it draws, the reference refuses it with its own error, which names file and tensor."""
    for which in range(16):
        numbers = (("which", which), ("place", 997 * which + 3), ("kind", 0))
        wide = {"heads": 16} if name == "unknown_head_width" else {}
        damaged = case(format="medium" if wide else format, extra=numbers, seed=which, **wide)
        damage = DAMAGES[name](damaged)
        call = damaged_call(damaged, damage, "cpu")
        (source,), options = call.values()
        with pytest.raises(CheckpointError) as caught:
            CheckpointReader(source, **options).load()
        assert "checkpoint.pt" in str(caught.value)
        assert not damage.named or any(part in str(caught.value) for part in damage.named)
        assert not Path(source + ".executed").exists()


@pytest.mark.parametrize("container", ["training", "bare", "safetensors"])
def test_damaged_bytes_are_refused_with_one_error_or_change_nothing(container):
    """Of a thousand damaged files none ends in another exception than CheckpointError."""
    call = case(container=container).call()
    source = Path(call.named("source"))
    data = source.read_bytes()
    whole = CheckpointReader(str(source), head_dim=8).load().state()
    header = 8 + int.from_bytes(data[:8], "little") if container == "safetensors" else len(data)
    numbers = random.Random(7)
    refused = 0
    for _ in range(1000):
        what, damaged = byte_damages(numbers, data, header)
        source.write_bytes(damaged)
        try:
            state = CheckpointReader(str(source), head_dim=8).load().state()
        except CheckpointError as error:
            refused += source.name in str(error)
        else:
            assert all(torch.equal(state[key], whole[key]) for key in whole), what
    assert refused > 850


def test_ten_thousand_files_are_damaged_a_night():
    assert profiles.PROFILES["gate"].max_examples * FILES_OF_A_CASE >= 500
    assert profiles.PROFILES["nightly"].max_examples * FILES_OF_A_CASE >= 10_000


def test_every_tensor_of_a_case_is_asymmetric_and_not_zero():
    """A fresh checkpoint has zero projections, on which every wrong conversion passes."""
    for format in ("small", "medium"):
        state = case(format=format, layers=12).call().named("state")
        for key, tensor in state.items():
            assert tensor.ne(0).all(), key
            square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
            assert not square or not torch.allclose(tensor, tensor.t()), key


def test_the_oracle_is_in_float64_and_knows_its_noise():
    known = oracle(case().call())
    for name in ("features", "logits"):
        assert known.value[name].dtype == torch.float64
        assert (known.noise[name] > 0).all()
        assert not known.expectation(name).ill_conditioned


def test_a_loader_that_declines_everything_is_declined():
    def gpt_checkpoint(source, *, head_dim=None):
        raise NotImplementedError("not today")

    for slug in ("gpt_checkpoint.function.small", "gpt_checkpoint.refuses.missing-tensor"):
        with pytest.raises(Declined, match="not today"):
            REQUIREMENTS[slug].check(gpt_checkpoint)


def test_a_loader_that_refuses_everything_fails():
    def gpt_checkpoint(source, *, head_dim=None):
        raise ValueError("no")

    for slug in ("gpt_checkpoint.function.small", "gpt_checkpoint.refuses.missing-tensor"):
        assert failure_of(slug, gpt_checkpoint).kind == "raised ValueError"


def test_the_command_prints_what_a_checkpoint_holds(capsys):
    call = case(layers=12, world=8).call()
    assert main([call.named("source"), "--head-dim", "8"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["checkpoint_format"] == "small"
    assert printed["num_layers"] == "12"
    assert printed["scalars_padding"] == "4"
    elements = sum(tensor.numel() for tensor in call.named("state").values())
    assert printed["elements"] == f"{elements:,}"


def test_the_command_says_in_one_line_what_is_wrong(capsys, tmp_path):
    path = tmp_path / "nothing.pt"
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ")
    assert error.count("\n") == 1
