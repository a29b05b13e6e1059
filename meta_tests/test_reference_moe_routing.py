"""Routing and blocks of the reference against authorities: transformers' modules, numpy, examples."""

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

from conformance.harness import router_oracle
from reference_impl.moe.block import MoEBlock
from reference_impl.moe.routing import MoERouter, check_routing

ROUTER, BLOCK = MoERouter(), MoEBlock()
HIDDEN, WIDTH, EXPERTS, TOP_K = 20, 7, 8, 3


@pytest.fixture
def logits():
    return torch.randn(11, EXPERTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def filled(module, seed=0):
    """The module in float64, every parameter and buffer random."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
    return module.double().eval()


def dense(weights_TK, indices_TK, experts=EXPERTS):
    out = weights_TK.new_zeros(len(weights_TK), experts)
    return out.scatter(-1, indices_TK, weights_TK)


# By numpy, a token at a time


def by_numpy(row, top_k, score, normalize, bias, groups, factor):
    """Weights by expert of one token, as a dictionary."""
    if score == "softmax":
        scores = np.exp(row - row.max())
        scores = scores / scores.sum()
    else:
        scores = 1 / (1 + np.exp(-row))
    ranked = scores if bias is None else scores + bias
    allowed = set(range(len(row)))
    if groups is not None:
        number, kept = groups
        size = len(row) // number
        members = [range(g * size, (g + 1) * size) for g in range(number)]
        best = 1 if bias is None else 2
        worth = [sum(sorted(ranked[m] for m in group)[-best:]) for group in members]
        chosen = sorted(range(number), key=lambda g: (-worth[g], g))[:kept]
        allowed = {expert for g in chosen for expert in members[g]}
    experts = sorted(allowed, key=lambda e: (-ranked[e], e))[:top_k]
    total = sum(scores[e] for e in experts) if normalize else 1.0
    return {e: scores[e] / total * factor for e in experts}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("groups", [None, (2, 1), (4, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_routing_is_that_of_numpy(logits, score, normalize, groups, biased):
    bias = torch.linspace(-1.5, 0.3, EXPERTS).double().roll(3) if biased else None
    options = {"score": score, "normalize": normalize, "groups": groups}
    weights, indices = ROUTER.moe_router(
        logits, top_k=TOP_K, selection_bias=bias, scaling_factor=2.5, **options
    )
    for row, found in zip(logits, dense(weights, indices)):
        right = by_numpy(
            row.numpy(), TOP_K, score, normalize, bias.numpy() if biased else None, groups, 2.5
        )
        assert set(found.nonzero()[:, 0].tolist()) == set(right)
        for expert, weight in right.items():
            assert found[expert] == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [None, (2, 1), (4, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_oracle_of_the_suite_chooses_as_the_reference(logits, score, groups, biased):
    bias = torch.linspace(-1.5, 0.3, EXPERTS).double().roll(3) if biased else None
    scores_TE = router_oracle.scores(logits, score)
    choice = router_oracle.choose(scores_TE, scores_TE * 0 + 1e-12, TOP_K, bias, groups)
    _, indices = ROUTER.moe_router(
        logits, top_k=TOP_K, score=score, selection_bias=bias, groups=groups
    )
    assert choice.clear.all()
    assert torch.equal(dense(torch.ones_like(indices), indices).bool(), choice.chosen)


def test_of_equal_scores_the_first_are_chosen():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 2.0, 1.0]])
    assert ROUTER.moe_router(logits, top_k=2)[1].tolist() == [[1, 3]]
    assert ROUTER.moe_router(logits, top_k=4)[1].tolist() == [[1, 3, 4, 0]]


def test_an_example_worked_by_hand():
    """Two groups; without a bias the best expert decides, with one the best two."""
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5]])
    logits = torch.log(scores / (1 - scores))
    plain = ROUTER.moe_router(logits, top_k=2, score="sigmoid", groups=(2, 1))
    assert plain[1].tolist() == [[0, 1]]
    biased = ROUTER.moe_router(
        logits, top_k=2, score="sigmoid", groups=(2, 1), selection_bias=torch.zeros(4)
    )
    assert biased[1].tolist() == [[2, 3]]
    torch.testing.assert_close(biased[0], torch.tensor([[0.6, 0.5]]))


# By transformers


@pytest.mark.parametrize("normalize", [False, True])
def test_router_of_qwen3_moe(logits, normalize):
    config = Qwen3MoeConfig(
        hidden_size=EXPERTS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=normalize,
    )
    router = Qwen3MoeTopKRouter(config)
    router.weight.data = torch.eye(EXPERTS)
    _, weights, indices = router(logits.float())
    found = dense(*ROUTER.moe_router(logits.float(), top_k=TOP_K, normalize=normalize))
    torch.testing.assert_close(found, dense(weights, indices))


@pytest.mark.parametrize("normalize", [False, True])
def test_router_of_deepseek_v3(logits, normalize):
    config = DeepseekV3Config(
        hidden_size=EXPERTS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=4,
        topk_group=2,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    bias = torch.linspace(-1.5, 0.3, EXPERTS).roll(3)
    router.weight.data, router.e_score_correction_bias = torch.eye(EXPERTS), bias
    _, weights, indices = router(logits.float())
    found = ROUTER.moe_router(
        logits.float(),
        top_k=TOP_K,
        score="sigmoid",
        normalize=normalize,
        selection_bias=bias,
        groups=(4, 2),
        scaling_factor=2.5,
    )
    torch.testing.assert_close(dense(*found), dense(weights, indices))


def test_balancing_loss_of_mixtral(logits):
    mine, theirs = (logits.float().requires_grad_() for _ in range(2))
    loss = ROUTER.moe_router(mine, top_k=TOP_K, return_balancing_loss=True)[2]
    right = load_balancing_loss_func((theirs,), EXPERTS, TOP_K)
    torch.testing.assert_close(loss, right)
    loss.backward()
    right.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_the_loss_of_balanced_routing_is_top_k():
    logits = torch.stack([torch.linspace(-1, 1, EXPERTS).roll(i) for i in range(EXPERTS)])
    loss = ROUTER.moe_router(logits, top_k=TOP_K, return_balancing_loss=True)[2]
    assert float(loss) == pytest.approx(TOP_K)


BLOCKS = {
    "qwen3": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(
            hidden_size=HIDDEN,
            moe_intermediate_size=WIDTH,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
        ),
        {"normalize": True},
    ),
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
        ),
        {"normalize": True},
    ),
    "qwen2": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(
            hidden_size=HIDDEN,
            moe_intermediate_size=WIDTH,
            shared_expert_intermediate_size=9,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            norm_topk_prob=False,
        ),
        {},
    ),
    "deepseek": (
        DeepseekV3MoE,
        DeepseekV3Config(
            hidden_size=HIDDEN,
            moe_intermediate_size=WIDTH,
            n_routed_experts=EXPERTS,
            n_shared_experts=2,
            num_experts_per_tok=TOP_K,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        {"normalize": True, "score": "sigmoid", "groups": (4, 2), "scaling_factor": 2.5},
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_transformers(name):
    kind, config, options = BLOCKS[name]
    config._experts_implementation = "eager"
    block = filled(kind(config))
    if name == "deepseek":
        options = options | {"selection_bias": block.gate.e_score_correction_bias}
    shared = getattr(block, "shared_expert", getattr(block, "shared_experts", None))
    if shared is not None:
        fused = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
        options = options | {"shared": (fused, shared.down_proj.weight)}
    if hasattr(block, "shared_expert_gate"):
        options = options | {"shared_gate": block.shared_expert_gate.weight}
    hidden = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1)).double()
    right = block(hidden)
    weights = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    found = BLOCK.moe_block(hidden, *weights, top_k=TOP_K, **options)
    # Routers compute in float32, whatever the rest is in.
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    assert float(right.abs().max()) > 1e-2


# What is refused, and empty


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 9}, "expected 1 to 8"),
        ({"top_k": 5, "groups": (4, 2)}, "expected 1 to 4"),
        ({"top_k": 1, "groups": (3, 1)}, "3 groups do not divide 8 experts"),
        ({"top_k": 1, "groups": (4, 5)}, "5 groups of 4"),
        ({"top_k": 1, "score": "tanh"}, "softmax, sigmoid"),
        ({"top_k": 1, "selection_bias": torch.zeros(1)}, r"\[8\]"),
    ],
)
def test_refusals_name_what_is_wrong(logits, options, named):
    with pytest.raises(ValueError, match=named):
        ROUTER.moe_router(logits, **options)


def test_groups_of_one_expert_are_as_good_as_it():
    """With a bias too there are no best two."""
    check_routing(4, 2, "sigmoid", torch.zeros(4), (4, 2))
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    _, indices = ROUTER.moe_router(
        logits, top_k=2, score="sigmoid", groups=(4, 2), selection_bias=torch.zeros(4)
    )
    assert indices.tolist() == [[1, 2]]


def test_no_tokens():
    logits = torch.zeros(0, EXPERTS)
    weights, indices, loss = ROUTER.moe_router(logits, top_k=2, return_balancing_loss=True)
    assert weights.shape == indices.shape == (0, 2)
    assert float(loss) == 0
