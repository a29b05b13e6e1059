"""The reference's flat shards against torch: one process with the whole model, torch's optimizers."""

import copy
import re

import pytest
import torch
from command_line import ROOT
from torch import nn

from reference_impl.flat_shards import (
    FlatLayout,
    MultiStageModel,
    ParameterMeta,
    Precision,
    ShardedOptimizer,
    ShardName,
    StageMode,
)
from reference_impl.flat_shards.optimizer import STATE_NAMES
from reference_impl.flat_shards.unit import FlatUnit
from reference_impl.ranks import RankFailed, in_process

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
MAX_NORM = 0.1


def make_modules(tied=True, frozen=("1.0.bias",)):
    """An embedding with a norm, a block, and a head that may be the embedding."""
    torch.manual_seed(0)
    modules = [
        nn.Sequential(nn.Embedding(23, 10), nn.LayerNorm(10)),
        nn.Sequential(nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 10)),
        nn.Linear(10, 23),
    ]
    if tied:
        modules[2].weight = modules[0][0].weight
    parameters = dict(nn.Sequential(*modules).named_parameters())
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape)
    for name in frozen:
        parameters[name].requires_grad_(False)
    return modules


MODULES = make_modules()


def ids_of(rank, batch):
    generator = torch.Generator().manual_seed(10 * batch + rank)
    return torch.randint(23, (3, 5), generator=generator)


def loss_of(out):
    return out.square().mean()


def trained_whole(world, name, steps=2, batches=2):
    """The parameters and the norm of the last gradient, in one process with the data of all ranks."""
    model = nn.Sequential(*copy.deepcopy(MODULES))
    trained = [p for p in model.parameters() if p.requires_grad]
    kind, options = OPTIMIZERS[name]
    groups = [{"params": [p for p in trained if p.ndim > 1]}]
    groups += [{"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = kind(groups, **options)
    for step in range(steps):
        optimizer.zero_grad()
        for batch in range(batches):
            for rank in range(world):
                (loss_of(model(ids_of(rank, batch + step))) / world).backward()
        norm = nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}, float(norm)


def make(ranks, name="sgd", **options):
    """A model on some ranks, and its optimizer."""
    states = tuple(STATE_NAMES[name].values())
    modules = copy.deepcopy(MODULES)
    model = MultiStageModel(modules, ranks=ranks, optimizer_state_names=states, **options)
    return model, ShardedOptimizer(model, name, **OPTIMIZERS[name][1])


def train(model, optimizer, ranks, steps=2, batches=2):
    """Steps on the data of one rank; the norm of the last gradient."""
    for step in range(steps):
        model.reset_gradients()
        for batch in range(batches):
            loss_of(model(ids_of(ranks.rank, batch + step))).backward()
        model.reduce_gradients()
        norm = optimizer.clip_gradients(MAX_NORM)
        optimizer.step()
    return norm


@pytest.mark.parametrize("buffers", [None, 1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_train_as_one_process_does(world, name, buffers):
    """With other data a rank, tied and frozen parameters, clipping, and poisoned buffers."""

    def program(ranks):
        model, optimizer = make(ranks, name, num_weight_buffers=buffers)
        model.fill_invalid_buffers(torch.nan)
        norm = train(model, optimizer, ranks)
        pads = [u.shards["weights"][u.layout.shard_size - u.shard_pad :] for u in model.units]
        assert not any(bool(pad.any()) for pad in pads)
        return dict(model.export_state()), norm

    expected, norm = trained_whole(world, name)
    for parameters, found in in_process(world, program):
        assert found == pytest.approx(norm, rel=1e-5)
        assert parameters.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(parameters[key], value, rtol=1e-4, atol=1e-6), key


def test_shards_are_views_of_one_allocation_in_the_order_of_their_names():
    """Weights, state of the optimizer, gradients; of frozen parameters weights only."""
    model, _ = make(None, "adamw")
    names = ("weights", "exp_avgs", "exp_avgs_sq", "grads")
    assert model.shard_names == names
    assert model.state_shard_names == names[:-1]
    shards = [model.get_shard(name) for name in names]
    starts = [shard.storage_offset() for shard in shards]
    assert starts == sorted(starts)
    assert len({shard.untyped_storage().data_ptr() for shard in shards}) == 1
    trained = sum(unit.layout.shard_size for unit in model.units if unit.trainable)
    frozen = sum(unit.layout.shard_size for unit in model.units if not unit.trainable)
    assert [len(shard) for shard in shards] == [trained + frozen, trained, trained, trained]
    assert all(len(shard) % 32 == 0 for shard in shards)
    assert [model.shard_length(name) for name in names] == [len(shard) for shard in shards]


def test_parameters_are_counted_once_and_frozen_ones_too():
    whole = nn.Sequential(*make_modules())
    count = sum(p.numel() for p in whole.parameters())
    for frozen in ((), ("1.0.bias",), ("0.0.weight", "1.2.weight")):
        model = MultiStageModel(make_modules(frozen=frozen))
        assert model.parameter_count == count
        assert model.tied == {"2.weight": "0.0.weight"}


def test_tied_parameters_are_one_object():
    model, _ = make(None)
    model.restore_parameters()
    assert model.parameter("2.weight") is model.parameter("0.0.weight")


def test_parameters_are_views_of_the_buffer_where_the_layout_says():
    model, _ = make(None)
    model.restore_parameters()
    for unit in model.units:
        for name, parameter in unit.parameters.items():
            offset = parameter.data_ptr() - unit.weight_buffer.data_ptr()
            assert offset == unit.layout.begin(name) * parameter.element_size()


def test_buffer_is_zero_before_the_first_restore():
    """A promise of this implementation: Fast-LLM leaves the memory as it is."""
    model = MultiStageModel(make_modules())
    assert not any(bool(unit.weight_buffer.any()) for unit in model.units)


@pytest.mark.parametrize("mode", list(StageMode))
def test_modes_have_the_shards_that_they_need(mode):
    has = {
        "training": ("weights", "momentum_buffers", "grads"),
        "inference": ("weights",),
        "weights": ("weights",),
        "off_device": (),
    }
    states = ("momentum_buffers",)
    model = MultiStageModel(make_modules(), mode=mode, optimizer_state_names=states)
    assert model.shard_names == has[mode]
    forward = mode in ("training", "inference")
    assert (mode.support_forward, mode.support_backward) == (forward, mode == "training")
    if forward:
        model.restore_parameters()
    else:
        with pytest.raises(RuntimeError, match=r"no parameters in mode|no weights"):
            model.restore_parameters()
    with pytest.raises(KeyError, match="Unknown shard name momentum"):
        model.get_shard("momentum")
    if mode != "training":
        with pytest.raises(KeyError, match="Unknown shard name grads"):
            model.get_shard(ShardName.grads)


def test_what_is_not_set_up_says_so():
    model = MultiStageModel(make_modules(), setup=False)
    assert model.shard_length("weights") % 32 == 0
    for use in (lambda: model.get_shard("weights"), lambda: model(ids_of(0, 0))):
        with pytest.raises(RuntimeError, match="not set up"):
            use()
    model.setup()
    with pytest.raises(RuntimeError, match="set up already"):
        model.setup()


def test_stages_that_share_a_buffer_cannot_all_be_restored():
    modules = make_modules(tied=False, frozen=())
    model = MultiStageModel(modules, num_weight_buffers=1)
    with pytest.raises(RuntimeError, match=r"stages \[0, 1\] share buffers"):
        model.restore_parameters()
    first, second = model._stages[:2]
    first.restore_parameters()
    view, begin = first.module[0].weight, first.units[0].layout.begin("0.0.weight")
    second.restore_parameters()
    assert not first.restored
    other = second.units[0].shards["weights"]  # lies where the first stage's view looks now
    assert torch.equal(view.flatten(), other[begin : begin + view.numel()])
    with pytest.raises(RuntimeError, match="stage 0 is not restored"):
        first.forward(ids_of(0, 0))


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_buffers_hold_rounded_shards(world):
    precision = Precision(compute_dtype=torch.bfloat16)

    def program(ranks):
        model, _ = make(ranks, precision=precision)
        model.restore_parameters()
        exported = dict(model.export_state())
        for name, value in exported.items():
            assert value.dtype == torch.float32
            assert torch.equal(model.parameter(name), value.to(torch.bfloat16))
        loss_of(model(ids_of(ranks.rank, 0)).float()).backward()
        model.reduce_gradients()
        return {unit.grad_buffer.dtype for unit in model.units if unit.trainable}

    assert in_process(world, program) == [{torch.float32}] * world


def test_shards_of_two_dtypes_are_refused():
    precision = Precision(
        compute_dtype=torch.bfloat16, store_frozen_weights_in_optimization_precision=False
    )
    with pytest.raises(ValueError, match=r"one dtype, found torch\.bfloat16, torch\.float32"):
        MultiStageModel(make_modules(), precision=precision)


def test_a_value_beyond_the_buffers_dtype_shows_as_infinity():
    model = MultiStageModel([nn.Linear(3, 2)], precision=Precision(compute_dtype=torch.float16))
    model.import_state({"0.weight": torch.full((2, 3), 1e6), "0.bias": torch.zeros(2)})
    model.restore_parameters()
    assert bool(model.parameter("0.weight").isinf().all())


def test_gradient_that_never_came_is_named_on_every_rank():
    def program(ranks):
        module = nn.Linear(3, 2)
        module.unused = nn.Parameter(torch.ones(2))
        model = MultiStageModel([module], ranks=ranks)
        model(torch.ones(1, 3)).sum().backward()
        try:
            model.reduce_gradients()
        except RuntimeError as error:
            return str(error)

    for error in in_process(2, program):
        assert "0.unused has no gradient" in error


def test_gradients_of_another_step_are_not_added():
    """The flag decides, not the buffer: what is in it from before is replaced."""
    model = MultiStageModel([nn.Linear(3, 2)])
    for _ in range(2):
        model.reset_gradients()
        model(torch.ones(1, 3)).sum().backward()
        model.units[0].grad_buffer[8:] = torch.nan  # padding is nobody's
        model.reduce_gradients()
        assert dict(model.export_state("grads"))["0.weight"].eq(1).all()
        assert not bool(model.get_shard("grads")[8:].any())


# Tensor-parallel slices


class Column(nn.Module):
    """A tensor-parallel rank's rows of a weight, and a norm that all of them hold."""

    def __init__(self, weight, ranks, sequence_parallel=False):
        super().__init__()
        self.weight = nn.Parameter(weight.chunk(ranks.size, 0)[ranks.rank].clone())
        self.weight.tensor_parallel_dim = 0
        self.scale = nn.Parameter(torch.arange(1.0, 7.0))
        self.scale.sequence_parallel = sequence_parallel

    def forward(self, x):
        return (x * self.scale) @ self.weight.T


@pytest.mark.parametrize(("world", "tensor"), [(2, 2), (4, 2), (4, 4), (3, 3), (6, 3)])
def test_slices_of_tensor_parallel_ranks_make_the_whole(world, tensor):
    weight = torch.arange(12 * 6.0).view(12, 6)

    def program(everyone):
        group = everyone.split(tensor)
        data = Across(everyone, tensor)
        model = MultiStageModel([Column(weight, group)], ranks=data, tensor=group)
        exported = dict(model.export_state())
        assert torch.equal(exported["0.weight"], weight)
        assert torch.equal(exported["0.scale"], torch.arange(1.0, 7.0))
        model.import_state({name: 2 * value for name, value in exported.items()})
        model.restore_parameters()
        assert torch.equal(model.parameter("0.weight"), 2 * weight.chunk(tensor)[group.rank])
        return model.get_shard("weights").numel()

    assert len(set(in_process(world, program))) == 1


class Across:
    """The data-parallel ranks among those of a world whose neighbours are tensor-parallel groups."""

    def __init__(self, world, tensor):
        self.world, self.tensor = world, tensor
        self.rank, self.size = world.rank // tensor, world.size // tensor

    def _mine(self, things):
        return things[self.world.rank % self.tensor :: self.tensor]

    def exchange(self, thing):
        return self._mine(self.world.exchange(thing))

    def gather(self, x):
        return self._mine(self.world.gather(x))

    def gather_into(self, whole, part):
        whole.copy_(torch.cat(self.gather(part)))

    def all_reduce(self, x):
        return torch.stack(self.gather(x)).sum(0)


def test_norm_of_gradients_counts_what_all_hold_once():
    weight = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

    def program(group):
        module = Column(weight, group, sequence_parallel=True)
        names = tuple(STATE_NAMES["sgd"].values())
        model = MultiStageModel([module], tensor=group, optimizer_state_names=names)
        optimizer = ShardedOptimizer(model, "sgd", lr=0.1)
        model(x).square().sum().backward()
        model.reduce_gradients()
        gradients = dict(model.export_state("grads"))
        return gradients, optimizer.clip_gradients(1e9)

    for gradients, norm in in_process(2, program):
        squares = sum(float(g.double().square().sum()) for g in gradients.values())
        assert norm == pytest.approx(squares**0.5, rel=1e-6)
        # Each rank saw its part of the output: the gradient is the sum of theirs.
        scale = torch.arange(1.0, 7.0).requires_grad_()
        ((x * scale) @ weight.T).square().sum().backward()
        assert torch.allclose(gradients["0.scale"], scale.grad, rtol=1e-4)


# Units


def test_a_unit_takes_what_fits_and_nothing_else():
    layout = FlatLayout((ParameterMeta("w", (4, 10)), ParameterMeta("b", (3,))), 2)
    unit = FlatUnit("unit", layout, trainable=False)
    with pytest.raises(ValueError, match=r"shape \[31\].*expected \[32\]"):
        unit.setup(StageMode.inference, {"weights": torch.zeros(31)})
    with pytest.raises(ValueError, match="no buffers in mode weights"):
        unit.setup(StageMode.weights, {"weights": torch.zeros(32)}, torch.zeros(64))
    with pytest.raises(RuntimeError, match="not set up"):
        unit.restore_parameters()
    assert unit.shard_length("grads") == 0
    assert unit.get_parameter_size_in_shard("w", "grads") == 0
    assert unit.get_parameter_size_in_shard("w") == 32
    assert unit.reset_shard_pad(torch.zeros(0), "grads") == 0


def test_import_refuses_a_shape_of_as_many_elements():
    unit = FlatUnit("unit", FlatLayout((ParameterMeta("w", (4, 10)),)), trainable=True)
    shard = torch.zeros(64)
    with pytest.raises(ValueError, match=r"w has shape \[10, 4\], expected \[4, 10\]"):
        unit.import_state_tensor("w", shard, torch.ones(10, 4))
    assert not bool(shard.any())
    assert unit.import_state_tensor("w", shard, torch.ones(4, 10)) == 40
    assert unit.reset_shard_pad(shard.fill_(5.0), "weights") == 24
    assert shard.tolist() == [5.0] * 40 + [0.0] * 24


def test_a_rank_that_fails_ends_the_others():
    def program(ranks):
        if ranks.rank == 1:
            raise ValueError("broken")
        return dict(make(ranks)[0].export_state())

    with pytest.raises(RankFailed, match="rank 1 of 3: broken"):
        in_process(3, program)


# The page


@pytest.mark.parametrize("number", [0, 1])
def test_examples_of_the_page_run(number):
    page = (ROOT / "docs/flat_shards.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    exec(compile(examples[number], "docs/flat_shards.md", "exec"), {})
