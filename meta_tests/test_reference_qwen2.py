"""The reference of Qwen2, held against transformers, a second formulation, and worked examples."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config as TheirConfig
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

from reference_impl.hf_directory import EMBEDDING, HEAD
from reference_impl.qwen2 import generate, load_model, load_shards, sharding
from reference_impl.qwen2.config import read_config
from reference_impl.qwen2.loading import shard_rules
from reference_impl.ranks import RankFailed, in_process
from reference_impl.stored import CheckpointError

SHAPES = {
    "4 heads, 2 kv": {"heads": 4, "kv": 2, "width": 16, "tied": False, "vocab": 101},
    "6 heads, 3 kv, tied": {"heads": 6, "kv": 3, "width": 10, "tied": True, "vocab": 97},
    "8 heads, 2 kv, explicit width": {
        "heads": 8,
        "kv": 2,
        "width": 12,
        "tied": False,
        "vocab": 103,
    },
    "4 heads, 1 kv, tied": {"heads": 4, "kv": 1, "width": 14, "tied": True, "vocab": 64},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def their_model(shape, dtype=torch.float32):
    """A model of transformers whose every parameter is random."""
    config = TheirConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        head_dim=shape["width"],
        intermediate_size=96,
        vocab_size=shape["vocab"],
        tie_word_embeddings=shape["tied"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )
    torch.manual_seed(7)
    model = Qwen2ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=dtype)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, tmp_path_factory):
    """A model of transformers and the directory that it was saved to."""
    model = their_model(SHAPES[request.param])
    folder = tmp_path_factory.mktemp("qwen2")
    model.save_pretrained(folder, max_shard_size="100KB")
    return model, folder


def legal_ranks(model):
    config = model.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    return [n for n in (1, 2, 3, 4) if heads % n == 0 and (kv % n == 0 or n % kv == 0)]


def random_ids(model, batch=3, tokens=11):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, model.config.vocab_size, (batch, tokens), generator=generator)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_logits_are_those_of_transformers_at_every_number_of_ranks(saved):
    model, folder = saved
    ids = random_ids(model)
    with torch.no_grad():
        expected = model(ids).logits
    for ranks in legal_ranks(model):
        results = in_process(ranks, lambda group: load_model(folder, ranks=group)(ids)[0])
        assert relative(results[0], expected) < 1e-5  # seen: 1e-6
        assert all(torch.equal(each, results[0]) for each in results)


@pytest.fixture
def transformers_in_float64(monkeypatch):
    """transformers without its casts to float32, which are those of norms and rotary tables."""

    def norm(self, x):
        return (
            self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )

    def tables(self, x, position_ids):
        theta, width = 1e6, self.config.head_dim
        pairs = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles = position_ids[..., None].to(torch.float64) * theta**-pairs
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen2.Qwen2RotaryEmbedding, "forward", tables)


@pytest.mark.parametrize("name", SHAPES)
def test_float64_logits_are_those_of_transformers(name, tmp_path, transformers_in_float64):
    model = their_model(SHAPES[name], torch.float64)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(tmp_path)
    ids = random_ids(model)
    with torch.no_grad():
        expected = model(ids).logits
    assert expected.dtype == torch.float64
    for ranks in legal_ranks(model):
        logits = in_process(ranks, lambda group: load_model(tmp_path, ranks=group)(ids)[0])
        assert relative(logits[0], expected) < 1e-10  # seen: 1e-15


def test_caches_are_those_of_transformers_without_replicas(saved):
    model, folder = saved
    ids = random_ids(model)
    with torch.no_grad():
        theirs = model(ids, use_cache=True).past_key_values
    heads = model.config.num_key_value_heads
    for ranks in legal_ranks(model):
        caches = in_process(ranks, lambda group: load_model(folder, ranks=group)(ids)[1])
        for layer, entry in enumerate(theirs.layers):
            for which, expected in enumerate((entry.keys, entry.values)):
                parts = [cache.layers[layer][which] for cache in caches]
                replicas = max(1, ranks // heads)
                for rank, part in enumerate(parts):
                    assert torch.equal(part, parts[rank // replicas * replicas])
                found = torch.cat(parts[::replicas], dim=1)
                assert found.shape == expected.shape
                assert relative(found, expected) < 1e-5


def test_greedy_tokens_are_those_of_transformers(saved):
    model, folder = saved
    ids = random_ids(model)
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    for ranks in legal_ranks(model):
        for found in in_process(
            ranks, lambda group: generate(load_model(folder, ranks=group), ids, max_new_tokens=8)
        ):
            assert torch.equal(found, expected)


def test_padded_logits_are_those_of_transformers(saved):
    model, folder = saved
    ids = random_ids(model)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, :4] = False
    valid[1, :1] = False
    positions = (valid.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=valid.long(), position_ids=positions).logits
    found, _ = load_model(folder)(ids, valid=valid)
    assert relative(found[valid], expected[valid]) < 1e-5


@pytest.mark.parametrize("steps", [(11,), (1,) * 11, (4, 7), (1, 3, 3, 4), (8, 1, 1, 1)])
def test_steps_with_a_cache_are_as_all_at_once(saved, steps):
    model, folder = saved
    ids = random_ids(model)
    ours = load_model(folder, dtype=torch.float64)
    whole, _ = ours(ids)
    cache, found = None, []
    for step in ids.split(steps, dim=1):
        before = None if cache is None else [part.clone() for each in cache.layers for part in each]
        logits, following = ours(step, cache=cache)
        if cache is not None:
            after = [part for each in cache.layers for part in each]
            assert all(map(torch.equal, before, after)), "the cache that was given has changed"
        cache = following
        found.append(logits)
    assert relative(torch.cat(found, 1), whole) < 1e-13


def numpy_logits(state, config, ids):
    """The formulas of one process, in numpy; a second formulation."""
    heads, kv, width = config.num_heads, config.num_kv_heads, config.head_dim
    weight = lambda name: state[name].double().numpy()
    norm = lambda x, name: (
        x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight(name)
    )
    tokens = ids.shape[-1]
    angles = np.arange(tokens)[:, None] * config.rope_theta ** (-np.arange(0, width, 2) / width)

    def rotated(x):
        a, b = x[:, : width // 2], x[:, width // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    rows = []
    for row in ids.numpy():
        h = weight(EMBEDDING)[row]
        for layer in range(config.num_layers):
            at = f"model.layers.{layer}."
            x = norm(h, f"{at}input_layernorm.weight")
            q, k, v = (
                x @ weight(f"{at}self_attn.{n}_proj.weight").T
                + weight(f"{at}self_attn.{n}_proj.bias")
                for n in "qkv"
            )
            out = []
            for head in range(heads):
                group = head // (heads // kv)
                own, theirs = (
                    slice(head * width, (head + 1) * width),
                    slice(group * width, (group + 1) * width),
                )
                scores = rotated(q[:, own]) @ rotated(k[:, theirs]).T / math.sqrt(width)
                scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out.append(weights / weights.sum(-1, keepdims=True) @ v[:, theirs])
            h = h + np.concatenate(out, -1) @ weight(f"{at}self_attn.o_proj.weight").T
            x = norm(h, f"{at}post_attention_layernorm.weight")
            gate, up = (x @ weight(f"{at}mlp.{n}_proj.weight").T for n in ("gate", "up"))
            h = h + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{at}mlp.down_proj.weight").T
        head = EMBEDDING if config.tied else HEAD
        rows.append(norm(h, "model.norm.weight") @ weight(head).T)
    return torch.from_numpy(np.stack(rows))


def state_of(folder):
    state = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        state |= load_file(path)
    return state


def test_float64_logits_are_those_of_numpy(saved):
    model, folder = saved
    ids = random_ids(model)
    found, _ = load_model(folder, dtype=torch.float64)(ids)
    expected = numpy_logits(state_of(folder), read_config(folder), ids)
    assert relative(found, expected) < 1e-12


# Which part of each weight a rank holds, worked by hand


def rows_of(shard):
    return [list(part) for part in shard.ranges]


def test_four_heads_two_kv_on_two_ranks():
    assert rows_of(sharding.query_shard(4, 16, 1, 2)) == [list(range(32, 64))]
    assert rows_of(sharding.key_value_shard(4, 2, 16, 1, 2)) == [list(range(16, 32))]


def test_four_heads_two_kv_on_four_ranks():
    kv = [sharding.key_value_shard(4, 2, 16, rank, 4) for rank in range(4)]
    assert [shard.ranges[0].start // 16 for shard in kv] == [0, 0, 1, 1]
    for rank in range(4):
        own = sum(s.size for s in (sharding.query_shard(4, 16, rank, 4), kv[rank], kv[rank]))
        assert own == 48
        assert sharding.row_shard(64, rank, 4).ranges == (range(16 * rank, 16 * rank + 16),)
        assert sharding.row_shard(96, rank, 4).ranges == (range(24 * rank, 24 * rank + 24),)


def test_eight_heads_four_kv_on_two_ranks():
    assert sharding.kv_head_range(8, 4, 1, 2) == range(2, 4)


@pytest.mark.parametrize(
    ("heads", "kv", "ranks", "named"),
    [
        (6, 2, 3, ("2", "3")),
        (6, 3, 2, ("3", "2")),
        (14, 2, 4, ("14", "4")),
        (4, 2, 0, ("0",)),
        (5, 2, 1, ("5", "2")),
    ],
)
def test_sizes_that_do_not_fit_are_refused_and_named(heads, kv, ranks, named):
    with pytest.raises(ValueError, match="heads") as caught:
        sharding.check_heads(heads, kv, ranks)
    assert all(size in str(caught.value) for size in named)


@pytest.mark.parametrize("rank", [-1, 2, 5])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(ValueError, match=f"no rank {rank} among 2"):
        sharding.vocabulary_shard(10, rank, 2)


def test_a_vocabulary_that_ranks_do_not_divide_is_filled_up():
    shards = [sharding.vocabulary_shard(10, rank, 4) for rank in range(4)]
    assert [(shard.ranges[0], shard.padding) for shard in shards] == [
        (range(3), 0),
        (range(3, 6), 0),
        (range(6, 9), 0),
        (range(9, 10), 2),
    ]
    assert [
        (s.ranges[0], s.padding) for s in (sharding.vocabulary_shard(2, r, 4) for r in range(4))
    ][2:] == [(range(2, 2), 1), (range(2, 2), 1)]


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_fused_projections_by_hand(layout):
    # Four query heads and two key/value heads, of one channel each.
    names = {
        "concatenated": ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"],
        "interleaved": ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"],
    }[layout]
    shards = sharding.fused_qkv_shard(4, 2, 1, layout, 1, 2)
    assert [[names[i] for part in shard.ranges for i in part] for shard in shards] == [
        ["q2", "q3"],
        ["k1"],
        ["v1"],
    ]
    names = {"concatenated": "g0 g1 g2 g3 u0 u1 u2 u3", "interleaved": "g0 u0 g1 u1 g2 u2 g3 u3"}
    names = names[layout].split()
    shards = sharding.fused_gate_up_shard(4, layout, 1, 2)
    assert [[names[i] for i in shard.ranges[0]] for shard in shards] == [["g2", "g3"], ["u2", "u3"]]


def test_shards_of_all_ranks_are_the_checkpoint(saved):
    model, folder = saved
    state, config = state_of(folder), read_config(folder)
    for ranks in legal_ranks(model):
        parts = [load_shards(folder, rank=rank, ranks=ranks) for rank in range(ranks)]
        rules = [shard_rules(config, rank, ranks) for rank in range(ranks)]
        assert all(part.keys() == state.keys() for part in parts)
        for key, full in state.items():
            shards = [rule[key] for rule in rules]
            size = 0 if shards[0] is None else full.shape[shards[0].dim]
            assert torch.equal(sharding.unshard([part[key] for part in parts], shards, size), full)


def test_unshard_refuses_replicas_that_differ_and_gaps():
    shards = [sharding.Shard(0, (range(2),)), sharding.Shard(0, (range(2),))]
    with pytest.raises(ValueError, match="rank 1 holds another copy"):
        sharding.unshard([torch.zeros(2), torch.ones(2)], shards, 2)
    with pytest.raises(ValueError, match="no rank holds index 2 of 3"):
        sharding.unshard([torch.zeros(2), torch.zeros(2)], shards, 3)


def test_replicas_that_diverged_alike_are_the_same():
    shards = [sharding.Shard(0, (range(2),)), sharding.Shard(0, (range(2),))]
    diverged = torch.tensor([torch.nan, torch.inf])
    assert sharding.unshard([diverged, diverged], shards, 2).isnan().tolist() == [True, False]


# Loading


def test_a_directory_without_safetensors_is_loaded_by_transformers(tmp_path):
    model = their_model(SHAPES["4 heads, 2 kv"])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    ids = random_ids(model)
    with torch.no_grad():
        expected = model(ids).logits
    logits = in_process(4, lambda group: load_model(tmp_path, ranks=group)(ids)[0])
    assert relative(logits[0], expected) < 1e-5
    # Loading by several threads at once has left nothing of transformers replaced.
    tied = their_model(SHAPES["6 heads, 3 kv, tied"])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_names_of_the_base_model_are_understood(tmp_path):
    model = their_model(SHAPES["6 heads, 3 kv, tied"])
    model.save_pretrained(tmp_path)
    model.model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert "embed_tokens.weight" in stored
    one, two = load_shards(tmp_path), load_shards(tmp_path / "base")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def folder(tmp_path):
    their_model(SHAPES["4 heads, 2 kv"]).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type: is 'llama', expected 'qwen2'"),
        ({"vocab_size": ...}, "vocab_size: is missing"),
        ({"rope_parameters": ...}, "rope_theta: is missing"),
        ({"use_sliding_window": True}, "use_sliding_window: is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: is 'gelu', expected 'silu'"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_hidden_layers": 0}, "num_layers is 0, expected at least 1"),
        ({"dtype": "int8"}, "dtype: is 'int8', expected a floating dtype"),
        ({"head_dim": ..., "hidden_size": 65}, "4 heads do not divide hidden_size 65"),
        (
            {"tie_word_embeddings": False, "vocab_size": 102},
            "has shape [101, 64], expected [102, 64]",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        load_shards(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_theta_is_read_from_either_place(folder):
    assert read_config(folder).rope_theta == 1e6
    change_config(folder, rope_parameters=..., rope_theta=5e5)
    assert read_config(folder).rope_theta == 5e5


def test_end_tokens_are_those_of_generation_first(folder):
    assert read_config(folder).eos == ()
    change_config(folder, eos_token_id=7)
    assert read_config(folder).eos == (7,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert read_config(folder).eos == (3, 4)


def test_an_untied_head_is_warned_of_and_used(folder):
    change_config(folder, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="differs from the embedding"):
        parts = load_shards(folder)
    assert torch.equal(parts[HEAD], state_of(folder)[HEAD])


def test_two_checkpoints_in_one_directory_are_refused(folder):
    state = state_of(folder)
    save_file(state, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="two checkpoints"):
        load_shards(folder)


def test_every_rank_raises_where_one_cannot_load(folder, tmp_path):
    model = their_model(SHAPES["4 heads, 2 kv"])
    other = tmp_path / "other"
    model.save_pretrained(other)
    change_config(other, vocab_size=...)
    errors = []

    def program(group):
        try:
            load_model(other if group.rank == 1 else folder, ranks=group)
        except (ValueError, RuntimeError) as error:
            errors.append((group.rank, str(error)))

    in_process(2, program)
    errors = dict(errors)
    assert "vocab_size: is missing" in errors[1]
    assert errors[0].startswith("rank 1 of 2: ")


def test_ranks_that_read_different_configurations_are_refused(folder, tmp_path):
    other = tmp_path / "other"
    their_model(SHAPES["4 heads, 2 kv"]).save_pretrained(other)
    change_config(other, rms_norm_eps=1e-4)
    with pytest.raises(RankFailed, match="another configuration"):
        in_process(2, lambda group: load_model(other if group.rank else folder, ranks=group))


# Generation


def test_no_new_tokens_are_the_prompt(folder):
    ids = torch.randint(101, (2, 5))
    assert torch.equal(generate(load_model(folder), ids, max_new_tokens=0), ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1, "do_sample": True, "temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_options_of_generation_that_mean_nothing_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        generate(load_model(folder), torch.ones(1, 3, dtype=torch.long), **options)


def test_rows_end_at_any_of_several_tokens(folder):
    model = load_model(folder)
    ids = torch.randint(101, (3, 6), generator=torch.Generator().manual_seed(1))
    free = generate(model, ids, max_new_tokens=6)
    ends = [int(free[0, 7]), int(free[1, 8])]
    found = generate(model, ids, max_new_tokens=6, eos=ends, pad=100)
    for row in range(3):
        expected = free[row, 6:].tolist()
        stop = next((i for i, token in enumerate(expected) if token in ends), None)
        if stop is not None:
            expected[stop + 1 :] = [100] * len(expected[stop + 1 :])
        assert found[row, 6:].tolist() == expected[: found.shape[1] - 6]


def test_sampled_tokens_are_the_same_on_every_rank_and_follow_the_temperature(folder):
    ids = torch.randint(101, (4, 5), generator=torch.Generator().manual_seed(1))

    def program(group):
        model = load_model(folder, ranks=group)
        generator = torch.Generator().manual_seed(group.rank)  # other numbers on each rank
        options = {"max_new_tokens": 5, "do_sample": True, "generator": generator}
        return generate(model, ids, **options), generate(model, ids, temperature=1e-4, **options)

    greedy = generate(load_model(folder), ids, max_new_tokens=5)
    warm, cold = zip(*in_process(2, program))
    assert torch.equal(warm[0], warm[1])
    assert not torch.equal(warm[0], greedy)
    assert torch.equal(cold[0], greedy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": torch.tensor([[101]])}, "token id 101 is not of the vocabulary of 101"),
        ({"ids": torch.tensor([[-1]])}, "token id -1"),
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, "tokens >= 1"),
        (
            {
                "ids": torch.zeros(1, 2, dtype=torch.long),
                "valid": torch.ones(1, 3, dtype=torch.bool),
            },
            "valid",
        ),
        (
            {"ids": torch.zeros(1, 1, dtype=torch.long), "positions": torch.tensor([[40000]])},
            "position 40000",
        ),
        (
            {"ids": torch.zeros(1, 1, dtype=torch.long), "positions": torch.tensor([[-1]])},
            "position -1",
        ),
        (
            {"ids": torch.zeros(1, 2, dtype=torch.long), "positions": torch.tensor([[1]])},
            "positions have shape",
        ),
    ],
)
def test_input_that_does_not_fit_is_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model(folder)(**arguments)


def test_a_cache_of_another_batch_is_refused(folder):
    model = load_model(folder)
    _, cache = model(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="the cache has shape"):
        model(torch.zeros(3, 1, dtype=torch.long), cache=cache)


def test_the_lines_of_the_documentation_run(tmp_path, monkeypatch):
    page = Path(__file__).parents[1] / "docs" / "tensor_parallel.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    their_model(SHAPES["4 heads, 2 kv"]).save_pretrained("qwen2")
    names = {}
    exec(block, names)
    assert names["logits"].shape == (1, 4, 101)
    assert names["text"].shape == (1, 12)
    assert len(names["four"]) == 4
