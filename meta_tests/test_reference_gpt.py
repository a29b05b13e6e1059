"""The reference GPT is held against the original programs, against numpy, and against its files."""

import math
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import ROOT
from safetensors.torch import load_file, save_file

from meta_tests import gpt_goldens, numpy_gpt
from reference_impl.gpt import (
    CheckpointError,
    CheckpointReader,
    GPTConfig,
    inspect_checkpoint,
    layers,
    load_pretrained_checkpoint,
    masks,
    save_checkpoint,
)
from reference_impl.gpt.config import (
    next_multiple,
    parameter_count,
    scalars_padding,
    state_shapes,
)
from reference_impl.gpt.files import open_checkpoint
from reference_impl.gpt.training import TRAINED

F64 = torch.float64
EXACT = 1e-12
"""Largest error over largest value where both sides compute in float64."""
FLOAT32 = 1e-4

FORMATS = ["small", "medium"]
both_formats = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(autouse=True)
def one_thread_and_no_gradients():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


# Checkpoints drawn at random: nothing in them is zero, symmetric, or twice the same


def drawn(format, num_layers=12, *, heads=2, head_dim=8, vocab=40, world=8, seed=0, dtype=F64):
    """A state dictionary; every scalar differs, and padding is ones."""
    numbers = np.random.default_rng(seed)
    width = heads * head_dim
    state = {}
    for key, shape in gpt_goldens.shapes(format, num_layers, width, vocab, world).items():
        if key == "scalars":
            values = numbers.uniform(0.3, 1.7, size=shape)
            values[5 * num_layers :] = 1
        else:
            scale = 1.0 if "embed" in key else 4.0 if key.startswith("lm_head") else 0.7
            rows = 1 if "embed" in key or key.startswith("lm_head") else math.sqrt(shape[-1])
            values = numbers.normal(size=shape) * scale / rows
        state[key] = torch.from_numpy(values).to(dtype)
    return state


def changed(state, edit):
    """A copy of a state dictionary after ``edit(copy)``."""
    copy = {key: tensor.clone() for key, tensor in state.items()}
    edit(copy)
    return copy


def drawn_ids(*shape, vocab=40, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, size=shape))


def loaded(source, *, head_dim=8, **options):
    bare = isinstance(source, dict) and "model" not in source
    source = {"model": source} if bare else source
    return load_pretrained_checkpoint(source, head_dim=head_dim, **options)[0]


def outputs(state, ids, **masks):
    """Features and logits of a checkpoint."""
    model = loaded(state)
    return torch.cat([model.features(ids, **masks), model.logits(ids, **masks)], dim=-1)


def in_numpy(state, ids, *, head_dim=8, valid=None, **options):
    """The same in numpy, row by row."""
    arrays = {key: tensor.double().numpy() for key, tensor in state.items()}
    rows = [
        np.concatenate(
            numpy_gpt.forward(
                arrays,
                row.numpy(),
                format=format_of(state),
                head_dim=head_dim,
                valid=None if valid is None else valid[i].tolist(),
                **options,
            ),
            axis=-1,
        )
        for i, row in enumerate(ids)
    ]
    return torch.from_numpy(np.stack(rows))


def format_of(state):
    return "medium" if "lm_head_w" in state else "small"


def error(found, expected):
    """Largest error over largest value."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def same(found, expected, bound=EXACT):
    assert error(found, expected) <= bound


def differ(found, expected):
    """By more than any rounding."""
    assert error(found, expected) > 1e-4


def layer_key(format, layer, part):
    """The name of one of a block's weights."""
    names = {
        "small": {
            "qkv": "attn.qkv_w",
            "o": "attn.c_proj.weight",
            "fc": "mlp.c_fc.weight",
            "proj": "mlp.c_proj.weight",
        },
        "medium": {"qkv": "attn.qkvo_w", "fc": "mlp.fc_w", "proj": "mlp.proj_w"},
    }
    return f"blocks.{layer}.{names[format][part]}"


# Goldens: the original programs' outputs, and the project's own


ORIGINAL = ROOT.parent / "shared" / "goldens" / "gpt"
OWN = sorted(gpt_goldens.FOLDER.glob("*.json"))
FAR = 10**6


def golden_inputs(golden):
    """The state dictionary, the ids, and the masks of a golden."""
    state = {key: torch.from_numpy(array) for key, array in gpt_goldens.weights(golden).items()}
    masks = {"document_start": golden["eos"], "window_blocks": golden["window_blocks"]}
    return state, torch.tensor(golden["input_ids"]), masks


def assert_golden(path, run):
    """``run(golden, state, ids, masks)`` gives features, logits and loss of the golden."""
    golden, stored = gpt_goldens.read(path)
    features, logits, loss = run(golden, *golden_inputs(golden))
    assert features.dtype == torch.float32
    same(features[golden["feature_positions"]], stored["features"], FLOAT32)
    same(logits[golden["logit_positions"]], stored["logits"], FLOAT32)
    assert float(loss) == pytest.approx(golden["loss"], rel=1e-5)


def as_trained(golden, state, ids, masks):
    """The training form; without a window every block is near enough, and no document starts."""
    config = GPTConfig(
        golden["format"],
        golden["num_layers"],
        golden["num_heads"],
        golden["model_dim"] // golden["num_heads"],
        *(len(state[key]) for key in ("embed.weight", head_of(golden["format"]), "scalars")),
    )
    if masks["window_blocks"] is None:
        masks = {"document_start": -1, "window_blocks": FAR}
    model = TRAINED[golden["format"]](config).load(state)
    features, logits = model(ids, **masks)
    return features, logits, model.loss(ids, ids.roll(-1), **masks)


def head_of(format):
    return "lm_head.weight" if format == "small" else "lm_head_w"


def as_loaded_from(folder):
    """A checkpoint file of the golden, loaded into the batched model."""

    def run(golden, state, ids, masks):
        path = folder / "state_step000001.pt"
        torch.save({"step": 1, "model": {f"_orig_mod.{k}": v for k, v in state.items()}}, path)
        head_dim = golden["model_dim"] // golden["num_heads"]
        with_default = head_dim == 128
        model, info, _ = load_pretrained_checkpoint(
            path, head_dim=None if with_default else head_dim
        )
        assert info["checkpoint_format"] == golden["format"]
        assert info["num_heads"] == golden["num_heads"]
        features, logits = (
            model.features(ids[None], **masks)[0],
            model.logits(ids[None], **masks)[0],
        )
        return features, logits, F.cross_entropy(logits, ids.roll(-1))

    return run


def original(name):
    path = ORIGINAL / f"{name}.json"
    if not path.exists():
        pytest.skip("the outputs of the original programs are not at hand")
    return path


padded_at_random = pytest.mark.filterwarnings("ignore:.*padding are not all 1")
ORIGINAL_CASES = [
    "small-world1",
    "small-world8-window3",
    "medium-world1",
    "medium-vocab512-window4",
]


@pytest.mark.parametrize("name", ORIGINAL_CASES)
def test_training_form_is_the_original_program(name):
    assert_golden(original(name), as_trained)


@padded_at_random
@pytest.mark.parametrize("name", ORIGINAL_CASES)
def test_batched_model_of_a_file_is_the_original_program(name, tmp_path):
    assert_golden(original(name), as_loaded_from(tmp_path))


@pytest.mark.parametrize("name", ORIGINAL_CASES)
def test_numpy_is_the_original_program(name):
    golden, stored = gpt_goldens.read(original(name))
    features, logits = gpt_goldens.computed(golden)
    same(features, stored["features"], FLOAT32)
    same(logits[golden["logit_positions"]], stored["logits"], FLOAT32)
    loss = numpy_gpt.mean_loss(logits, np.roll(golden["input_ids"], -1))
    assert loss == pytest.approx(golden["loss"], rel=1e-5)


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
def test_training_form_gives_the_goldens(path):
    assert_golden(path, as_trained)


@padded_at_random
@pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
def test_batched_model_of_a_file_gives_the_goldens(path, tmp_path):
    assert_golden(path, as_loaded_from(tmp_path))


def test_goldens_on_file_are_those_of_the_cases():
    assert {path.stem for path in OWN} == {case.name for case in gpt_goldens.CASES}
    assert sum(file.stat().st_size for file in gpt_goldens.FOLDER.iterdir()) < 300_000


@pytest.mark.parametrize("case", gpt_goldens.CASES, ids=lambda case: case.name)
def test_generating_the_goldens_again_gives_the_stored_ones(case):
    golden, arrays = gpt_goldens.generate(case)
    on_file, stored = gpt_goldens.read(gpt_goldens.FOLDER / f"{case.name}.json")
    assert golden.pop("loss") == pytest.approx(on_file.pop("loss"), rel=1e-12)
    assert golden == on_file
    assert arrays.keys() == stored.keys()
    for name, array in arrays.items():
        same(array, stored[name])


def test_weights_of_goldens_by_hand():
    # Python's integers, for one element.
    x = (5 + 1) * 0x9E3779B97F4A7C15 + zlib.crc32(b"lm_head_w") * 0xBF58476D1CE4E5B9
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    u = ((x ^ x >> 31) >> 40) / 2**24
    assert gpt_goldens.entry("lm_head_w", [2, 4])[1, 1] == np.float32((2 * u - 1) * 0.5)
    scalars = gpt_goldens.entry("scalars", [1000])
    assert 0.5 <= scalars.min() < 0.51
    assert 1.09 < scalars.max() <= 1.1


# numpy: random checkpoints in float64


DEPTHS = [("small", 6), ("small", 8), ("small", 12), ("medium", 8), ("medium", 16), ("medium", 24)]
every_depth = pytest.mark.parametrize(("format", "num_layers"), DEPTHS)


@every_depth
def test_every_depth_is_that_of_numpy(format, num_layers):
    state, ids = drawn(format, num_layers, seed=num_layers), drawn_ids(2, 23)
    same(outputs(state, ids), in_numpy(state, ids))


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 4), (1, 16), (3, 8), (4, 12), (1, 128)])
@both_formats
def test_every_number_and_width_of_heads_is_that_of_numpy(format, heads, head_dim):
    state = drawn(format, heads=heads, head_dim=head_dim, seed=heads)
    ids = drawn_ids(1, 19)
    model = loaded(state, head_dim=head_dim)
    expected = in_numpy(state, ids, head_dim=head_dim)
    same(torch.cat([model.features(ids), model.logits(ids)], -1), expected)


@every_depth
def test_training_form_is_numpy(format, num_layers):
    state, ids = drawn(format, num_layers, seed=num_layers), drawn_ids(130)
    ids[[40, 41, 100]] = 7
    model = TRAINED[format](CheckpointReader(state, head_dim=8).config()).load(state, F64)
    window = {"document_start": 7, "window_blocks": 3}
    expected = in_numpy(state, ids[None], **window)[0]
    same(torch.cat(model(ids, **window), -1), expected)


PADDINGS = {
    "left": torch.arange(21) >= torch.tensor([[4], [0], [20]]),
    "right": torch.arange(21) < torch.tensor([[4], [21], [1]]),
    "holes": torch.stack([torch.arange(21) % 3 != 1, torch.arange(21) > 0, torch.arange(21) < 9]),
}


@pytest.mark.parametrize("padding", PADDINGS)
@both_formats
def test_padding_is_that_of_numpy(format, padding):
    state, ids, valid = drawn(format), drawn_ids(3, 21), PADDINGS[padding]
    found, expected = outputs(state, ids, valid=valid), in_numpy(state, ids, valid=valid)
    same(found[valid], expected[valid])
    assert torch.isfinite(found).all()


@both_formats
def test_documents_are_those_of_numpy(format):
    state, ids = drawn(format), drawn_ids(3, 30, vocab=8)
    assert (ids == 3).sum(-1).tolist() == [1, 6, 5]
    same(outputs(state, ids, document_start=3), in_numpy(state, ids, document_start=3))
    valid = torch.arange(30) < torch.tensor([[30], [12], [25]])
    both = {"document_start": 3, "valid": valid}
    same(outputs(state, ids, **both)[valid], in_numpy(state, ids, **both)[valid])


@pytest.mark.parametrize(("window", "length"), [(1, 300), (2, 384), (3, 512)])
@pytest.mark.parametrize(("format", "num_layers"), [("small", 12), ("medium", 16), ("medium", 24)])
def test_windows_are_those_of_numpy(format, num_layers, window, length):
    state = drawn(format, num_layers, heads=1, vocab=9)
    ids = drawn_ids(1, length, vocab=8)
    ids[0, [5, 150]] = 8
    masks = {"document_start": 8, "window_blocks": window}
    same(outputs(state, ids, **masks), in_numpy(state, ids, **masks))


def window_cases():
    """Many layouts of documents over five blocks, the last of which is not whole."""
    numbers = np.random.default_rng(11)
    for case in range(24):
        ids = np.zeros(640 - case % 3 * 50, dtype=np.int64)
        starts = numbers.integers(0, len(ids), size=case % 6)
        ids[starts - starts % (128 if case % 4 == 3 else 1)] = 1
        yield ids, 1 + case % 5


def test_window_masks_are_the_rule_block_by_block():
    for ids, window in window_cases():
        found = masks.window_mask(torch.from_numpy(ids), 1, window).numpy()
        documents = np.cumsum(ids == 1)
        expected = (documents[:, None] == documents) & np.tri(len(ids), dtype=bool)
        for block in range(0, len(ids), 128):
            seen = numpy_gpt.blocks_seen(documents.tolist(), block // 128, window)
            hidden = [key // 128 not in seen for key in range(len(ids))]
            expected[block : block + 128, hidden] = False
        assert (found == expected).all()


def test_window_by_hand():
    """Four blocks of one document, then a document that starts in the third block."""
    of_blocks = lambda mask: mask.view(4, 128, 4, 128).any(3).any(1).int().tolist()
    one = torch.zeros(512, dtype=torch.int64)
    assert of_blocks(masks.window_mask(one, 1, 2)) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    assert of_blocks(masks.window_mask(one, 1, 1)) == torch.eye(4).int().tolist()
    two = one.clone()
    two[300] = 1  # the third block is of two documents: partial for itself and for the fourth
    assert of_blocks(masks.window_mask(two, 1, 3)) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    assert of_blocks(masks.window_mask(two, 1, 1))[2:] == [[0, 0, 1, 0], [0, 0, 0, 1]]


def test_long_windows_are_in_the_layers_of_the_scripts():
    long = lambda format, count: [i for i in range(count) if masks.has_long_window(i, format)]
    assert long("small", 12) == [0, 4, 7, 11]
    assert long("medium", 16) == [0, 4, 11, 15]
    assert long("medium", 24) == [0, 4, 11, 15, 16, 20]


@both_formats
def test_low_precision_is_near(format):
    """bfloat16 and float32, from the stored float32 values."""
    state, ids = drawn(format, dtype=torch.float32), drawn_ids(2, 17)
    expected = in_numpy(state, ids)
    for dtype, bound in ((F64, EXACT), (torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        model = loaded(state, dtype=dtype)
        features, logits = model.features(ids), model.logits(ids)
        assert features.dtype == dtype
        assert logits.dtype == (F64 if dtype == F64 else torch.float32)
        rounded = expected
        if dtype == torch.bfloat16:
            rounded = in_numpy({k: v.to(dtype) for k, v in state.items()}, ids)
        same(torch.cat([features.double(), logits.double()], -1), rounded, bound)


# The invariants of the two models


@both_formats
def test_state_is_that_of_the_checkpoint_bit_for_bit(format):
    state = as_stored(drawn(format))
    model = loaded(state)
    assert_same_state(model.state(), state)


def as_stored(state):
    """In the dtypes that the scripts train in: bfloat16 embeddings, and matrices in the medium."""
    medium = format_of(state) == "medium"
    rounded = lambda key: "embed" in key or (medium and key.startswith("blocks."))
    return {k: v.to(torch.bfloat16 if rounded(k) else torch.float32) for k, v in state.items()}


def assert_same_state(found, expected):
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        assert torch.equal(bits(found[key]), bits(tensor)), key


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@both_formats
def test_batched_model_computes_what_was_trained(format):
    state, ids = drawn(format, 16), drawn_ids(4, 37)
    model = TRAINED[format](CheckpointReader(state, head_dim=8).config()).load(state, F64)
    trained = [torch.cat(model(row, document_start=-1, window_blocks=FAR), -1) for row in ids]
    same(outputs(state, ids), torch.stack(trained))


def test_output_projection_is_not_transposed():
    state, ids = drawn("small"), drawn_ids(1, 9)
    model = loaded(state)
    for layer in (0, 5, 11):
        assert torch.equal(model.blocks[layer].o_w, state[layer_key("small", layer, "o")])

    def transpose(copy):
        copy[layer_key("small", 5, "o")] = copy[layer_key("small", 5, "o")].T

    differ(outputs(changed(state, transpose), ids), outputs(state, ids))


@both_formats
def test_rows_of_a_batch_are_computed_alone(format):
    state, ids = drawn(format), drawn_ids(3, 13)
    together = outputs(state, ids)
    for row in range(3):
        same(together[row : row + 1], outputs(state, ids[row : row + 1]))


@both_formats
def test_a_token_changes_nothing_before_it(format):
    state, ids = drawn(format), drawn_ids(1, 16)
    other = ids.clone()
    other[0, 9] = (ids[0, 9] + 1) % 40
    found, before = outputs(state, other), outputs(state, ids)
    assert torch.equal(found[:, :9], before[:, :9])
    for token in range(9, 16):
        differ(found[:, token], before[:, token])


@both_formats
def test_a_longer_call_leaves_no_trace(format):
    model, ids = loaded(drawn(format)), drawn_ids(2, 30)
    first = model.logits(ids[:, :5])
    model.logits(ids, valid=torch.arange(30).expand(2, -1) > 3)
    assert torch.equal(model.logits(ids[:, :5]), first)


def influence(format, index, num_layers=None, by=0.37, **drawing):
    """How far the outputs move when one scalar does, over their largest value."""
    state = drawn(format, num_layers or numpy_gpt.LAYERS[format], **drawing)
    ids = drawn_ids(1, 9)

    def edit(copy):
        copy["scalars"][index] += by

    return error(outputs(changed(state, edit), ids), outputs(state, ids))


@both_formats
def test_eighth_block_has_lambdas_but_no_attention(format):
    L = numpy_gpt.LAYERS[format]
    assert influence(format, 3 * L + 2 * 7) == 0
    assert influence(format, 3 * L + 2 * 7 + 1) == 0
    assert influence(format, L + 2 * 7) > 1e-4
    assert influence(format, L + 2 * 7 + 1) > 1e-4


@pytest.mark.parametrize(
    ("format", "num_layers", "used"),
    [
        ("small", 12, range(6)),
        ("small", 8, range(4)),
        ("medium", 16, (2, 4, 6)),
        ("medium", 8, ()),
        ("medium", 10, (6,)),
    ],
)
def test_skip_weights_that_have_influence(format, num_layers, used):
    for index in range(num_layers):
        moved = influence(format, index, num_layers)
        assert (moved > 1e-4) if index in used else (moved == 0), index


@both_formats
def test_every_lambda_has_influence_where_it_is_used(format):
    L = numpy_gpt.LAYERS[format]
    for layer in (0, 2, 3, L - 4, L - 3, L - 1):
        with_table = layer < 3 or layer >= L - 3
        assert influence(format, 3 * L + 2 * layer) > 1e-5
        second = influence(format, 3 * L + 2 * layer + 1)
        assert (second > 1e-5) if with_table else (second == 0), layer


@pytest.mark.parametrize("index", [60, 61, 63])
def test_padding_of_scalars_has_no_influence(index):
    with pytest.warns(UserWarning, match="padding are not all 1"):
        assert influence("small", index) == 0


def test_scalars_of_every_number_of_ranks_give_the_same_model():
    ids = drawn_ids(1, 9)
    ranks = {world: drawn("small", world=world) for world in (1, 7, 8, 16)}
    assert {len(state["scalars"]) for state in ranks.values()} == {60, 63, 64}
    first = outputs(ranks[1], ids)
    for state in ranks.values():
        state["scalars"] = torch.cat([ranks[1]["scalars"], state["scalars"][60:]])
        assert torch.equal(outputs(state, ids), first)


@both_formats
def test_every_tensor_has_influence(format):
    state, ids = drawn(format, 8), torch.arange(40)[None]
    before = outputs(state, ids)
    for key in state:
        if key == "scalars":
            continue
        edit = lambda copy, key=key: copy[key].mul_(1 + 0.3 * torch.rand_like(copy[key]))
        assert error(outputs(changed(state, edit), ids), before) > 1e-5, key


def test_first_position_is_not_turned_and_lengths_are_kept():
    x = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = layers.rotate(x)
    assert torch.equal(found[:, :, 0], x[:, :, 0])
    still = [4, 5, 6, 7, 12, 13, 14, 15]
    assert torch.equal(found[..., still], x[..., still])
    lengths = lambda y: y[..., :8].square() + y[..., 8:].square()
    same(lengths(found), lengths(x))


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    turned_q, turned_k = (layers.rotate(x.expand(1, 1, 60, 16))[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in (0, 1, 7, 40):
        along = scores.diagonal(-distance)
        same(along, along[:1].expand_as(along))
    assert len({round(float(s), 6) for s in scores[:, 0]}) == 60


def test_rotation_is_the_one_of_numpy():
    x = np.random.default_rng(3).normal(size=(300, 24))
    found = layers.rotate(torch.from_numpy(x)[None, None])[0, 0]
    same(found, numpy_gpt.turned(x))


def test_norm_is_that_of_torch_with_the_epsilon_of_the_dtype():
    for dtype in (F64, torch.float32):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
        for scale in (1, 1e-3 if dtype == torch.float32 else 1e-8):
            same(layers.norm(x * scale), F.rms_norm(x * scale, (8,)), 1e-6)


def test_soft_caps():
    z = torch.linspace(-400, 400, 2001, dtype=F64)
    small, medium = layers.soft_cap(z, "small", 16), layers.soft_cap(z, "medium", 16)
    for capped in (small, medium):
        assert (capped.diff() > 0).all()
    assert 0 < small.min() < small.max() < 30
    assert float(layers.soft_cap(torch.tensor(0.0), "small", 16)) == 15
    assert medium.abs().max() < 15
    same(medium, -medium.flip(0))
    same(small, 15 * torch.tanh(z / (15 * 4)) + 15)
    assert float(layers.soft_cap(torch.tensor(20.0), "medium", 16)) == pytest.approx(12)
    three = layers.soft_cap(torch.tensor(30 * math.log(3)), "small", 16)
    assert float(three) == pytest.approx(30 * 3 / 4)


@both_formats
def test_logits_are_capped_products_with_the_features(format):
    state, ids = drawn(format), drawn_ids(1, 9)
    model = loaded(state)
    z = model.features(ids) @ state[head_of(format)].T
    same(model.logits(ids), layers.soft_cap(z, format, 16))


@pytest.mark.parametrize(
    ("format", "part", "normed"),
    [
        ("small", 0, True),
        ("small", 1, True),
        ("small", 2, False),
        ("medium", 0, True),
        ("medium", 1, True),
        ("medium", 2, True),
        ("medium", 3, False),
    ],
)
def test_scale_of_a_head_is_normed_away(format, part, normed):
    """Of queries and keys in both; of values in the medium model alone."""
    state, ids = drawn(format), drawn_ids(1, 9)

    def edit(copy):
        copy[layer_key(format, 3, "qkv")][part, 8:16] *= 3

    found, before = outputs(changed(state, edit), ids), outputs(state, ids)
    if normed:
        same(found, before)
    else:
        differ(found, before)


def with_lambdas(format, first, second):
    def edit(copy):
        L = numpy_gpt.LAYERS[format]
        copy["scalars"][3 * L : 5 * L : 2] = first
        copy["scalars"][3 * L + 1 : 5 * L : 2] = second

    return changed(drawn(format, numpy_gpt.LAYERS[format]), edit)


@both_formats
def test_attention_lambdas_choose_between_values_and_value_embeddings(format):
    ids, L = drawn_ids(1, 9), numpy_gpt.LAYERS[format]
    tables = lambda copy: [copy[f"value_embeds.{i}.weight"].neg_() for i in range(3)]
    values = lambda copy: [
        copy[layer_key(format, i, "qkv")][2].copy_(torch.randn(16, 16))
        for i in (0, 1, 2, L - 3, L - 2, L - 1)
    ]
    for lambdas, edit, irrelevant in (
        ((1, 0), tables, True),
        ((1, 0), values, False),
        ((0, 1), values, True),
        ((0, 1), tables, False),
    ):
        state = with_lambdas(format, *lambdas)
        check = same if irrelevant else differ
        check(outputs(changed(state, edit), ids), outputs(state, ids))


@both_formats
def test_value_embeddings_serve_the_first_and_last_three_blocks_in_order(format):
    """With one table and one block's lambda alone, the others have no say."""
    L = numpy_gpt.LAYERS[format]
    ids = drawn_ids(1, 9)
    for layer, table in zip((0, 1, 2, L - 3, L - 2, L - 1), (0, 1, 2, 0, 1, 2)):

        def alone(copy, layer=layer):
            copy["scalars"][3 * L + 1 : 5 * L : 2] = 0
            copy["scalars"][3 * L + 2 * layer + 1] = 1

        state = changed(drawn(format, L), alone)
        before = outputs(state, ids)
        for other in range(3):
            edit = lambda copy, other=other: copy[f"value_embeds.{other}.weight"].neg_()
            moved = error(outputs(changed(state, edit), ids), before)
            assert (moved > 1e-6) if other == table else (moved == 0), (layer, other)


@both_formats
def test_ids_need_an_embedding_and_logits_have_a_row_of_the_head_each(format):
    model = loaded(drawn(format, vocab=40))
    assert model.logits(torch.tensor([[39, 0]])).shape == (1, 2, 128)
    for wrong in (40, 127, -1):
        with pytest.raises(ValueError, match=f"token id {wrong} has no embedding"):
            model.logits(torch.tensor([[0, wrong]]))


@pytest.mark.parametrize("shape", [(0,), (4,), (2, 0), (0, 3), (1, 2, 3)])
def test_ids_are_a_batch_of_sequences(shape):
    with pytest.raises(ValueError, match="ids have shape"):
        loaded(drawn("small")).logits(torch.zeros(shape, dtype=torch.int64))


def test_masks_that_do_not_fit_are_named():
    model, ids = loaded(drawn("small")), drawn_ids(2, 5)
    for valid in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5)):
        with pytest.raises(ValueError, match="valid is"):
            model.logits(ids, valid=valid)
    with pytest.raises(ValueError, match="window_blocks needs document_start"):
        model.logits(ids, window_blocks=2)


@both_formats
def test_a_document_does_not_see_the_one_before_it(format):
    state, ids = drawn(format), drawn_ids(1, 50, vocab=38)
    ids[0, [20, 35]] = 39
    found = outputs(state, ids, document_start=39)
    for part in (slice(0, 20), slice(20, 35), slice(35, 50)):
        same(found[:, part], outputs(state, ids[:, part]))
    differ(found[:, 20:], outputs(state, ids)[:, 20:])


@both_formats
def test_a_window_that_does_not_bind_is_no_window(format):
    state, ids = drawn(format, heads=1), drawn_ids(1, 300)
    ids[0, 140] = 39
    wide = outputs(state, ids, document_start=39, window_blocks=FAR)
    same(wide, outputs(state, ids, document_start=39))


@both_formats
def test_padding_is_as_if_it_were_not_there(format):
    state, ids = drawn(format), drawn_ids(1, 20)
    expected = outputs(state, ids)
    for left, right in ((3, 0), (0, 4), (2, 2)):
        padded = torch.cat([drawn_ids(1, left, seed=5), ids, drawn_ids(1, right, seed=6)], 1)
        at = torch.arange(padded.shape[1])[None]
        found = outputs(state, padded, valid=(at >= left) & (at < left + 20))
        same(found[:, left : left + 20], expected)


@both_formats
def test_gradients_are_finite_beside_padding(format):
    model, ids = loaded(drawn(format)), drawn_ids(2, 9)
    valid = torch.arange(9) >= torch.tensor([[4], [0]])
    with torch.enable_grad():
        model.logits(ids, valid=valid)[valid].sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert bool(parameter.grad.any()), name


# Sizes


SMALL = GPTConfig("small", 12, 6, 128, 50304, 50304, 64)
MEDIUM = GPTConfig("medium", 16, 8, 128, 50257, 50304, 80)


@pytest.mark.parametrize(("config", "count"), [(SMALL, 275_742_784), (MEDIUM, 454_496_336)])
def test_parameters_are_counted(config, count):
    assert parameter_count(config) == count
    assert sum(math.prod(shape) for shape in state_shapes(config).values()) == count
    d, L, attention = config.model_dim, config.num_layers, config.num_layers - 1
    formula = 4 * config.vocab_size * d + attention * 4 * d * d + L * 8 * d * d
    assert formula + config.padded_vocab_size * d + config.scalars_size == count


@both_formats
def test_shapes_are_those_of_the_specification(format):
    for num_layers, heads, vocab, world in ((12, 6, 50304, 8), (16, 8, 50257, 3), (6, 1, 9, 7)):
        padding = -5 * num_layers % world if format == "small" else 0
        rows = -(-vocab // 128) * 128
        config = GPTConfig(format, num_layers, heads, 16, vocab, rows, 5 * num_layers + padding)
        found = {key: list(shape) for key, shape in state_shapes(config).items()}
        assert found == gpt_goldens.shapes(format, num_layers, heads * 16, vocab, world)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(50257, 50304), (50000, 50048), (50048, 50048), (128, 128), (0, 128), (128.5, 256), (1, 128)],
)
def test_next_multiple(value, expected):
    assert next_multiple(value, 128) == expected


@pytest.mark.parametrize(
    ("num_layers", "sizes"),
    [
        (12, {**dict.fromkeys(range(1, 7), 60), 7: 63, 8: 64, 16: 64}),
        (16, {1: 80, 2: 80, 3: 81, 4: 80, 5: 80, 6: 84, 7: 84, 8: 80}),
    ],
)
def test_padding_of_scalars_follows_the_number_of_ranks(num_layers, sizes):
    for world, size in sizes.items():
        assert 5 * num_layers + scalars_padding(num_layers, world) == size


# What a checkpoint holds


def hollow(format, num_layers, width, vocab, world=1):
    """A checkpoint of these shapes in which every tensor is one number."""
    shapes = gpt_goldens.shapes(format, num_layers, width, vocab, world)
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


KNOWN = [
    # format, layers, width, vocabulary, ranks; heads, head width, rows of the head, padding
    ("small", 12, 768, 50304, 8, 6, 128, 50304, 4),
    ("small", 12, 768, 50048, 7, 6, 128, 50048, 3),
    ("small", 12, 768, 50048, 1, 6, 128, 50048, 0),
    ("small", 16, 1024, 50304, 3, 8, 128, 50304, 1),
    ("medium", 16, 1024, 50257, 8, 8, 128, 50304, 0),
    ("medium", 16, 1024, 50000, 1, 8, 128, 50048, 0),
    ("medium", 24, 1152, 50257, 8, 18, 64, 50304, 0),
    ("medium", 36, 1280, 50257, 8, 20, 64, 50304, 0),
]


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: "-".join(map(str, row[:5])))
def test_known_shapes_are_inspected_without_reading_a_tensor(row, tmp_path):
    format, num_layers, width, vocab, world, heads, head_dim, rows, padding = row
    path = tmp_path / "state.pt"
    torch.save({"model": hollow(format, num_layers, width, vocab, world)}, path)
    assert path.stat().st_size < 100_000
    info, dictionary = inspect_checkpoint(path)
    assert info == {
        "checkpoint_format": format,
        "vocab_size": vocab,
        "padded_vocab_size": rows,
        "model_dim": width,
        "num_layers": num_layers,
        "num_heads": heads,
        "head_dim": head_dim,
        "scalars_size": 5 * num_layers + padding,
        "scalars_padding": padding,
    }
    assert len(dictionary["model"]) == len(hollow(format, num_layers, width, vocab))
    assert inspect_checkpoint({"model": hollow(format, num_layers, width, vocab, world)})[0] == info


def test_head_width_that_no_tensor_tells_is_asked():
    unknown = {"model": hollow("medium", 24, 1024, 50257)}
    with pytest.raises(CheckpointError, match="pass head_dim"):
        inspect_checkpoint(unknown)
    assert inspect_checkpoint(unknown, head_dim=64)[0]["num_heads"] == 16
    with pytest.raises(CheckpointError, match="pass head_dim"):
        inspect_checkpoint({"model": hollow("small", 12, 192, 128)})
    for wrong in (0, -64, 2, 6, 48, 7, 2048):
        with pytest.raises(CheckpointError, match="heads of"):
            inspect_checkpoint(unknown, head_dim=wrong)


@both_formats
def test_names_may_have_the_prefixes_of_wrappers_and_any_order(format):
    state, ids = drawn(format), drawn_ids(1, 9)
    expected = outputs(state, ids)
    deep = lambda key: key.replace("blocks.3.", "blocks.3._orig_mod.")
    for name in (
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"_orig_mod._orig_mod.{key}",
        lambda key: f"model.{key}",
        lambda key: f"model._orig_mod.{key}",
        lambda key: f"_fsdp_wrapped_module.{key}",
        deep,
        lambda key: f"module.{deep(key)}",
    ):
        renamed = {name(key): state[key] for key in reversed(state)}
        assert torch.equal(outputs(renamed, ids), expected)
        assert set(loaded(renamed).state()) == set(state)


# Damaged checkpoints: the file and the tensor are named


def renamed(old, new):
    def edit(state):
        state[new] = state.pop(old)

    return edit


def replaced(key, make):
    def edit(state):
        state[key] = make(state[key])

    return edit


def added(key, *shape):
    def edit(state):
        state[key] = torch.ones(shape)

    return edit


def dropped(*keys):
    def edit(state):
        for key in keys:
            del state[key]

    return edit


def dropped_blocks(*numbers):
    def edit(state):
        for key in [k for k in state if any(k.startswith(f"blocks.{n}.") for n in numbers)]:
            del state[key]

    return edit


def put(key, value):
    def edit(state):
        state[key].view(-1)[5] = value

    return edit


DAMAGES = {
    "no embedding": ("small", dropped("embed.weight"), "embed.weight"),
    "no scalars": ("medium", dropped("scalars"), "scalars"),
    "no head": ("small", dropped("lm_head.weight"), "lm_head.weight"),
    "no head, medium": ("medium", dropped("lm_head_w"), "lm_head_w"),
    "no value embedding": ("small", dropped("value_embeds.2.weight"), "value_embeds.2.weight"),
    "no blocks": ("small", dropped_blocks(*range(8)), "block"),
    "a block missing": ("small", dropped_blocks(3), "blocks.3"),
    "the last blocks missing": ("small", dropped_blocks(4, 5, 6, 7), "blocks"),
    "an odd number of blocks": ("medium", dropped_blocks(7), "blocks"),
    "an MLP missing": ("small", dropped("blocks.4.mlp.c_fc.weight"), "blocks.4.mlp.c_fc.weight"),
    "attention missing": ("medium", dropped("blocks.5.attn.qkvo_w"), "blocks.5.attn.qkvo_w"),
    "attention missing at first": ("small", dropped("blocks.0.attn.qkv_w"), "blocks.0.attn.qkv_w"),
    "projection missing": (
        "small",
        dropped("blocks.2.attn.c_proj.weight"),
        "blocks.2.attn.c_proj.weight",
    ),
    "attention in the eighth block": (
        "medium",
        added("blocks.7.attn.qkvo_w", 4, 8, 8),
        "blocks.7.attn.qkvo_w",
    ),
    "left over": ("small", added("blocks.1.attn.rotary.cos", 3), "blocks.1.attn.rotary.cos"),
    "left over at the top": ("medium", added("bias", 3), "bias"),
    "both heads": ("small", added("lm_head_w", 128, 8), "lm_head_w"),
    "formats mixed": (
        "small",
        renamed("blocks.3.mlp.c_fc.weight", "blocks.3.mlp.fc_w"),
        "blocks.3.mlp.fc_w",
    ),
    "stored twice": ("small", added("_orig_mod.embed.weight", 4, 8), "embed.weight"),
    "a wrapper's name within a name": (
        "small",
        renamed("blocks.1.attn.qkv_w", "blocks.1.attn.my_orig_mod.qkv_w"),
        "blocks.1.attn",
    ),
    "old naming": (
        "small",
        renamed("blocks.1.attn.c_proj.weight", "blocks.1.attn.c_proj_weight"),
        "blocks.1.attn.c_proj",
    ),
    "transposed": (
        "small",
        replaced("blocks.2.mlp.c_fc.weight", lambda t: t.T),
        "blocks.2.mlp.c_fc.weight",
    ),
    "flat qkvo": (
        "medium",
        replaced("blocks.2.attn.qkvo_w", lambda t: t.flatten(0, 1)),
        "blocks.2.attn.qkvo_w",
    ),
    "three of four": (
        "medium",
        replaced("blocks.0.attn.qkvo_w", lambda t: t[:3]),
        "blocks.0.attn.qkvo_w",
    ),
    "four of three": (
        "small",
        replaced("blocks.0.attn.qkv_w", lambda t: torch.cat([t, t[:1]])),
        "blocks.0.attn.qkv_w",
    ),
    "narrow heads": (
        "small",
        replaced("blocks.0.attn.qkv_w", lambda t: t[:, :4]),
        "blocks.0.attn.qkv_w",
    ),
    "few value embeddings": (
        "small",
        replaced("value_embeds.1.weight", lambda t: t[:3]),
        "value_embeds.1.weight",
    ),
    "few rows in the head": ("small", replaced("lm_head.weight", lambda t: t[:3]), "lm_head"),
    "embedding of one axis": ("medium", replaced("embed.weight", lambda t: t[0]), "embed.weight"),
    "embedding of no rows": ("medium", replaced("embed.weight", lambda t: t[:0]), "embed.weight"),
    "short scalars": ("small", replaced("scalars", lambda t: t[:39]), "scalars"),
    "scalars of two axes": ("small", replaced("scalars", lambda t: t.view(5, 8)), "scalars"),
    "NaN": ("small", put("value_embeds.0.weight", math.nan), "value_embeds.0.weight"),
    "infinity": ("medium", put("blocks.6.mlp.proj_w", -math.inf), "blocks.6.mlp.proj_w"),
    "NaN in scalars": ("medium", put("scalars", math.nan), "scalars"),
    "integers": ("small", replaced("scalars", lambda t: t.long()), "scalars"),
    "booleans": (
        "medium",
        replaced("blocks.1.mlp.fc_w", lambda t: t > 0),
        "blocks.1.mlp.fc_w",
    ),
    "bytes of a quantised weight": (
        "small",
        replaced("blocks.1.mlp.c_fc.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "blocks.1.mlp.c_fc.weight",
    ),
}


def tiny(format="small", **drawing):
    """A checkpoint of eight blocks and width 8, in float32."""
    options = {"heads": 1, "vocab": 4, "world": 1, "dtype": torch.float32, **drawing}
    return drawn(format, 8, **options)


def refusal(source, **options):
    with pytest.raises(CheckpointError) as caught:
        loaded(source, **options)
    return caught.value


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_refused_by_file_and_tensor(name, tmp_path):
    format, edit, key = DAMAGES[name]
    state, path = tiny(format), tmp_path / "state.pt"
    loaded(state)
    edit(state)
    torch.save({"step": 3, "model": state}, path)
    error = refusal(path)
    assert str(path) in str(error)
    assert key in str(error)
    assert key in str(refusal(state))


@pytest.mark.parametrize(
    "content",
    [
        {"model": None},
        {"model": [1, 2]},
        {"model": {}},
        {"model": torch.ones(3)},
        {"step": 3, "val_loss": 3.0},
        {"model": {"embed.weight": 3}},
        {"model": {"embed.weight": {"deeper": torch.ones(3)}}},
        {"model": tiny(), "state_dict": tiny()},
        {},
    ],
    ids=lambda content: ",".join(f"{k}={type(v).__name__}" for k, v in content.items()),
)
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "state.pt"
    torch.save(content, path)
    assert str(path) in str(refusal(path))
    with pytest.raises(CheckpointError):
        inspect_checkpoint(content)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), "text", None])
def test_what_is_no_dictionary_is_refused(content, tmp_path):
    path = tmp_path / "state.pt"
    torch.save(content, path)
    assert "expected a dictionary" in str(refusal(path))


def test_files_of_another_kind_are_refused(tmp_path):
    empty, text, other = tmp_path / "empty.pt", tmp_path / "text.pt", tmp_path / "zip.pt"
    empty.touch()
    text.write_text("step 3 of a log file")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("hello", "there")
    old = tmp_path / "old.pt"
    torch.save({"model": tiny()}, old, _use_new_zipfile_serialization=False)
    for path in (empty, text, other, old, tmp_path, tmp_path / "missing.pt"):
        assert str(path) in str(refusal(path))


# Files: every way to store the same tensors


def written(state, path, form="training"):
    """The checkpoint in a file."""
    if form == "safetensors":
        save_file({k: v.clone() for k, v in state.items()}, path)
    elif form == "bare":
        torch.save(state, path)
    else:
        torch.save(training_dictionary(state), path)
    return path


def training_dictionary(state):
    """What the scripts save: compiled names, and the state of both optimizers."""
    muon = {
        "momentum_buffer": torch.full((8, 8), 0.25),
        "mantissa": torch.full((8, 8), 517, dtype=torch.uint16),
    }
    adam = {"step": torch.tensor(3), "exp_avg": torch.full((8, 8), 0.5)}
    return {
        "step": 3,
        "code": "print()",
        "model": {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
        "optimizers": [
            {"state": {0: adam}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            {"state": {0: muon}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        ],
        "val_loss": 3.5,
    }


FORMS = ["training", "bare", "safetensors"]
both_kinds_of_files = pytest.mark.parametrize("form", ["training", "safetensors"])


@pytest.mark.parametrize("form", FORMS)
@both_formats
def test_every_kind_of_file_holds_the_same_model(form, format, tmp_path):
    state, ids = as_stored(tiny(format)), torch.tensor([[0, 1, 2, 3]])
    model = loaded(written(state, tmp_path / "state", form))
    assert_same_state(model.state(), state)
    assert torch.equal(model.logits(ids), loaded(state).logits(ids))


def test_dictionary_has_the_other_entries_without_optimizers(tmp_path):
    state = tiny()
    path = written(state, tmp_path / "state.pt")
    for result in (inspect_checkpoint(path, head_dim=8)[1], inspect_of_memory(state)):
        assert {k: v for k, v in result.items() if k != "model"} == {
            "step": 3,
            "code": "print()",
            "val_loss": 3.5,
        }
        assert_same_state(
            dict(result["model"]), {f"_orig_mod.{key}": tensor for key, tensor in state.items()}
        )


def inspect_of_memory(state):
    return inspect_checkpoint(training_dictionary(state), head_dim=8)[1]


def any_tensors():
    """Tensors of many layouts and dtypes."""
    base = torch.arange(120, dtype=torch.float32)
    drawn = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    return {
        "plain": drawn,
        "again": drawn,
        "part of it": drawn[2:4],
        "transposed": drawn.T,
        "every other": base[1::2],
        "overlapping": base.as_strided((5, 4), (3, 1), 7),
        "expanded": torch.tensor([[1.5], [2.5]]).expand(2, 7),
        "permuted": base.view(4, 5, 6).permute(2, 0, 1),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0),
        "empty rows": torch.empty(0, 7, dtype=torch.bfloat16),
        "empty part": drawn[3:3],
        "bfloat16": drawn.bfloat16(),
        "float16": drawn.half(),
        "float64": drawn.double(),
        "uint16": torch.arange(9).to(torch.uint16),
        "int64": torch.arange(-4, 4),
        "bool": drawn > 0,
        "complex": torch.complex(drawn, drawn.flip(0)),
        "parameter": torch.nn.Parameter(drawn * 2),
        "not a number": torch.tensor([math.nan, -0.0, math.inf]),
    }


def test_tensors_of_every_layout_and_dtype_are_read(tmp_path):
    tensors, path = any_tensors(), tmp_path / "any.pt"
    torch.save({"model": tensors, "optimizer": {"m": torch.ones(5)}}, path)
    for source in (path, {"model": tensors}):
        opened = open_checkpoint(source)
        assert list(opened.tensors) == list(tensors)
        for key, stored in opened.tensors.items():
            assert stored.shape == tuple(tensors[key].shape)
            assert stored.dtype == tensors[key].dtype
        found = {key: stored.read() for key, stored in opened.tensors.items()}
        assert_same_state(found, tensors)


def in_one_storage(state):
    """The same tensors as views into one."""
    flat = torch.cat([torch.zeros(3), *[tensor.flatten() for tensor in state.values()]])
    views, begin = {}, 3
    for key, tensor in state.items():
        views[key] = flat[begin : begin + tensor.numel()].view(tensor.shape)
        begin += tensor.numel()
    return views


def test_checkpoints_of_views_into_one_storage_are_read(tmp_path):
    state = tiny()
    turned = {k: v.T.contiguous().T if v.ndim == 2 else v for k, v in state.items()}
    for number, stored in enumerate((in_one_storage(state), turned)):
        path = tmp_path / f"{number}.pt"
        torch.save({"model": stored}, path)
        assert_same_state(loaded(path).state(), state)


def test_a_tensor_holds_the_memory_of_its_own_elements_alone(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"model": in_one_storage(tiny())}, path)
    for key, stored in open_checkpoint(path).tensors.items():
        tensor = stored.read()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, key


def test_tied_tensors_are_loaded_apart(tmp_path):
    state, path = tiny(), tmp_path / "state.pt"
    state["value_embeds.1.weight"] = state["value_embeds.0.weight"]
    state["value_embeds.2.weight"] = state["lm_head.weight"][:4]
    torch.save({"model": state}, path)
    model = loaded(path)
    assert_same_state(model.state(), state)
    model.value_embeds[0].zero_()
    assert_same_state({"1": model.value_embeds[1]}, {"1": state["value_embeds.1.weight"]})


def test_the_model_is_told_from_a_copy_of_its_shapes_wherever_that_lies(tmp_path):
    """Averaged weights beside the model have records of the same sizes in the same order."""
    state, averaged, path = tiny(), tiny(seed=1), tmp_path / "state.pt"
    ten = [torch.zeros(1)] * 10 + [torch.zeros(1) for _ in range(10)]  # names of two digits follow
    for steps in range(66):  # of 64 bytes, by which records are aligned: more than a page
        between = torch.zeros(16 * steps + 1)
        torch.save({"ten": ten, "averaged": averaged, "between": between, "model": state}, path)
        assert_same_state(loaded(path).state(), state)


def test_negated_views_are_read(tmp_path):
    path = tmp_path / "any.pt"
    negated = torch.view_as_complex(torch.randn(5, 2)).conj().imag
    assert negated.is_neg()
    torch.save({"model": {"negated": negated}}, path)
    assert torch.equal(open_checkpoint(path).tensors["negated"].read(), negated)


def records(path):
    """The records of an archive with the place where the data of each begins."""
    with zipfile.ZipFile(path) as archive:
        data = path.read_bytes()
        for record in archive.infolist():
            at = record.header_offset
            name, extra = (int.from_bytes(data[at + i : at + i + 2], "little") for i in (26, 28))
            yield record, at + 30 + name + extra


def flip(path, at, by=0x40):
    """The same file with one byte changed, beside it."""
    data = bytearray(path.read_bytes())
    data[at] ^= by
    damaged = path.with_name(f"damaged-{path.name}")
    damaged.write_bytes(data)
    return damaged


def test_a_flipped_byte_in_any_tensor_is_refused_by_its_name(tmp_path):
    state = tiny()
    path = written(state, tmp_path / "state.pt")
    storages = list(state) + ["optimizer"] * 4
    met = set()
    for record, begin in records(path):
        if not record.file_size:
            continue
        damaged = flip(path, begin + record.file_size // 2)
        folder, _, name = record.filename.rpartition("/")
        key = storages[int(name)] if folder.endswith("/data") else None
        met.add(key)
        if key == "optimizer":
            assert_same_state(loaded(damaged).state(), state)
            continue
        error = refusal(damaged)
        assert str(damaged) in str(error)
        if key is not None:
            assert error.key.removeprefix("_orig_mod.") == key
            assert key in str(error)
    assert met == {*state, "optimizer", None}


def assert_harmless_or_refused(path, state):
    """Only :class:`CheckpointError` is raised; what loads is what was stored. True where it loads."""
    try:
        found = loaded(path).state()
    except CheckpointError as refusal:
        named = str(refusal)
    else:
        assert_same_state(found, state)
        return True
    assert str(path) in named
    return False


def test_a_flipped_byte_anywhere_in_an_archive_is_refused_or_harmless(tmp_path):
    state = tiny()
    path = written(state, tmp_path / "state.pt")
    size = path.stat().st_size
    places = [*range(0, size, size // 150), *range(size - 3000, size, 40)]
    harmless = [assert_harmless_or_refused(flip(path, at, 1 << at % 8), state) for at in places]
    assert 0 < sum(harmless) < len(places)


def test_a_flipped_byte_in_a_safetensors_header_is_refused_or_harmless(tmp_path):
    state = tiny()
    path = written(state, tmp_path / "state.safetensors", "safetensors")
    header = int.from_bytes(path.read_bytes()[:8], "little")
    for at in [*range(8), *range(8, 8 + header, 9)]:
        assert_harmless_or_refused(flip(path, at, 1 << at % 8), state)


@both_kinds_of_files
def test_truncated_files_are_refused(form, tmp_path):
    path = written(tiny(), tmp_path / "state", form)
    data = path.read_bytes()
    for size in [0, 1, 4, 8, 9, 100, *range(200, len(data), len(data) // 40), len(data) - 1]:
        path.write_bytes(data[:size])
        assert str(path) in str(refusal(path))


class Opens:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("place", ["beside", "within", "instead", "optimizer", "plain pickle"])
def test_no_pickle_is_executed(place, tmp_path):
    canary, path, state = tmp_path / "canary", tmp_path / "state.pt", tiny()
    content = {
        "beside": {"model": state, "step": Opens(canary)},
        "within": {"model": {**state, "embed.weight": Opens(canary)}},
        "instead": Opens(canary),
        "optimizer": {"model": state, "optimizers": [Opens(canary)]},
        "plain pickle": {"model": Opens(canary)},
    }[place]
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert str(path) in str(refusal(path))
    with pytest.raises(CheckpointError):
        inspect_checkpoint(path)
    assert not canary.exists()


def test_a_canary_is_written_where_pickle_is_executed(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Opens(canary))).close()
    assert canary.exists()


def mapped(path):
    """Whether this process has the file mapped into its memory."""
    return str(path) in Path("/proc/self/maps").read_text()


linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")


@linux
@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_the_file_stays_mapped(form, tmp_path):
    state, path = tiny(), tmp_path / "state"
    written(state, path, form)
    model, _, dictionary = load_pretrained_checkpoint(path, head_dim=8)
    assert not mapped(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert_same_state(model.state(), state)
    os.truncate(path, 0)
    assert_same_state(model.state(), state)
    assert torch.isfinite(model.logits(torch.tensor([[0, 1, 2]]))).all()
    with pytest.raises(CheckpointError, match="was changed"):
        next(iter(dictionary["model"].values()))


@linux
def test_tensors_beside_the_model_are_left_out_and_not_mapped(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"model": tiny(), "step": 3, "rng": [{"state": torch.get_rng_state()}]}, path)
    dictionary = inspect_checkpoint(path, head_dim=8)[1]
    assert dictionary.keys() == {"model", "step"}
    assert not mapped(path)


@both_kinds_of_files
def test_a_file_is_not_changed_by_the_model(form, tmp_path):
    path = written(tiny(), tmp_path / "state", form)
    data, model = path.read_bytes(), loaded(path)
    for parameter in model.parameters():
        parameter.fill_(3)
    assert path.read_bytes() == data
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


@both_formats
def test_a_dictionary_is_not_changed_and_not_shared(format):
    state = as_stored(tiny(format))
    content = training_dictionary(state)
    names, kept = list(content["model"]), {k: v.clone() for k, v in state.items()}
    model, _, dictionary = load_pretrained_checkpoint(content, head_dim=8)
    assert list(content) == ["step", "code", "model", "optimizers", "val_loss"]
    assert list(content["model"]) == names
    for parameter in model.parameters():
        parameter.fill_(3)
    next(iter(dictionary["model"].values())).fill_(3)
    assert_same_state(state, kept)
    model = loaded(content)
    for tensor in state.values():
        tensor.fill_(5)
    assert_same_state(model.state(), kept)


def test_one_reader_loads_independent_models(tmp_path):
    state = tiny()
    for source in (state, written(state, tmp_path / "a.pt")):
        reader = CheckpointReader(source, head_dim=8)
        first, second = reader.load(), reader.load()
        for parameter in first.parameters():
            parameter.fill_(3)
        assert_same_state(second.state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
@pytest.mark.parametrize("form", [*FORMS, "memory"])
def test_weights_are_converted_to_the_dtype_asked_for(form, dtype, tmp_path):
    state = as_stored(tiny("medium"))
    source = state if form == "memory" else written(state, tmp_path / "state", form)
    model = loaded(source, dtype=dtype)
    assert_same_state(model.state(), {key: tensor.to(dtype) for key, tensor in state.items()})
    assert model.features(torch.tensor([[0, 1, 2]])).dtype == dtype


def test_float64_weights_are_computed_with_in_float64():
    state = tiny(dtype=F64)
    ids = torch.tensor([[0, 1, 2]])
    assert loaded(state).features(ids).dtype == F64
    assert loaded(as_stored(state)).features(ids).dtype == torch.float32
    same(
        loaded(as_stored(state)).features(ids),
        loaded(as_stored(state), dtype=F64).features(ids),
        1e-5,
    )


# Saving


@pytest.mark.parametrize("name", ["saved.pt", "saved.pth", "saved", "saved.safetensors"])
@both_formats
def test_saving_is_bit_for_bit(format, name, tmp_path):
    state, path = as_stored(tiny(format, world=7)), tmp_path / name
    model = loaded(written(state, tmp_path / "original.pt"))
    save_checkpoint(model, path, step=4, val_loss=2.5)
    if name.endswith(".safetensors"):
        found = load_file(path)
    else:
        content = torch.load(path, weights_only=True)
        found = content.pop("model")
        assert content == {"step": 4, "val_loss": 2.5}
    assert_same_state(found, state)
    again = loaded(path)
    assert_same_state(again.state(), state)
    assert again.config == model.config
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([name, "original.pt"])


@both_kinds_of_files
def test_saving_with_a_prefix(form, tmp_path):
    state = tiny()
    path = tmp_path / ("saved.safetensors" if form == "safetensors" else "saved.pt")
    loaded(state).save(path, prefix="_orig_mod.")
    assert set(open_checkpoint(path).tensors) == {f"_orig_mod.{key}" for key in state}
    assert_same_state(loaded(path).state(), state)


def test_padding_of_scalars_is_saved_as_it_was(tmp_path):
    state, path = tiny(world=16), tmp_path / "saved.pt"
    state["scalars"][40:] = torch.arange(8) + 2
    with pytest.warns(UserWarning, match="padding"):
        model = loaded(state)
    model.save(path)
    assert_same_state(torch.load(path)["model"], state)


@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
def test_saving_onto_the_file_that_was_loaded(name, tmp_path):
    state, path = tiny(), tmp_path / name
    written(state, path, "safetensors" if name.endswith(".safetensors") else "training")
    model = loaded(path)
    model.save(path)
    assert_same_state(model.state(), state)
    assert_same_state(loaded(path).state(), state)


class Refuses:
    """Cannot be pickled."""

    def __reduce__(self):
        raise OSError("no space left on device")


@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
@pytest.mark.parametrize("old", [True, False])
def test_a_failing_save_leaves_the_old_file_alone(name, old, tmp_path, monkeypatch):
    path, model = tmp_path / name, loaded(tiny())
    if old:
        path.write_bytes(b"the old file")

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        model.save(path)
    monkeypatch.undo()
    if name.endswith(".pt"):
        with pytest.raises(OSError, match="no space left"):
            model.save(path, step=Refuses())
    assert [entry.name for entry in tmp_path.iterdir()] == ([name] if old else [])
    assert not old or path.read_bytes() == b"the old file"


# Odd content


def test_other_entries_may_have_any_name_and_value(tmp_path):
    state, path = tiny(), tmp_path / "state.pt"
    torch.save({"model": state, 5: [1, None], ("a", 1): {"b": 2.5}}, path)
    model, _, dictionary = load_pretrained_checkpoint(path, head_dim=8)
    assert_same_state(model.state(), state)
    assert dictionary[5] == [1, None]


def named_in_5000_digits(state):
    return {**state, f"blocks.{'9' * 5000}.mlp.c_fc.weight": torch.ones(2)}


ODD = {
    "a number as a name": lambda state: {**state, 5: torch.ones(2)},
    "a sparse tensor": lambda state: {**state, "embed.weight": state["embed.weight"].to_sparse()},
    "a tensor without data": lambda state: {**state, "scalars": state["scalars"].to("meta")},
    "a block far away": lambda state: {**state, "blocks.123456789012.x": torch.ones(2)},
    "a block of 5000 digits": named_in_5000_digits,
}


ODD_CASES = [
    *list(ODD)[:2],
    "a tensor without data",
    "a block far away",
    "a block of 5000 digits",
]


@pytest.mark.parametrize("name", ODD_CASES)
def test_odd_content_is_refused(name, tmp_path):
    path, state = tmp_path / "state.pt", ODD[name](tiny())
    torch.save({"model": state}, path)
    assert str(path) in str(refusal(path))
    assert "the dictionary" in str(refusal(state))


def test_tensors_of_the_other_byte_order_are_refused(tmp_path):
    path, other = written(tiny(), tmp_path / "state.pt"), tmp_path / "other.pt"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(other, "w") as copy:
        for record in archive.infolist():
            order = record.filename.endswith("/byteorder")
            copy.writestr(record.filename, b"big" if order else archive.read(record))
    assert "big" in str(refusal(other))


@pytest.mark.parametrize(
    "form",
    ["training", "safetensors"],
)
def test_a_file_that_is_replaced_after_it_was_opened_is_not_mixed_with_the_new(form, tmp_path):
    path, old, new = tmp_path / "state", tiny(), tiny(seed=1)
    reader = CheckpointReader(written(old, path, form), head_dim=8)
    new["lm_head.weight"] = torch.ones(256, 8)  # every tensor behind it lies elsewhere
    written(new, path, form)
    try:
        found = reader.load().state()
    except CheckpointError as refusal:
        named = str(refusal)
    else:
        assert_same_state(found, new if found["lm_head.weight"].shape[0] == 256 else old)
        return
    assert str(path) in named


@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
def test_saving_follows_links_and_keeps_permissions(name, tmp_path):
    target, link, state = tmp_path / f"target-{name}", tmp_path / name, tiny()
    target.touch()
    target.chmod(0o640)
    link.symlink_to(target)
    model = loaded(state)
    model.save(link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert_same_state(loaded(target).state(), state)
    fresh, plain = tmp_path / f"fresh-{name}", tmp_path / "plain"
    model.save(fresh)
    plain.touch()
    assert fresh.stat().st_mode == plain.stat().st_mode


def test_values_beyond_the_range_of_the_asked_dtype_are_refused(tmp_path):
    state, path = tiny(), tmp_path / "state.pt"
    state["blocks.2.mlp.fc_w" if "lm_head_w" in state else "blocks.2.mlp.c_fc.weight"][3, 1] = 1e6
    written(state, path, "training")
    assert loaded(path).state()
    with pytest.raises(CheckpointError, match=r"blocks\.2\.mlp.*range of torch.float16"):
        load_pretrained_checkpoint(path, dtype=torch.float16, head_dim=8)


def test_a_dtype_that_is_not_floating_is_refused(tmp_path):
    path = written(tiny(), tmp_path / "state.pt", "training")
    with pytest.raises(ValueError, match=r"dtype is torch\.int32"):
        load_pretrained_checkpoint(path, dtype=torch.int32, head_dim=8)


def test_a_shared_storage_is_read_once_and_then_forgotten(tmp_path, monkeypatch):
    from reference_impl.gpt import archives

    reads = []
    read_bytes = archives.read_bytes
    monkeypatch.setattr(archives, "read_bytes", lambda *a: reads.append(a) or read_bytes(*a))
    path = tmp_path / "state.pt"
    torch.save({"model": in_one_storage(tiny())}, path)
    for _ in range(2):
        reader = CheckpointReader(path, head_dim=8)
        reads.clear()
        reader.load()
        assert len(reads) == 1
        assert all(t.read.shared.bytes is None for t in reader.tensors.values())
