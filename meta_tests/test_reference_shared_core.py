"""Shared cores of the reference against numpy in float64, transformers' blocks, and the formulas."""

import numpy as np
import pytest
import torch
import yaml

from reference_impl.shared_core.block import FoldedMoEBlock, SharedCoreBlock
from reference_impl.shared_core.layer import FACTORS, SharedCore
from reference_impl.shared_core.statistics import (
    FILE_NAME,
    CompressionStatistics,
    CompressionStats,
    contradictions_of,
)

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def factors(generator, experts, d_in, d_out, rank, dtype=torch.float64):
    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    core = random(d_out, d_in) / d_in**0.5
    inner = random(experts, d_in, rank) / d_in**0.5, random(experts, d_in, rank)
    outer = random(experts, d_out, rank) / d_out**0.5, random(experts, d_out, rank)
    return dict(zip(FACTORS, (core, *inner, *outer)))


def in_numpy(given):
    """The weights of all experts, multiplied out."""
    core, u_in, v_in, u_out, v_out = (given[name].double().numpy() for name in FACTORS)
    d_out, d_in = core.shape
    weights = [
        (np.eye(d_out) + u_out[e] @ v_out[e].T) @ core @ (np.eye(d_in) + u_in[e] @ v_in[e].T)
        for e in range(len(u_in))
    ]
    return np.stack(weights)


# Layers


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(7, 11, 2), (9, 9, 3), (12, 5, 1)])
def test_layer_is_what_numpy_multiplies_out(d_in, d_out, rank):
    generator = torch.Generator().manual_seed(5)
    given = factors(generator, 3, d_in, d_out, rank)
    layer, weights = SharedCore().shared_core(**given), in_numpy(given)
    x = torch.randn(4, d_in, generator=generator, dtype=torch.float64)
    base, a, b = (t.detach().numpy() for t in layer.fold())
    for expert, weight in enumerate(weights):
        found = layer.reconstruct(expert).detach().numpy()
        np.testing.assert_allclose(found, weight, rtol=0, atol=1e-12)
        rows = layer(x, expert).detach().numpy()
        np.testing.assert_allclose(rows, x.numpy() @ weight.T, rtol=0, atol=1e-12)
        np.testing.assert_allclose(base + a[expert] @ b[expert], weight, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    given = factors(torch.Generator().manual_seed(6), 2, 4, 5, 2)
    layer = SharedCore().shared_core(**given)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x, 1))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_a_core_of_published_size_is_counted_without_memory():
    with torch.device("meta"):
        shapes = ((4096, 14336), (8, 14336, 64), (8, 14336, 64), (8, 4096, 64), (8, 4096, 64))
        layer = SharedCore().shared_core(*(torch.empty(shape) for shape in shapes))
    found = layer.count_parameters()
    assert (found["total"], found["original"]) == (77_594_624, 469_762_048)
    assert found["total"] == sum(p.numel() for p in layer.parameters())


def test_small_updates_survive_sixteen_bits():
    given = factors(torch.Generator().manual_seed(7), 2, 64, 48, 2, torch.bfloat16)
    for side in ("in", "out"):
        v = given[f"v_{side}"].float()
        size = v.square().sum(-1, keepdim=True)
        given[f"u_{side}"] = (0.75 * 2.0**-8 * v / size).to(torch.bfloat16)
    right, core = in_numpy(given)[0], given["core"].double().numpy()
    found = SharedCore().shared_core(**given).reconstruct(0).detach().double().numpy()
    gain = lambda weight: float((weight * core).sum() / (core * core).sum() - 1)
    assert gain(right) > 0.005
    assert abs(gain(found) - gain(right)) < 0.0005


# Blocks


def dense_weights(given):
    """Fused weights as transformers 5 holds them: [E, 2 I, H] and [E, H, I]."""
    weights = {name: torch.from_numpy(in_numpy(given[name])) for name in PROJECTIONS}
    return torch.cat([weights["gate_proj"], weights["up_proj"]], 1), weights["down_proj"]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("normalize", "top_k"), [(True, 2), (False, 2), (True, 1), (False, 5)])
def test_block_is_transformers_block_with_the_reconstructed_experts(normalize, top_k, folded):
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    generator = torch.Generator().manual_seed(8)
    sizes = {"gate_proj": (8, 14), "up_proj": (8, 14), "down_proj": (14, 8)}
    given = {
        name: factors(generator, 5, d_in, d_out, rank)
        for rank, (name, (d_in, d_out)) in enumerate(sizes.items(), 1)
    }
    router = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    config = Qwen3MoeConfig(
        hidden_size=8,
        moe_intermediate_size=14,
        num_experts=5,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalize,
    )
    config._experts_implementation = "eager"
    theirs = Qwen3MoeSparseMoeBlock(config).double()
    gate_up, down = dense_weights(given)
    with torch.no_grad():
        theirs.gate.weight.copy_(router)
        theirs.experts.gate_up_proj.copy_(gate_up)
        theirs.experts.down_proj.copy_(down)
    adapter = SharedCoreBlock()
    adapter.block_type = FoldedMoEBlock if folded else adapter.block_type
    ours = adapter.shared_core_block(router, **given, top_k=top_k, normalize=normalize)
    hidden = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected, found = theirs(hidden), ours(hidden)
    expected = expected[0] if isinstance(expected, tuple) else expected
    # Their softmax is in float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# Statistics

MIXTRAL = [
    dict(
        layer_idx=0,
        projection=name,
        num_experts=8,
        num_active_experts=2,
        d_in=d_in,
        d_out=d_out,
        rank=64,
    )
    for name, (d_in, d_out) in zip(PROJECTIONS, ((4096, 14336), (4096, 14336), (14336, 4096)))
]


def test_statistics_are_the_counts_of_tensors():
    entries = [
        dict(
            layer_idx=layer,
            projection=name,
            num_experts=3 + layer,
            num_active_experts=2,
            d_in=5 + layer,
            d_out=9,
            rank=2,
        )
        for layer in (1, 4)
        for name in PROJECTIONS
    ]
    found = CompressionStatistics().compression_statistics(entries).aggregate()
    total = original = 0
    for entry in entries:
        sizes = (entry["num_experts"], entry["d_in"], entry["d_out"], entry["rank"])
        layer = SharedCore().shared_core(**factors(torch.Generator(), *sizes))
        total += sum(p.numel() for p in layer.parameters())
        original += entry["num_experts"] * layer.reconstruct(0).numel()
    assert found["total_params_compressed"] == total
    assert found["total_params_original"] == original
    assert found["total_compression_ratio"] == total / original
    assert (found["num_entries"], found["num_layers_compressed"]) == (6, 2)


def test_printed_figures_need_another_rank():
    found = CompressionStatistics().compression_statistics(MIXTRAL).aggregate()
    assert found["total_params_compressed"] == 232_783_872
    assert round(found["total_compression_ratio"], 4) == 0.1652
    other = [entry | {"rank": 105} for entry in MIXTRAL]
    found = CompressionStatistics().compression_statistics(other).aggregate()
    assert found["total_params_compressed"] == 269_058_048
    assert round(found["total_compression_ratio"], 2) == 0.19


def test_file_is_written_whole_and_read_back(tmp_path):
    stats = CompressionStats(MIXTRAL)
    stats.save(tmp_path / "new")
    found = yaml.safe_load((tmp_path / "new" / FILE_NAME).read_text())
    assert found == stats.aggregate()
    assert list(found) == list(stats.aggregate())
    assert contradictions_of(tmp_path / "new") == []
    assert [child.name for child in (tmp_path / "new").iterdir()] == [FILE_NAME]


def test_contradictions_say_what_is_and_what_it_is_by_the_entries(tmp_path):
    document = CompressionStats(MIXTRAL).aggregate() | {"total_compression_ratio": 0.19}
    (tmp_path / FILE_NAME).write_text(yaml.safe_dump(document))
    (line,) = contradictions_of(tmp_path)
    assert line.startswith("total_compression_ratio is 0.19, the entries give 0.16517")


@pytest.mark.parametrize(
    "text", ["a: [", "just words", "- 1", "a: !!python/object/apply:os.getcwd []"]
)
def test_damaged_files_are_one_clear_error(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=FILE_NAME):
        contradictions_of(tmp_path)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=FILE_NAME):
        contradictions_of(tmp_path)


def test_entries_are_added_as_in_the_source():
    stats = CompressionStats()
    stats.add_layer_stats(0, "gate_proj", 8, 4096, 14336, 64, num_active_experts=2)
    assert stats.get_aggregate_stats() == CompressionStats(MIXTRAL[:1]).aggregate()
    with pytest.raises(ValueError, match="twice"):
        stats.add_layer_stats(0, "gate_proj", 8, 4096, 14336, 32, num_active_experts=2)
    with pytest.raises(ValueError, match="rank"):
        stats.add_layer_stats(1, "gate_proj", 8, 4096, 14336, True, num_active_experts=2)
