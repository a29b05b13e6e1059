"""Flat layouts of the reference against authorities: Fast-LLM's own shards, examples, brute force."""

import itertools
import json
import math
import random
import tracemalloc

import pytest
import torch
from command_line import ROOT

from reference_impl.flat_shards import FlatLayout, ParameterMeta, buffer_order, overlaps
from reference_impl.flat_shards.engine import FlatShards
from reference_impl.flat_shards.resharding import cut, join, reshard

OWN = ROOT / "fixtures" / "goldens" / "flat_shards" / "layouts.json"
ORIGINAL = ROOT.parent / "shared" / "goldens" / "flat_shards" / "layouts.json"
GOLDENS = json.loads(OWN.read_text())


def layout_of(shapes, ranks=1, tensor_ranks=1, dims=()):
    dims = dict(dims)
    metas = tuple(ParameterMeta(n, tuple(s), dims.get(n)) for n, s in shapes.items())
    return FlatLayout(metas, ranks, tensor_ranks)


def numbered(shapes, first=1, dtype=torch.int64):
    """Values whose elements are numbered, one parameter after the other."""
    values = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        values[name] = torch.arange(first, first + size, dtype=dtype).view(tuple(shape))
        first += size
    return values


def shards_of(layout, values):
    return {
        (rank, t): cut(layout, values, rank, t)
        for rank in range(layout.ranks)
        for t in range(layout.tensor_ranks)
    }


# What Fast-LLM's own code gives


def values_of(golden):
    return {
        p["name"]: torch.arange(p["first_value"], p["first_value"] + math.prod(p["shape"])).view(
            p["shape"]
        )
        for p in golden["parameters"]
    }


def layouts_of(golden):
    shapes = {p["name"]: p["shape"] for p in golden["parameters"]}
    return {int(ranks): layout_of(shapes, int(ranks)) for ranks in golden["worlds"]}


def test_goldens_on_file_are_the_originals():
    if not ORIGINAL.exists():
        pytest.skip("the outputs of the original program are not at hand")
    assert json.loads(ORIGINAL.read_text()) == GOLDENS


def test_goldens_have_padding_over_several_ranks():
    assert len(GOLDENS) == 9
    spans = [
        golden["name"]
        for golden in GOLDENS
        for world in golden["worlds"].values()
        if sum(rank["shard_pad"] > 0 for rank in world["ranks"]) > 1
    ]
    assert {"worked-example", "one-element", "pad-over-two-ranks"} <= set(spans)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden["name"])
def test_layout_is_that_of_the_original(golden):
    values = values_of(golden)
    for ranks, layout in layouts_of(golden).items():
        world = golden["worlds"][str(ranks)]
        assert layout.table() == {n: (world["begin"][n], world["end"][n]) for n in values}
        assert len(world["ranks"]) == ranks
        for rank, expected in enumerate(world["ranks"]):
            assert layout.shard_size == expected["shard_size"]
            assert layout.shard_pad(rank) == expected["shard_pad"]
            assert layout.global_pad == expected["global_pad"]
            held = {name: layout.size_in_shard(name, rank) for name in values}
            assert held == expected["elements_in_shard"]
            assert cut(layout, values, rank).tolist() == expected["shard"]


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden["name"])
def test_shards_of_any_world_give_those_of_any_other(golden):
    for source, target in itertools.product(layouts_of(golden).values(), repeat=2):
        worlds = golden["worlds"]
        given = [torch.tensor(rank["shard"]) for rank in worlds[str(source.ranks)]["ranks"]]
        made = reshard(source, given, target)
        for rank, expected in enumerate(worlds[str(target.ranks)]["ranks"]):
            assert made[rank, 0].tolist() == expected["shard"]


# Worked examples


@pytest.mark.parametrize(
    ("count", "ranks", "size", "pads"),
    [
        (1, 4, 32, [31, 32, 32, 32]),
        (100, 4, 32, [0, 0, 0, 28]),
        (130, 4, 64, [0, 0, 62, 64]),
        (200, 3, 96, [0, 0, 88]),
        (33, 2, 32, [0, 31]),
        (48, 2, 32, [0, 16]),
        (48, 3, 32, [0, 16, 32]),
        (48, 1, 64, [16]),
        (0, 3, 0, [0, 0, 0]),
        (64, 2, 32, [0, 0]),
    ],
)
def test_padding_by_hand(count, ranks, size, pads):
    layout = layout_of({"a": (count,)}, ranks)
    assert layout.shard_size == size
    assert [layout.shard_pad(rank) for rank in range(ranks)] == pads
    assert sum(pads) == layout.global_pad


EXAMPLE = {"b": (3,), "ln": (5,), "w": (4, 10)}


def test_ranges_by_hand():
    layout = layout_of(EXAMPLE, 2)
    assert layout.table() == {"b": (0, 3), "ln": (3, 8), "w": (8, 48)}
    assert [layout.range_in_shard("w", rank) for rank in (0, 1)] == [(8, 32), (0, 16)]
    assert [layout.range_of_parameter("w", rank) for rank in (0, 1)] == [(0, 24), (24, 40)]
    assert [layout.size_in_shard("w", rank) for rank in (0, 1)] == [24, 16]
    assert [layout.size_in_shard("b", rank) for rank in (0, 1)] == [3, 0]
    assert [layout.buffer_to_shard(48, rank) for rank in (0, 1)] == [32, 16]


def test_a_rank_of_padding_alone_by_hand():
    layout = layout_of(EXAMPLE, 3)
    last = cut(layout, numbered(EXAMPLE), 2)
    assert last.tolist() == [0] * 32
    assert [layout.size_in_shard(name, 2) for name in EXAMPLE] == [0, 0, 0]


def test_order_by_hand():
    """Every combination of decay, split, and sequence parallel."""
    metas = [
        ParameterMeta(
            f"{'decay' if decay else 'none'}-{kind}",
            (4,),
            0 if kind == "split" else None,
            weight_decay=decay,
            sequence_parallel=kind == "sequence",
        )
        for decay in (True, False)
        for kind in ("whole", "sequence", "split")
    ]
    twice = [*metas, *(ParameterMeta(f"{m.name}-2", *list(vars(m).values())[1:]) for m in metas)]
    expected = [
        "none-split",
        "none-whole",
        "none-sequence",
        "decay-sequence",
        "decay-whole",
        "decay-split",
    ]
    assert [m.name for m in buffer_order(metas)] == expected
    both = [name for each in expected for name in (each, f"{each}-2")]
    assert [m.name for m in buffer_order(twice)] == both


# Properties, by brute force


def random_shapes(rng):
    axes = [(), (0,), (1,), (rng.randint(1, 70),), (rng.randint(1, 9), rng.randint(1, 20))]
    return {f"p{i}": rng.choice(axes) for i in range(rng.randint(0, 6))}


def written_down(layout):
    """The buffer as a list: name and number of each element, or None for padding."""
    elements = [
        (name, number) for name in layout.names for number in range(math.prod(layout.shape(name)))
    ]
    while len(elements) % (32 * layout.ranks):
        elements.append(None)
    size = len(elements) // layout.ranks
    return [elements[rank * size : (rank + 1) * size] for rank in range(layout.ranks)]


@pytest.mark.parametrize("seed", range(60))
def test_positions_are_those_of_the_buffer_written_down(seed):
    rng = random.Random(seed)
    layout = layout_of(random_shapes(rng), rng.choice([1, 2, 3, 4, 7, 13]))
    shards = written_down(layout)
    behind = 0
    for rank, shard in enumerate(shards):
        assert layout.shard_size == len(shard)
        assert layout.shard_size % 32 == 0
        assert layout.shard_pad(rank) == shard.count(None)
        assert None not in shard[: len(shard) - shard.count(None)]
        end = 0
        held = dict.fromkeys(element[0] for element in shard if element)
        assert layout.names_in_shard(rank) == tuple(held)
        for name in layout.names:
            begin, stop = layout.range_in_shard(name, rank)
            low, high = layout.range_of_parameter(name, rank)
            assert shard[begin:stop] == [(name, number) for number in range(low, high)]
            assert begin == end, "consecutive parameters are adjacent"
            end = stop
        assert end == len(shard) - shard.count(None)
        behind += end
    assert behind == layout.parameter_count
    pads = [layout.shard_pad(rank) for rank in range(layout.ranks)]
    assert pads == sorted(pads)
    assert sum(pads) == layout.global_pad < 32 * layout.ranks
    for name in layout.names:
        sizes = [layout.size_in_shard(name, rank) for rank in range(layout.ranks)]
        assert sum(sizes) == math.prod(layout.shape(name))


def test_padding_is_monotonic_and_complete_for_every_count():
    for ranks, count in itertools.product(range(1, 9), range(0, 700, 1)):
        layout = layout_of({"a": (count,)}, ranks)
        pads = [layout.shard_pad(rank) for rank in range(ranks)]
        assert pads == sorted(pads)
        assert sum(pads) == ranks * layout.shard_size - count < max(32 * ranks, 1)
        assert all(pad == 0 for pad, after in itertools.pairwise(pads) if after < layout.shard_size)


@pytest.mark.parametrize("seed", range(20))
def test_join_is_the_inverse_of_cut(seed):
    rng = random.Random(seed)
    shapes = random_shapes(rng)
    layout, values = layout_of(shapes, rng.randint(1, 5)), numbered(shapes)
    found = join(layout, shards_of(layout, values))
    assert list(found) == list(values)
    assert all(torch.equal(found[name], values[name]) for name in values)


SPLIT = {"row": (6, 5), "bias": (7,), "column": (3, 12), "middle": (2, 6, 5), "none": (0, 4)}
DIMS = {"row": 0, "column": 1, "middle": 1}


@pytest.mark.parametrize("before", [(1, 1), (1, 3), (2, 2), (3, 6), (4, 1)])
@pytest.mark.parametrize("after", [(1, 1), (2, 3), (3, 2), (1, 6), (5, 1)])
def test_both_numbers_of_ranks_change_at_once(before, after):
    source, target = (layout_of(SPLIT, *ranks, DIMS) for ranks in (before, after))
    values = numbered(SPLIT)
    shards, expected = shards_of(source, values), shards_of(target, values)
    made = reshard(source, shards, target)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], expected[key]) for key in expected)
    back = reshard(target, made, source)
    assert all(torch.equal(back[key], shards[key]) for key in shards)
    whole = join(target, made)
    assert all(torch.equal(whole[name], values[name]) for name in values)


@pytest.mark.parametrize("before", [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("after", [(1, 1), (3, 3), (2, 6)])
def test_every_element_is_copied_once(before, after):
    """Overlaps with a target shard fill it but for its padding, and none is written twice."""
    source, target = (layout_of(SPLIT, *ranks, DIMS) for ranks in (before, after))
    for rank, t in itertools.product(range(target.ranks), range(target.tensor_ranks)):
        written = torch.zeros(target.shard_size, dtype=torch.int64)
        for old, old_t in itertools.product(range(source.ranks), range(source.tensor_ranks)):
            for overlap in overlaps(
                source, old, target, rank, source_tensor_rank=old_t, target_tensor_rank=t
            ):
                assert overlap.count > 0
                assert overlap.source + overlap.count <= source.shard_size
                written[overlap.target : overlap.target + overlap.count] += 1
        used = target.shard_size - target.shard_pad(rank)
        assert written.tolist() == [1] * used + [0] * (target.shard_size - used)


def test_tensor_parallel_slices_put_together_are_the_whole():
    """What is split is put together along its axis; what is not is the same on all."""
    layout, values = layout_of(SPLIT, 2, 3, DIMS), numbered(SPLIT)
    alone = FlatLayout(
        tuple(ParameterMeta(name, layout.shape(name)) for name in layout.names), layout.ranks
    )
    locals_ = [join(alone, [cut(layout, values, rank, t) for rank in range(2)]) for t in range(3)]
    for name, value in values.items():
        parts = [local[name] for local in locals_]
        if name in DIMS:
            assert torch.equal(torch.cat(parts, DIMS[name]), value)
        else:
            assert all(torch.equal(part, value) for part in parts)


# Size


BILLIONS = 2_804_643_712


def large_shapes():
    """A model's worth of parameters, thousands of them, with as many elements in total."""
    shapes = {"embedding": (49_152, 4096)}
    for layer in range(340):
        for name, shape in (
            ("norm_1", (4096,)),
            ("qkv", (512, 4096)),
            ("dense", (4096, 256)),
            ("norm_2", (4096,)),
            ("up", (600, 4096)),
            ("gate", (300, 1001)),
            ("down", (4096, 200)),
            ("bias", (997,)),
            ("scale", ()),
        ):
            shapes[f"layers.{layer}.{name}"] = shape
    rest = BILLIONS - sum(map(math.prod, shapes.values()))
    assert rest > 0
    return shapes | {"head": (rest,)}


def test_billions_of_elements_are_laid_out_without_memory_for_them():
    """Over 64 ranks: exact positions, and no more memory than the table needs."""
    shapes = large_shapes()
    assert len(shapes) > 3000
    tracemalloc.start()
    try:
        layout = FlatShards().flat_layout(shapes, ranks=64)
        assert layout.parameter_count == BILLIONS
        ranges = [(name, *layout.range_in_shard(name, 63)) for name in layout.names]
        ends = {rank: layout.shard_pad(rank) for rank in range(64)}
        pieces = list(overlaps(layout, 40, layout.over(48), 30))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20, f"{peak:,} bytes for the layout of {len(shapes)} parameters"
    assert layout.shard_size == -(-BILLIONS // (64 * 32)) * 32
    assert sum(ends.values()) == 64 * layout.shard_size - BILLIONS
    assert ranges[-1][2] == layout.shard_size - ends[63]
    begin = 0
    for name, shape in shapes.items():
        assert layout.begin(name) == begin
        begin += math.prod(shape)
        assert layout.end(name) == begin
    # Rank 40 of 64 ends where rank 30 of 48 does, but for the padding of each.
    new = layout.over(48)
    low = max(40 * layout.shard_size, 30 * new.shard_size)
    high = min(41 * layout.shard_size, 31 * new.shard_size)
    assert sum(piece.count for piece in pieces) == max(high - low, 0) > 0


def test_one_shard_of_that_total_is_a_multiple_of_32():
    assert BILLIONS % 32 == 0
    assert layout_of({"a": (BILLIONS,)}).shard_size == BILLIONS


# Refusals


def refused(match, do, *arguments, **options):
    with pytest.raises((ValueError, KeyError), match=match):
        do(*arguments, **options)


def test_layouts_that_cannot_be_are_refused():
    refused("0 ranks", layout_of, EXAMPLE, 0)
    refused("-1 tensor-parallel", layout_of, EXAMPLE, 2, -1)
    refused("w: 3 tensor-parallel ranks do not divide axis 1", layout_of, EXAMPLE, 2, 3, {"w": 1})
    refused("w .* has no axis 2", layout_of, EXAMPLE, 2, 2, {"w": 2})
    refused("w .* has no axis -1", layout_of, EXAMPLE, 2, 2, {"w": -1})
    refused("b .* has no axis 1", layout_of, EXAMPLE, 1, 1, {"b": 1})
    meta = ParameterMeta("twice", (3,))
    refused("two parameters are called twice", FlatLayout, (meta, meta))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tensor_dims": {"w": 0, "v": 0}}, "tensor_dims has unknown names: v"),
        ({"sequence_parallel": ("v", "w", "u")}, "sequence_parallel has unknown names: v, u"),
        ({"weight_decay": {"w": True, "b": False, "v": True}}, "weight_decay has unknown names: v"),
        ({"weight_decay": {"w": True}}, "weight_decay lacks b"),
        ({"weight_decay": {}}, "weight_decay lacks w, b"),
    ],
)
def test_what_is_said_of_parameters_is_said_of_those_that_there_are(options, says):
    with pytest.raises(ValueError, match=says):
        FlatShards().flat_layout({"w": (4, 2), "b": (2,)}, **options)


@pytest.mark.parametrize("rank", [-1, 2, 7])
def test_ranks_that_there_are_not_are_refused(rank):
    layout = layout_of(EXAMPLE, 2)
    refused(f"rank {rank} is not", layout.shard_pad, rank)
    refused(f"rank {rank} is not", layout.range_in_shard, "w", rank)
    refused(f"rank {rank} is not", layout.range_of_parameter, "w", rank)
    refused(f"rank {rank} is not", cut, layout, numbered(EXAMPLE), rank)
    refused(f"tensor-parallel rank {rank} is not", cut, layout, numbered(EXAMPLE), 0, rank)
    refused("nowhere", layout.begin, "nowhere")


def test_values_that_do_not_belong_are_refused():
    layout, values = layout_of(EXAMPLE, 2), numbered(EXAMPLE)
    without = {name: value for name, value in values.items() if name != "ln"}
    refused("missing: ln", cut, layout, without, 1)
    refused("unknown: more", cut, layout, values | {"more": values["b"]}, 1)
    refused("missing: ln; unknown: more", cut, layout, without | {"more": values["ln"]}, 0)
    for other in ((10, 4), (40,), (1, 4, 10), (2, 20)):
        changed = values | {"w": values["w"].reshape(other)}
        refused(r"w has shape .*, expected \[4, 10\]", cut, layout, changed, 0)


def test_shards_that_do_not_belong_are_refused():
    layout, values = layout_of(EXAMPLE, 3), numbered(EXAMPLE)
    shards = shards_of(layout, values)
    target = layout.over(2)
    missing = {key: shard for key, shard in shards.items() if key != (1, 0)}
    short = shards | {(1, 0): shards[1, 0][:-1]}
    for changed, match in (
        (missing, "shards of ranks"),
        (missing | {(3, 0): shards[1, 0]}, r"\(3, 0\)"),
        (short, r"the shard of rank \(1, 0\) has shape \[31\], expected \[32\]"),
    ):
        refused(match, join, layout, changed)
        refused(match, reshard, layout, changed, target)
    turned = layout_of(EXAMPLE | {"b": (1, 3)}, 2)
    refused(r"b has shape \[3\], expected \[1, 3\]", reshard, layout, shards, turned)
    refused("missing: other", reshard, layout, shards, layout_of({"other": (3,)}, 2))


# Shards that are given


def test_shards_are_written_to_where_they_are_given():
    source, target = layout_of(EXAMPLE, 3), layout_of(EXAMPLE, 2)
    values = numbered(EXAMPLE)
    places = {(rank, 0): torch.full((target.shard_size,), -1) for rank in range(2)}
    made = reshard(source, shards_of(source, values), target, out=places)
    for key, expected in shards_of(target, values).items():
        assert made[key] is places[key]
        assert torch.equal(places[key], expected)
    too_few = {(0, 0): places[0, 0]}
    refused("shards of ranks", reshard, source, shards_of(source, values), target, out=too_few)


def test_values_of_several_dtypes_are_refused():
    values = {"b": torch.zeros(3), "ln": torch.zeros(5, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"ln has dtype torch\.float64, expected torch\.float32"):
        cut(layout_of({"b": (3,), "ln": (5,)}, 2), values, 0)
