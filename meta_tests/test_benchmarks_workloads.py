"""Workloads of the kernel benchmarks: their work, their oracles, and outputs that are wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from conformance.benchmarks import routing
from conformance.benchmarks.attention_workloads import AttentionWorkload, decode, oracle, prefill
from conformance.benchmarks.experts_workloads import (
    FACTORS,
    PROJECTIONS,
    CompressedWorkload,
    ExpertsWorkload,
    Shape,
    reconstruct,
)
from conformance.benchmarks.running import Running, ring_size
from conformance.benchmarks.workload import (
    NoSuchWorkload,
    NotOffered,
    WrongOutput,
    bytes_of,
    method_of,
    workloads,
)
from conformance.harness.failures import Declined
from conformance.harness.resolve import resolve
from conformance.implementations.grouped_experts import (
    FoldedGroupedExperts,
    TorchGroupedExperts,
)
from conformance.implementations.reference import Reference
from conformance.implementations.torch_sdpa import TorchSDPA, TorchSDPAMath

TINY = Shape("tiny", 6, 2, 16, 24)
PREFILL = prefill(64, 32, (4, 2), 16, True, "float32")
TRAIN = prefill(32, 32, (4, 2), 16, True, "float32", kind="train")
FULL = prefill(32, 32, (4, 2), 16, False, "float32")
DECODE = decode(3, 40, (4, 2), 16, "float32")
DENSE = ExpertsWorkload(TINY, 40, "uniform", "float32")
COMPRESSED = CompressedWorkload(TINY, 4, 40, "skewed", "float32")
EVERY = [PREFILL, TRAIN, FULL, DECODE, DENSE, COMPRESSED]


def reference(workload):
    return method_of(Reference(), workload)


# Names and selection


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_are_unique_and_plain(device):
    every = workloads(device)
    names = [each.name for each in every]
    assert len(set(names)) == len(names)
    assert all(name.replace(".", "").replace("-", "").replace("_", "").isalnum() for name in names)
    assert {each.contract for each in every} == {"attention", "experts", "shared_core_block"}


def test_name_of_a_prefill():
    name = "attention.prefill.b2.32x32.h4x2.d16.causal.float32"
    assert PREFILL.name == name


@pytest.mark.parametrize("name", [each.name for each in workloads("cpu")])
def test_a_name_selects_its_own_workload_alone(name):
    assert [each.name for each in workloads("cpu", only=[name])] == [name]


def test_globs_select():
    found = workloads("cuda", only=["attention.decode.*", "experts.mixtral*.t1.*"])
    assert {each.name.rpartition(".")[0].split(".")[0] for each in found} == {
        "attention",
        "experts",
    }
    assert len(found) < len(workloads("cuda"))


def test_shapes_of_real_models_are_there():
    names = [each.name for each in workloads("cuda")]
    for part in (
        *("1024x1024", "4096x4096", "16384x16384", "d64.causal", "d64.full", "d128.full"),
        *("h32x8", "decode.b1.1x1024", "decode.b64.1x32768", "train"),
        *("qwen3-30b-a3b.e128k8.2048x768.t1.", "mixtral-8x7b.e8k2.4096x14336.t16384.uniform"),
        *("shared_core_block.qwen3-30b-a3b.e128k8.2048x768.r64.t16384.skewed",),
    ):
        assert any(part in name for name in names), part


def test_a_glob_that_matches_nothing_is_one_line():
    with pytest.raises(
        NoSuchWorkload, match=r"no workload for cpu is called 'nothing\*'"
    ) as caught:
        workloads("cpu", only=["attention.*", "nothing*"])
    assert "\n" not in str(caught.value)
    with pytest.raises(NoSuchWorkload, match="no workloads for 'tpu'"):
        workloads("tpu")


# Work


@pytest.mark.parametrize("workload", [FULL, DECODE])
def test_attention_flops_are_those_that_torch_counts(workload):
    inputs = workload.inputs("cpu", 0)
    with FlopCounterMode(display=False) as counted:
        workload.bind(TorchSDPAMath().attention, inputs)()
    assert workload.work().flops == counted.get_total_flops()


def test_backward_flops_are_two_and_a_half_times_the_forward_s():
    """torch's own formula recomputes the scores, as FlashAttention does: five products for two."""
    from torch.utils.flop_counter import sdpa_backward_flop, sdpa_flop

    shape = (2, 4, 32, 16)
    forward = sdpa_flop(shape, shape, shape)
    backward = sdpa_backward_flop(shape, shape, shape, shape)
    full = prefill(64, 32, (4, 4), 16, False, "float32", kind="train")
    assert full.work().flops == forward + backward


def test_causal_halves():
    assert PREFILL.work().flops * 2 == prefill(64, 32, (4, 2), 16, False, "float32").work().flops


def test_expert_flops_are_those_that_torch_counts():
    inputs = DENSE.inputs("cpu", 0)
    with FlopCounterMode(display=False) as counted:
        DENSE.bind(Reference().experts, inputs)()
    assert DENSE.work().flops == counted.get_total_flops()


def test_compressed_flops_are_those_of_the_folded_block():
    """The reference's folded form by hand: products on rows, without those of the fold."""
    shape, rank, tokens = TINY, 4, 40
    pairs = tokens * shape.slots
    cores = 3 * 2 * tokens * shape.hidden * shape.intermediate
    low_rank = 3 * 2 * pairs * 2 * rank * (shape.hidden + shape.intermediate)
    router = 2 * tokens * shape.hidden * shape.experts
    assert COMPRESSED.work().flops == cores + low_rank + router


def test_bytes_of_a_decoding_step_are_its_cache_and_a_little():
    inputs = DECODE.inputs("cpu", 0)
    cache = 2 * 3 * 2 * 40 * 16 * 4
    assert bytes_of([inputs["k"], inputs["v"]]) == cache
    assert DECODE.work().bytes == cache + 2 * bytes_of(inputs["q"])


def test_bytes_of_a_train_step():
    inputs = TRAIN.inputs("cpu", 0)
    q, kv = bytes_of(inputs["q"]), bytes_of([inputs["k"], inputs["v"]])
    # reads q, k, v and the output's gradient; writes the output and the gradients of q, k, v
    assert TRAIN.work().bytes == (q + kv + q) + (q + q + kv)


def test_bytes_of_experts_count_those_that_are_reached():
    one = ExpertsWorkload(TINY, 1, "uniform", "float32")
    of_an_expert = 3 * 16 * 24 * 4
    rows = 2 * 16 * 4 + 2 * (8 + 4)
    assert one.work().bytes == rows + 2 * of_an_expert
    many = ExpertsWorkload(TINY, 4000, "uniform", "float32")
    assert many.work().bytes == 4000 * rows + 6 * of_an_expert


# Routing


@pytest.mark.parametrize("skew", ["uniform", "skewed"])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_experts_reached_is_what_routings_reach(skew, tokens):
    found = [
        routing.routing(tokens, 32, 4, skew, "cpu", seed)[0].unique().numel() for seed in range(300)
    ]
    mean = sum(found) / len(found)
    error = 5 * math.sqrt(32 / 4 / len(found))
    assert routing.experts_reached(tokens, 32, 4, skew) == pytest.approx(mean, abs=error)


def test_an_expert_is_chosen_once_by_a_token_and_weights_add_up():
    indices, weights = routing.routing(200, 8, 3, "skewed", "cpu", 0)
    assert all(len(set(row)) == 3 for row in indices.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(200))


def test_skewed_routing_has_a_favourite():
    counts = routing.routing(4000, 32, 4, "skewed", "cpu", 0)[0].flatten().bincount(minlength=32)
    even = routing.routing(4000, 32, 4, "uniform", "cpu", 0)[0].flatten().bincount(minlength=32)
    assert counts.max() > 3 * even.max()


# Inputs


@pytest.mark.parametrize("workload", EVERY, ids=lambda w: w.name)
def test_inputs_are_random_and_repeatable(workload):
    one, again, other = (workload.inputs("cpu", seed) for seed in (3, 3, 4))
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name])
        assert tensor.unique().numel() > 1, f"{name} is constant"
        if name != "router":
            assert not torch.equal(tensor, other[name]), f"{name} does not depend on the seed"


@pytest.mark.parametrize("workload", EVERY, ids=lambda w: w.name)
def test_refilling_changes_numbers_and_not_tensors(workload):
    inputs = workload.inputs("cpu", 1)
    kept, before = dict(inputs), {name: t.detach().clone() for name, t in inputs.items()}
    workload.refill(inputs, 2)
    assert all(inputs[name] is kept[name] for name in kept)
    changed = {name for name in inputs if not torch.equal(inputs[name], before[name])}
    assert changed == set(workload.refilled) & set(inputs)


def test_compressed_tokens_go_where_the_routing_sends_them():
    workload = CompressedWorkload(Shape("small", 16, 2, 256, 32), 4, 500, "skewed", "float32")
    inputs = workload.inputs("cpu", 5)
    wanted, _ = routing.routing(500, 16, 2, "skewed", "cpu", 5)
    found = (inputs["hidden"][0] @ inputs["router"].mT).topk(2).indices
    share = (found[..., None] == wanted[:, None]).any(-1).float().mean()
    assert share > 0.9


# Oracles


def test_attention_oracle_is_torch_s_own():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 600, 8, generator=g, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(620, 8, generator=g, dtype=torch.float64, requires_grad=True) for _ in "kv")
    gradient = torch.randn(3, 600, 8, generator=g, dtype=torch.float64)
    mask = torch.ones(600, 620, dtype=torch.bool).tril(20)
    many = (x.expand(3, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, *many, attn_mask=mask)
    expected = [out, *torch.autograd.grad(out, (q, k, v), gradient)]
    given = oracle(q, k, v, gradient, causal=True)
    for (found, terms), right in zip(given, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
        assert terms.shape == found.shape[:-1]
        assert bool((found.norm(dim=-1) < 10 * terms).all())


def test_the_size_of_terms_does_not_cancel():
    """A query with one key has a gradient of zero: a difference of two numbers that are not."""
    g = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(1, 6, 4, generator=g, dtype=torch.float64) for _ in range(4))
    _, (dq, terms), *_ = oracle(q, k[0], v[0], gradient, causal=True)
    assert float(dq[0, 0].abs().max()) < 1e-12
    products = gradient[0, 0] * v[0, 0]
    size = 2 * (products.sum() ** 2 + products.square().sum()).sqrt() * k[0, 0].norm() * 4**-0.5
    torch.testing.assert_close(terms[0, 0], size)


def test_reconstruction_is_the_reference_s():
    inputs = COMPRESSED.inputs("cpu", 0)
    parts = {name: inputs[f"down_proj.{name}"].double() for name in FACTORS}
    layer = Reference().shared_core(**parts)
    torch.testing.assert_close(reconstruct(parts, 2), layer.reconstruct(2))


@pytest.mark.parametrize("workload", EVERY, ids=lambda w: w.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_reference_is_right(workload, seed):
    Running(workload, reference(workload), "cpu", seed=seed, ring=2).check()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("workload", "adapter"),
    [
        (prefill(256, 256, (4, 2), 32, True, "float32"), TorchSDPA()),
        (prefill(256, 256, (4, 2), 32, True, "float32", kind="train"), TorchSDPA()),
        (decode(2, 300, (4, 2), 32, "float32"), TorchSDPA()),
        (ExpertsWorkload(TINY, 64, "skewed", "float32"), TorchGroupedExperts()),
        (CompressedWorkload(TINY, 4, 64, "uniform", "float32"), FoldedGroupedExperts()),
    ],
    ids=["prefill", "train", "decode", "experts", "compressed"],
)
def test_right_kernels_pass_in_16_bits(workload, adapter, dtype):
    from dataclasses import replace

    workload = replace(workload, dtype=dtype)
    Running(workload, method_of(adapter, workload), "cpu", seed=0, ring=2).check()


# What is wrong


def wrong(workload, method, seed=0):
    """The line that a check ends with."""
    running = Running(workload, method, "cpu", seed=seed, ring=2)
    with pytest.raises(WrongOutput) as caught:
        running.check()
    assert "\n" not in str(caught.value)
    assert workload.name in str(caught.value)
    return str(caught.value)


class Cached:
    """Attention that keeps answers by one property of its inputs."""

    def __init__(self, key):
        self.key, self.kept = key, {}

    def attention(self, q, k, v, *, causal=False):
        found = self.key(q)
        if found not in self.kept:
            self.kept[found] = Reference().attention(q, k, v, causal=causal)
        return self.kept[found]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (lambda q: q.shape, "off by|same output"),
        (lambda q: q.data_ptr(), "same output"),
        (id, "same output"),
    ],
    ids=["shape", "address", "object"],
)
def test_a_cached_answer_is_wrong(key, says):
    line = wrong(PREFILL, Cached(key).attention)
    assert any(part in line for part in says.split("|"))


def test_a_block_that_keeps_its_first_answer_is_wrong():
    def block(router, *projections, top_k, normalize=False):
        real = Reference().shared_core_block(router, *projections, top_k=top_k, normalize=normalize)
        kept = []

        def forward(hidden):
            kept.append(real(hidden))
            return kept[0]

        return forward

    assert "same output" in wrong(COMPRESSED, block)


def test_right_on_the_first_call_only_is_wrong():
    calls = []

    def attention(q, k, v, *, causal=False):
        calls.append(1)
        out = Reference().attention(q, k, v, causal=causal)
        return out if len(calls) == 1 else out * 1.01

    assert "off by 0.01" in wrong(PREFILL, attention)


def test_a_launch_that_was_timed_is_looked_at():
    calls = []

    def attention(q, k, v, *, causal=False):
        calls.append(1)
        out = Reference().attention(q, k, v, causal=causal)
        return out * 1.01 if len(calls) == 3 else out

    running = Running(PREFILL, attention, "cpu", seed=0, ring=2)
    running.check()
    running.launch(0)
    with pytest.raises(WrongOutput):
        running.check()


def zero_last_row(out):
    out = out.clone()
    out[..., -1, :] = 0
    return out


@pytest.mark.parametrize(
    "spoil",
    [
        zero_last_row,
        lambda out: out * 1.01,
        lambda out: out.roll(1, 1),
        lambda out: out.roll(1, 0),
        lambda out: out * torch.nan,
        lambda out: out[:, :1],
        lambda out: None,
    ],
    ids=["zero row", "gain", "heads", "batch", "nan", "shape", "none"],
)
def test_wrong_attention(spoil):
    wrong(
        PREFILL,
        lambda q, k, v, *, causal=False: spoil(Reference().attention(q, k, v, causal=causal)),
    )


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_wrong_gradient(index):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            return tuple(t.clone() for t in tensors)

        @staticmethod
        def backward(ctx, *gradients):
            return tuple(g * (1.01 if i == index - 1 else 1) for i, g in enumerate(gradients))

    def attention(q, k, v, *, causal=False):
        out = Reference().attention(*Scaled.apply(q, k, v), causal=causal)
        return out * 1.01 if index == 0 else out

    assert ("the output", "of q", "of k", "of v")[index] in wrong(TRAIN, attention)


@pytest.mark.parametrize("workload", [DENSE, COMPRESSED], ids=lambda w: w.contract)
@pytest.mark.parametrize("spoil", [zero_last_row, lambda out: out * 1.01, lambda out: out[:1, :1]])
def test_wrong_experts(workload, spoil):
    if workload is DENSE:
        wrong(DENSE, lambda *given: spoil(Reference().experts(*given)))
        return

    def block(*given, **options):
        real = Reference().shared_core_block(*given, **options)
        return lambda hidden: spoil(real(hidden))

    wrong(COMPRESSED, block)


def test_a_missing_contract_and_a_missing_option():
    with pytest.raises(NotOffered, match="does not offer experts"):
        method_of(TorchSDPA(), DENSE)
    with pytest.raises(Declined, match="does not take 'causal'"):
        Running(PREFILL, lambda q, k, v: q, "cpu", seed=0)


# The ring


def test_ring_is_larger_than_the_cache():
    assert ring_size(1000, 1000) == 4
    assert ring_size(3000, 1000) == 2
    assert ring_size(10**9, 1000) == 2
    assert ring_size(1, 10**6) == 64


def test_turns_go_around_the_ring():
    seen = []

    def attention(q, k, v, *, causal=False):
        seen.append(q)
        return q

    running = Running(PREFILL, attention, "cpu", seed=0, ring=3)
    for turn in range(7):
        running.launch(turn)
    places = [next(i for i, r in enumerate(running.ring) if r["q"] is q) for q in seen]
    assert places == [0, 1, 2, 0, 1, 2, 0]
    assert not torch.equal(running.ring[0]["q"], running.ring[1]["q"])


def test_sides_with_one_seed_have_the_same_inputs():
    one, other = (Running(DENSE, Reference().experts, "cpu", seed=7, ring=2) for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(one.ring, other.ring) for n in a)


# Our own implementations


@pytest.mark.parametrize("shape", [TINY, Shape("odd", 5, 3, 12, 20)], ids=str)
def test_folded_grouped_products_are_the_reference_s_in_float64(shape):
    workload = CompressedWorkload(shape, 3, 31, "skewed", "float64")
    inputs = workload.inputs("cpu", 0)
    projections = [{n: inputs[f"{p}.{n}"] for n in FACTORS} for p in PROJECTIONS]
    given = (inputs["router"], *projections)
    blocks = [
        maker.shared_core_block(*given, top_k=shape.slots, normalize=True)
        for maker in (Reference(), FoldedGroupedExperts())
    ]
    with torch.no_grad():
        expected, found = (block(inputs["hidden"]) for block in blocks)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_folded_block_sees_changes_of_its_factors():
    inputs = COMPRESSED.inputs("cpu", 0)
    projections = [{n: inputs[f"{p}.{n}"] for n in FACTORS} for p in PROJECTIONS]
    block = FoldedGroupedExperts().shared_core_block(inputs["router"], *projections, top_k=2)
    with torch.no_grad():
        before = block(inputs["hidden"])
        assert torch.equal(block(inputs["hidden"]), before)
        for parameter in block.layers["down_proj"].parameters():
            parameter.zero_()
        assert not block(inputs["hidden"]).any()


@pytest.mark.parametrize(
    "name", ["reference", "transformers-experts-grouped", "transformers-experts-batched"]
)
def test_bundled_experts_run_as_workloads(name):
    method = method_of(resolve(name).adapter, DENSE)
    Running(DENSE, method, "cpu", seed=0, ring=2).check()


def test_a_workload_is_a_value():
    assert AttentionWorkload("decode", 3, 1, 40, 4, 2, 16, False, "float32") == DECODE
    assert hash(DENSE) == hash(ExpertsWorkload(TINY, 40, "uniform", "float32"))
