"""The reference's checkpoints of flat shards: any ranks to any ranks, both formats, what is refused."""

import copy
import os
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_reference_flat_shards import Across
from torch import nn

from reference_impl.flat_shards import MultiStageModel, Precision, ShardedOptimizer, state_dict
from reference_impl.flat_shards.layout import FlatLayout, Overlap, ParameterMeta
from reference_impl.flat_shards.optimizer import STATE_NAMES
from reference_impl.flat_shards.safe_load import SafeLoad
from reference_impl.flat_shards.state_dict import save_state_dict
from reference_impl.flat_shards.unit import FlatUnit
from reference_impl.ranks import OneRank, in_process
from reference_impl.stored import CheckpointError

WORLDS = (1, 2, 3, 4)
MOMENTS = tuple(STATE_NAMES["adamw"].values())


def make_modules(seed=0, frozen=("1.0.bias",), hidden=14):
    """An embedding with a norm, a block, and a head that is the embedding."""
    modules = [
        nn.Sequential(nn.Embedding(23, 10), nn.LayerNorm(10)),
        nn.Sequential(nn.Linear(10, hidden), nn.GELU(), nn.Linear(hidden, 10)),
        nn.Linear(10, 23),
    ]
    modules[2].weight = modules[0][0].weight
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in nn.Sequential(*modules).named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(name not in frozen)
    return modules


def made(ranks, seed=0, **options):
    """A model on these ranks, with the state of AdamW."""
    precision = options.pop("precision", Precision())
    modules = copy.deepcopy(make_modules(seed, **options))
    return MultiStageModel(modules, ranks=ranks, optimizer_state_names=MOMENTS, precision=precision)


def filled(model):
    """Moments with a number of its own for every element, by shard and parameter name."""
    found = {}
    for number, shard_name in enumerate(MOMENTS):
        values = {
            name: torch.randn(whole.shape, generator=torch.Generator().manual_seed(place))
            .abs()
            .add(number)
            for place, (name, whole) in enumerate(model.export_state(shard_name))
        }
        model.import_state(values, shard_name)
        found[shard_name] = values
    return found


def exported(model):
    """Every shard of the state, whole."""
    return {name: dict(model.export_state(name)) for name in model.state_shard_names}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for shard_name, values in expected.items():
        assert found[shard_name].keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(found[shard_name][name], value), (shard_name, name)


def save_with(form, model, directory, **values):
    """Save in one of the formats."""
    if form == "shards":
        model.save(directory, **values)
    else:
        save_state_dict(model, directory, **values)


FORMS = ("shards", "state")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saved_on", WORLDS)
def test_any_number_of_ranks_reads_what_any_number_saved(form, saved_on, tmp_path):
    def save(ranks):
        model = made(ranks)
        filled(model)
        save_with(form, model, tmp_path / "one", steps=7)
        return exported(model)

    [expected, *_] = in_process(saved_on, save)

    def load(ranks):
        model = made(ranks, seed=1)
        assert model.load(tmp_path / "one") == {"steps": 7}
        assert_same(exported(model), expected)
        for unit in model.units:
            for shard in unit.shards.values():
                pad = unit.shard_pad if shard.numel() else 0
                assert not bool(shard[shard.numel() - pad :].any())
        model.restore_parameters()
        weight = model.parameter("1.0.weight")
        assert torch.equal(weight, expected["weights"]["1.0.weight"])

    for loaded_on in WORLDS:
        in_process(loaded_on, load)


class Slices(nn.Module):
    """A tensor-parallel rank's part of parameters that are split along either axis, and one that is
    not."""

    def __init__(self, values, group):
        super().__init__()
        for name, dim in (("rows", 0), ("columns", 1), ("norm", None)):
            part = values[f"0.{name}"]
            if dim is not None:
                part = part.chunk(group.size, dim)[group.rank]
            parameter = nn.Parameter(part.clone().contiguous())
            if dim is not None:
                parameter.tensor_parallel_dim = dim
            self.register_parameter(name, parameter)


def sliced(everyone, tensor, values):
    """A model on ranks of which ``tensor`` neighbours are a tensor-parallel group."""
    group = everyone.split(tensor)
    data = Across(everyone, tensor) if everyone.size > 1 else OneRank()
    module = Slices(values, group)
    return MultiStageModel([module], ranks=data, tensor=group, optimizer_state_names=MOMENTS)


LAYOUTS = [(data, tensor) for tensor in (1, 2, 4) for data in (1, 2, 3)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("data", "tensor"), LAYOUTS)
def test_slices_are_resharded(form, data, tensor, tmp_path):
    """Each number of slices and of data-parallel ranks reads what each other saved."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"0.rows": (12, 6), "0.columns": (5, 8), "0.norm": (7,)}
    draw = lambda: {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    expected = {name: draw() for name in ("weights", *MOMENTS)}

    def save(everyone):
        model = sliced(everyone, tensor, expected["weights"])
        for name in MOMENTS:
            model.import_state(expected[name], name)
        save_with(form, model, tmp_path)

    in_process(data * tensor, save)

    def load(everyone, tensor):
        model = sliced(everyone, tensor, draw_other())
        model.load(tmp_path)
        assert_same(exported(model), expected)

    def draw_other():
        return {name: torch.full(shape, -1.0) for name, shape in shapes.items()}

    for other_data, other_tensor in LAYOUTS:
        in_process(other_data * other_tensor, lambda e, t=other_tensor: load(e, t))


@pytest.mark.parametrize("form", FORMS)
def test_master_weights_are_saved_in_their_precision(form, tmp_path):
    def program(ranks):
        model = made(ranks, precision=Precision(compute_dtype=torch.bfloat16))
        before = exported(model)
        model.restore_parameters()
        save_with(form, model, tmp_path)
        other = made(ranks, seed=1, precision=Precision(compute_dtype=torch.bfloat16))
        other.load(tmp_path)
        assert_same(exported(other), before)
        other.restore_parameters()
        rounded = before["weights"]["1.0.weight"].bfloat16()
        assert torch.equal(other.parameter("1.0.weight"), rounded)

    in_process(3, program)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", [(), ("0.0.weight", "1.2.bias"), ("1.0.bias", "2.bias")])
def test_state_of_parameters_that_were_frozen_is_zero(form, frozen, tmp_path):
    def program(ranks):
        model = made(ranks)
        moments = filled(model)
        save_with(form, model, tmp_path)
        other = made(ranks, seed=1, frozen=frozen)
        other.load(tmp_path)
        found = exported(other)
        assert_same({"weights": by_name(found["weights"])}, {"weights": by_name(model)})
        for name in MOMENTS:
            for parameter, value in found[name].items():
                assert parameter not in frozen
                expected = moments[name].get(parameter, torch.zeros_like(value))
                assert torch.equal(value, expected), parameter

    in_process(3, program)


def by_name(weights):
    """Weights in the order of their names: frozen ones lie in units of their own."""
    weights = weights if isinstance(weights, dict) else dict(weights.export_state())
    return dict(sorted(weights.items()))


@pytest.mark.parametrize("forms", [("shards", "state"), ("state", "shards")])
def test_formats_replace_each_other(forms, tmp_path):
    """Only files of the latest save remain, of whichever format and number of ranks."""
    for number, form in enumerate(forms):
        for ranks, seed in ((3, number), (2, number + 7)):

            def program(ranks, seed=seed, form=form):
                model = made(ranks, seed=seed)
                save_with(form, model, tmp_path)
                return exported(model)

            [expected, *_] = in_process(ranks, program)
    model = made(OneRank(), seed=99)
    model.load(tmp_path)
    assert_same(exported(model), expected)
    units = len(model.units)
    assert len(os.listdir(tmp_path)) == 1 + (units if forms[-1] == "state" else 2)


def test_model_without_optimizer_reads_weights(tmp_path):
    model = made(OneRank())
    model.save(tmp_path)
    inference = MultiStageModel(make_modules(1), mode="inference")
    inference.load(tmp_path)
    assert_same(exported(inference), {"weights": exported(model)["weights"]})
    inference.save(tmp_path)
    with pytest.raises(CheckpointError, match="has shards"):
        made(OneRank()).load(tmp_path)


def test_gradients_of_before_are_forgotten(tmp_path):
    """A gradient that was accumulated before loading is no part of the next step."""
    model = made(OneRank())
    model.save(tmp_path)
    ids = torch.arange(6).view(2, 3)

    def gradients():
        model(ids).square().mean().backward()
        model.reduce_gradients(allow_no_grad=True)
        return {name: x.clone() for name, x in model.export_state("grads")}

    expected = gradients()
    model(ids + 3).square().mean().backward()
    model.load(tmp_path)
    found = gradients()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_steps_are_saved_with_the_optimizer(tmp_path):
    optimizer = ShardedOptimizer(made(OneRank()), "adamw", lr=0.1)
    optimizer.set_steps(12)
    optimizer.save(tmp_path)
    other = ShardedOptimizer(made(OneRank()), "adamw", lr=0.1)
    other.load(tmp_path)
    assert other.steps == 12
    assert all(float(state["step"]) == 12 for state in other.optimizer.state.values())


# What is refused


def saved(tmp_path, form, ranks=2):
    """A checkpoint of some ranks."""
    in_process(ranks, lambda ranks: save_with(form, made(ranks), tmp_path))
    return tmp_path


def refusal(tmp_path, **options):
    """The error of loading, on two ranks, after which the models are as they were."""

    def program(ranks):
        model = made(ranks, seed=1, **options)
        before = exported(model)
        try:
            model.load(tmp_path)
        except (CheckpointError, RuntimeError) as error:
            assert_same(exported(model), before)
            return str(error)
        raise AssertionError("the checkpoint was not refused")

    errors = in_process(2, program)
    return errors[0] if str(tmp_path) in errors[0] else errors[1]


def edit_metadata(tmp_path, edit):
    """Change the metadata of a checkpoint."""
    path = tmp_path / "metadata.yaml"
    metadata = yaml.safe_load(path.read_text())
    edit(metadata)
    path.write_text(yaml.safe_dump(metadata, sort_keys=False))


def edit_file(path, edit):
    """Change the tensors of a file."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"rank": re.search(r"\d+", path.name)[0]})


def test_rank_file_errors_name_file_and_key(tmp_path):
    saved(tmp_path, "shards")
    path = tmp_path / "rank_1.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "rank_1.safetensors: is truncated or damaged" in refusal(tmp_path)
    path.unlink()
    assert "rank_1.safetensors: is missing" in refusal(tmp_path)
    path.write_bytes((tmp_path / "rank_0.safetensors").read_bytes())
    assert "rank_1.safetensors: is the file of rank 0, expected 1" in refusal(tmp_path)
    for edit, problem in (
        (lambda t: t.pop("exp_avgs_shard"), "exp_avgs_shard: is missing"),
        (lambda t: t.update(more_shard=torch.ones(3)), "more_shard: is unknown"),
        (lambda t: t.update(weights_shard=torch.ones(3)), "weights_shard: has shape [3]"),
        (
            lambda t: t.update(weights_shard=t["weights_shard"].double()),
            "weights_shard: has dtype F64, expected float32",
        ),
        (lambda t: t["weights_shard"].fill_(torch.nan), "weight are not finite"),
    ):
        path.write_bytes(whole)
        edit_file(path, edit)
        assert problem in refusal(tmp_path), problem
    path.write_bytes(whole)
    in_process(2, lambda ranks: made(ranks).load(tmp_path))


def test_metadata_errors_say_what_is_wrong(tmp_path):
    saved(tmp_path, "shards")
    path = tmp_path / "metadata.yaml"
    text = path.read_text()
    for edit, problem in (
        (lambda m: m.update(ranks=3), "names 2 files, expected 3"),
        (lambda m: m["files"].pop(), "names 1 files, expected 2"),
        (lambda m: m["files"].__setitem__(0, "../rank_0.safetensors"), "names a file '../rank_0"),
        (lambda m: m.pop("units"), "units: expected list"),
        (lambda m: m["units"][0].pop("parameters"), "is damaged"),
        (lambda m: m["units"][0]["parameters"][0].update(colour=1), "is damaged"),
        (lambda m: m["units"].pop(), "has shape"),
        (lambda m: m.update(shards=["weights"]), "has shards ['weights'], expected"),
        (lambda m: m.update(format="other"), "is not the metadata of"),
        (lambda m: m.pop("complete"), "is truncated"),
    ):
        path.write_text(text)
        edit_metadata(tmp_path, edit)
        assert problem in refusal(tmp_path), problem
    for broken, problem in (
        ("", "is not the metadata"),
        ("{", "is no YAML"),
        ("\0" * 50, "is no YAML"),
    ):
        path.write_text(broken)
        assert problem in refusal(tmp_path)
    path.unlink()
    assert "metadata.yaml: cannot be read" in refusal(tmp_path)


def test_metadata_is_refused_wherever_it_is_cut_off(tmp_path):
    """Also behind a whole line, and where a number would be a shorter one."""
    model = made(OneRank())
    model.save(tmp_path, steps=1234567)
    path = tmp_path / "metadata.yaml"
    text = path.read_text()
    for length in range(len(text) - 120, len(text) - 1):
        path.write_text(text[:length])
        with pytest.raises(CheckpointError):
            model.load(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_other_models_are_refused_by_name(form, tmp_path):
    saved(tmp_path, form)
    error = refusal(tmp_path, hidden=15)
    assert re.search(r"1\.\d\.(weight|bias).*has shape \[.*14.*\], expected \[.*15", error), error


def test_state_errors_name_the_tensor(tmp_path):
    saved(tmp_path, "state")
    path = tmp_path / "metadata.yaml"
    text = path.read_text()
    index = yaml.safe_load(text)["state_index"]
    key = "1.0.weight/weights"
    file = tmp_path / index[key]
    whole = file.read_bytes()

    def swapped(tensors):
        tensors[key] = tensors[key].T.contiguous()

    for edit, problem in (
        (lambda t: t.pop(key), f"{key}: is missing"),
        (
            lambda t: t.update({"1.9.weight/weights": torch.ones(2)}),
            "1.9.weight/weights: is unknown",
        ),
        (swapped, f"{key}: 1.0.weight has shape [10, 14], expected [14, 10]"),
        (lambda t: t.update({"0.1.bias/weights": torch.ones(10)}), "is also in model_"),
        (lambda t: t[key].fill_(torch.inf), f"{key}: "),
    ):
        edit_file(file, edit)
        error = refusal(tmp_path)
        assert problem in error, error
        assert file.name in error, error
        file.write_bytes(whole)
    for edit, problem in (
        (lambda m: m["state_index"].pop(key), f"{key}: is unknown"),
        (
            lambda m: m["state_index"].update({"more/weights": index[key]}),
            "more/weights: is missing",
        ),
        (lambda m: m["state_index"].update({key: "/etc/passwd"}), "names a file '/etc/passwd'"),
        (lambda m: m["frozen"].append("1.0.weight"), "1.0.weight/exp_avgs: is unknown"),
        (lambda m: m["frozen"].clear(), "1.0.bias/exp_avgs: is missing"),
    ):
        edit_metadata(tmp_path, edit)
        assert problem in refusal(tmp_path), problem
        path.write_text(text)
    file.unlink()
    assert f"{file.name}: is missing" in refusal(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_save_that_cannot_write_raises_on_every_rank(form, tmp_path):
    (tmp_path / "taken").write_text("a file")

    def program(ranks):
        with pytest.raises((CheckpointError, RuntimeError), match="cannot be written"):
            save_with(form, made(ranks), tmp_path / "taken")

    in_process(3, program)


# Counting


@pytest.mark.parametrize("shard_name", ["weights", "exp_avgs"])
def test_a_whole_tensor_that_is_not_read_is_noticed(shard_name, tmp_path, monkeypatch):
    """Also where the names of the index were not compared with the model's."""
    saved(tmp_path, "state", ranks=1)
    key = f"1.0.weight/{shard_name}"
    edit_metadata(tmp_path, lambda metadata: metadata["state_index"].pop(key))
    monkeypatch.setattr(state_dict, "check_keys", lambda *arguments: None)
    with pytest.raises(CheckpointError, match=f"weight: 0 elements of its {shard_name}"):
        made(OneRank()).load(tmp_path)


def counted(*overlaps, layout=None):
    """What a rank says that was given these elements of a weight of 6 and a bias of 3."""
    metas = (ParameterMeta("bias", (3,)), ParameterMeta("weight", (2, 3)))
    unit = FlatUnit("unit", layout or FlatLayout(metas), trainable=True)
    loading = SafeLoad(unit, ["weights"])
    for name, first, count in overlaps:
        loading.count(Overlap(name, 0, first, count), "weights")
    loading.check("here")


def test_every_element_once_is_enough():
    counted(("bias", 0, 3), ("weight", 3, 6))
    counted(("weight", 6, 3), ("bias", 2, 1), ("weight", 3, 3), ("bias", 0, 2))


@pytest.mark.parametrize(
    ("overlaps", "name"),
    [
        ([("bias", 0, 3)], "weight: 0 elements"),
        ([("weight", 3, 6)], "bias: 0 elements"),
        ([("bias", 0, 3), ("weight", 3, 5)], "weight: 5 elements"),
        ([("bias", 0, 3), ("weight", 4, 5)], "weight: 5 elements"),
        ([("bias", 0, 3), ("weight", 3, 3), ("weight", 7, 2)], "weight: 5 elements"),
        # As many elements as there are, and not each of them once.
        ([("bias", 0, 3), ("bias", 0, 3), ("weight", 3, 3)], "bias: 6 elements"),
        ([("bias", 0, 3), ("weight", 3, 3), ("weight", 3, 3)], "weight: 6 elements"),
        ([("bias", 0, 3), ("weight", 3, 4), ("weight", 6, 2)], "weight: 6 elements"),
        ([("bias", 0, 3), ("weight", 2, 6)], "weight: 6 elements"),
    ],
)
def test_elements_are_counted_by_name(overlaps, name):
    with pytest.raises(CheckpointError, match=f"here: {name} of its weights were loaded"):
        counted(*overlaps)
