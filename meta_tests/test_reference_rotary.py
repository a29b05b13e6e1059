"""The reference rotary embedding and cached attention are held against transformers and numpy."""

import cmath
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
)
from transformers.models.cohere import modeling_cohere
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from reference_impl.cached_attention import CachedAttention
from reference_impl.rotary import LAYOUTS, Rotary, RotaryModule, rotary, yarn_score_factor

F64 = torch.float64
EXACT = {"rtol": 1e-11, "atol": 1e-11}
FLOAT32_TABLES = {"rtol": 1e-5, "atol": 5e-5}
"""For authorities that compute angles in float32, at positions below 100."""

POSITIONS = torch.tensor([[0, 1, 2, 50, 97], [3, 3, 40, 41, 9]])


def drawn(width=16, heads=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, 5, width, generator=g, dtype=F64)


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or EXACT))


# transformers: every rule of scaling, through the modules that its models hold


LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 7.0, 11.0, 16.0, 22.0, 29.0],
}

RULES = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic within": {
        "rope_type": "dynamic",
        "factor": 4.0,
        "original_max_position_embeddings": 98,
    },
    "dynamic beyond": {
        "rope_type": "dynamic",
        "factor": 4.0,
        "original_max_position_embeddings": 40,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn, small factor": {
        "rope_type": "yarn",
        "factor": 0.5,
        "original_max_position_embeddings": 64,
    },
    "yarn, attention_factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.7,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    "yarn, mscale alone": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
    },
    "yarn, betas": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
    },
    "yarn, not truncated": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "longrope within": {**LONGROPE, "original_max_position_embeddings": 98},
    "longrope beyond": {**LONGROPE, "original_max_position_embeddings": 97},
    "longrope, attention_factor": {
        **LONGROPE,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
}


def configured(config, theta, scaling, width, heads=2, partial=None):
    """A small configuration of a model with this rotary embedding."""
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    if partial is not None:
        parameters["partial_rotary_factor"] = partial
    sizes = {"hidden_size": heads * width, "num_attention_heads": heads}
    trained = (scaling or {}).get("original_max_position_embeddings", 2048)
    more = {"original_max_position_embeddings": trained} if config is Phi3Config else {}
    return config(
        **sizes, **more, rope_parameters=parameters, max_position_embeddings=trained, pad_token_id=0
    )


def module_for(scaling):
    """The rotary module, the rotation and the configuration of a model that has this rule."""
    if scaling is not None and scaling["rope_type"] == "longrope":
        return modeling_phi3.Phi3RotaryEmbedding, modeling_phi3.apply_rotary_pos_emb, Phi3Config
    return modeling_llama.LlamaRotaryEmbedding, modeling_llama.apply_rotary_pos_emb, LlamaConfig


@pytest.mark.parametrize("theta", [10000.0, 500.0, 1e6])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_that_of_transformers(rule, theta):
    scaling = RULES[rule]
    module, apply_rotary, config = module_for(scaling)
    q, k = drawn(seed=1), drawn(seed=2)
    rope = module(configured(config, theta, scaling, width=16))
    expected = apply_rotary(q, k, *rope(q, POSITIONS))
    for x, y in zip((q, k), expected):
        same(rotary(x, POSITIONS, theta=theta, scaling=scaling), y, **FLOAT32_TABLES)
    length = int(POSITIONS.max()) + 1
    frequencies, factor = Rotary().frequencies(16, theta, "half", scaling, length)
    same(frequencies, rope.inv_freq.double(), rtol=1e-6, atol=0)
    assert factor == pytest.approx(rope.attention_scaling, rel=1e-12)


def test_wide_heads_and_long_calls_are_those_of_llama():
    g, positions = torch.Generator().manual_seed(7), torch.arange(90)[None]
    x = torch.randn(1, 2, 90, 128, generator=g, dtype=F64)
    rope = modeling_llama.LlamaRotaryEmbedding(configured(LlamaConfig, 500.0, None, width=128))
    expected, _ = modeling_llama.apply_rotary_pos_emb(x, x, *rope(x, positions))
    same(rotary(x, positions, theta=500.0), expected, **FLOAT32_TABLES)


@pytest.mark.parametrize("rule", ["none", "linear", "yarn", "llama3", "dynamic beyond"])
@pytest.mark.parametrize("partial", [0.25, 0.5])
def test_partial_rotation_is_that_of_gpt_neox(rule, partial):
    scaling = RULES[rule]
    config = configured(GPTNeoXConfig, 500.0, scaling, width=32, partial=partial)
    rope = modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)
    x = drawn(32)
    expected, _ = modeling_gpt_neox.apply_rotary_pos_emb(x, x, *rope(x, POSITIONS))
    found = rotary(x, POSITIONS, theta=500.0, scaling=scaling, rotary_dim=int(32 * partial))
    same(found, expected, **FLOAT32_TABLES)
    assert torch.equal(found[..., int(32 * partial) :], x[..., int(32 * partial) :])


def test_interleaved_is_that_of_gptj():
    x = drawn(16)
    table = modeling_gptj.create_sinusoidal_positions(100, 16)
    sin, cos = table[POSITIONS].chunk(2, dim=-1)
    expected = modeling_gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2)
    same(rotary(x, POSITIONS, layout="interleaved"), expected, **FLOAT32_TABLES)


def test_interleaved_is_that_of_cohere():
    x = drawn(16).float()
    rope = modeling_cohere.CohereRotaryEmbedding(configured(CohereConfig, 500.0, None, width=16))
    expected, _ = modeling_cohere.apply_rotary_pos_emb(x, x, *rope(x, POSITIONS))
    found = rotary(x, POSITIONS, theta=500.0, layout="interleaved")
    same(found, expected, **FLOAT32_TABLES)


def deepseek(scaling):
    return DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        qk_rope_head_dim=16,
        qk_nope_head_dim=8,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 500.0},
        max_position_embeddings=4096,
    )


@pytest.mark.parametrize("rule", ["none", "yarn", "yarn, mscale"])
def test_interleaved_to_half_is_that_of_deepseek(rule):
    scaling = RULES[rule]
    x = drawn(16)
    rope = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(deepseek(scaling))
    apply_rotary = modeling_deepseek_v3.apply_rotary_pos_emb_interleave
    expected, _ = apply_rotary(x, x, *rope(x, POSITIONS))
    options = {"theta": 500.0, "scaling": scaling, "layout": "interleaved-to-half"}
    same(rotary(x, POSITIONS, **options), expected, **FLOAT32_TABLES)


@pytest.mark.parametrize("rule", ["none", "yarn", "yarn, mscale", "yarn, mscale alone", "linear"])
def test_score_factor_of_yarn_is_that_of_deepseek(rule):
    module = modeling_deepseek_v3.DeepseekV3Attention(deepseek(RULES[rule]), layer_idx=0)
    assert yarn_score_factor(RULES[rule]) == pytest.approx(module.scaling * math.sqrt(24))


def test_tables_by_type_of_layer_are_those_of_gemma3():
    config = Gemma3TextConfig(
        head_dim=16,
        hidden_size=32,
        num_attention_heads=2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    )
    rope, x = modeling_gemma3.Gemma3RotaryEmbedding(config), drawn(16)
    layers = {
        "sliding_attention": {"theta": 500.0},
        "full_attention": {"theta": 1e6, "scaling": {"rope_type": "linear", "factor": 8.0}},
        "none": None,
    }
    for layer_type in ("sliding_attention", "full_attention"):
        tables = rope(x, POSITIONS, layer_type)
        expected, _ = modeling_gemma3.apply_rotary_pos_emb(x, x, *tables)
        found = rotary(x, POSITIONS, layers=layers, layer_type=layer_type)
        same(found, expected, **FLOAT32_TABLES)
    unturned = rotary(x, POSITIONS, layers=layers, layer_type="none")
    assert torch.equal(unturned, x)
    assert unturned.data_ptr() != x.data_ptr()


def test_tables_by_type_of_layer_take_every_option():
    x = drawn(20)
    full = {
        "theta": 700.0,
        "layout": "interleaved",
        "rotary_dim": 16,
        "scaling": RULES["yarn, not truncated"],
    }
    found = rotary(x, POSITIONS, layers={"full": full, "local": {}}, layer_type="full")
    same(found, torch.from_numpy(turned(x.numpy(), POSITIONS.numpy(), **full)))


# numpy: a turn is the product with a complex number; each rule once more, pair by pair


def frequency(pair, pairs, theta, scaling, length):
    """Radians a position of one pair, and the factor on its length, in plain Python."""
    plain = theta ** (-pair / pairs)
    if scaling is None or scaling["rope_type"] == "default":
        return plain, 1.0
    factor, rule = scaling["factor"], scaling["rope_type"]
    trained = scaling.get("original_max_position_embeddings")
    if rule == "linear":
        return plain / factor, 1.0
    if rule == "dynamic":
        if length <= trained:
            return plain, 1.0
        # Chosen so that the slowest pair is interpolated by factor * length / trained - factor + 1.
        slowdown = factor * length / trained - factor + 1
        return plain * slowdown ** (-pair / (pairs - 1)), 1.0
    if rule == "llama3":
        wavelength = 2 * math.pi / plain
        if wavelength < trained / scaling["high_freq_factor"]:
            return plain, 1.0
        if wavelength > trained / scaling["low_freq_factor"]:
            return plain / factor, 1.0
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = (trained / wavelength - low) / (high - low)
        return (1 - smooth) * plain / factor + smooth * plain, 1.0
    if rule == "longrope":
        divisors = scaling["short_factor"] if length <= trained else scaling["long_factor"]
        grown = math.sqrt(1 + math.log(factor, trained))
        return plain / divisors[pair], scaling.get("attention_factor", grown)
    # YaRN. The pair whose wave turns `turns` times: theta ** (p / pairs) = trained / (2 pi turns).
    ends = [
        pairs * math.log(trained / (2 * math.pi * turns), theta)
        for turns in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1))
    ]
    if scaling.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], 2 * pairs - 1)
    slowed = 0.0 if pair <= first else 1.0 if pair >= last else (pair - first) / (last - first)
    grow = lambda m: 1 + 0.1 * m * math.log(factor) if factor > 1 else 1.0
    grown = grow(1)
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        grown = grow(scaling["mscale"]) / grow(scaling["mscale_all_dim"])
    return plain * (1 - slowed) + plain / factor * slowed, scaling.get("attention_factor", grown)


def turned(x, positions, *, theta=10000.0, layout="half", rotary_dim=None, scaling=None):
    """The rotation of numpy's ``x``, one pair at a time."""
    y = x.copy()
    width = rotary_dim or x.shape[-1]
    pairs, length = width // 2, int(positions.max()) + 1
    for row, token, pair in np.ndindex(*positions.shape, pairs):
        first, second = (
            (2 * pair, 2 * pair + 1) if "interleaved" in layout else (pair, pair + pairs)
        )
        out = (first, second) if layout != "interleaved-to-half" else (pair, pair + pairs)
        if layout == "half-truncated":
            # (1 / theta) ** linspace(0, 1, width / 4), then zeros; clockwise.
            quarter, grown = width // 4, 1.0
            step = pair / (quarter - 1) if quarter > 1 else 0.0
            angle_of_one = -((1 / theta) ** step) if pair < quarter else 0.0
        else:
            angle_of_one, grown = frequency(pair, pairs, theta, scaling, length)
        turn = grown * cmath.exp(1j * int(positions[row, token]) * angle_of_one)
        z = (x[row, :, token, first] + 1j * x[row, :, token, second]) * turn
        y[row, :, token, out[0]], y[row, :, token, out[1]] = z.real, z.imag
    return y


@pytest.mark.parametrize(
    ("rule", "layout"),
    [(r, layout) for r in RULES for layout in LAYOUTS if r == "none" or layout != "half-truncated"],
)
def test_every_rule_and_layout_is_a_product_of_complex_numbers(rule, layout):
    x = drawn(20)
    options = {"theta": 700.0, "layout": layout, "rotary_dim": 16, "scaling": RULES[rule]}
    expected = turned(x.numpy(), POSITIONS.numpy(), **options)
    same(rotary(x, POSITIONS, **options), torch.from_numpy(expected))


@pytest.mark.parametrize("width", [4, 8, 12, 128])
def test_half_truncated_is_the_formula_of_its_specification(width):
    """y1 = x1 cos + x2 sin, y2 = -x1 sin + x2 cos; a quarter of the width turns, then zeros."""
    x, quarter = drawn(width), width // 4
    found = rotary(x, POSITIONS, theta=1024.0, layout="half-truncated")
    f = np.concatenate([(1 / 1024) ** np.linspace(0, 1, quarter), np.zeros(quarter)])
    angles = POSITIONS.numpy()[:, None, :, None] * f
    x1, x2 = np.split(x.numpy(), 2, axis=-1)
    y1 = x1 * np.cos(angles) + x2 * np.sin(angles)
    y2 = -x1 * np.sin(angles) + x2 * np.cos(angles)
    same(found, torch.from_numpy(np.concatenate([y1, y2], axis=-1)))
    never = [*range(quarter, 2 * quarter), *range(3 * quarter, width)]
    assert torch.equal(found[..., never], x[..., never])
    turns = [*range(quarter), *range(2 * quarter, 3 * quarter)]
    assert bool((found[:, :, 1:, turns] != x[:, :, 1:, turns])[0].all())


def test_far_positions_are_exact():
    x, far = drawn(8), POSITIONS + 131000
    same(rotary(x, far, theta=500.0), torch.from_numpy(turned(x.numpy(), far.numpy(), theta=500.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_float32_rounded_once(dtype):
    x, far = drawn(8).to(dtype), POSITIONS + 100000
    expected = rotary(x.double(), far, theta=500.0)
    found = rotary(x, far, theta=500.0)
    assert found.dtype == dtype
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1e-3)
    assert float(error.max()) <= 1.01 * torch.finfo(dtype).eps / 2 + 2e-4 * (dtype == torch.float32)


@pytest.mark.parametrize(
    "options", [{}, {"scaling": RULES["yarn"]}, {"layout": "interleaved-to-half"}]
)
def test_gradients_are_finite_differences(options):
    x = drawn(8, heads=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotary(x, POSITIONS, rotary_dim=8, **options), (x,))


@pytest.mark.parametrize("rule", ["dynamic beyond", "longrope, attention_factor"])
def test_a_longer_call_leaves_no_trace(rule):
    x, scaling, kept = drawn(16), RULES[rule], Rotary()
    first = kept.rotary(x, POSITIONS % 30, scaling=scaling)
    kept.rotary(x, POSITIONS * 10, scaling=scaling)
    assert torch.equal(kept.rotary(x, POSITIONS % 30, scaling=scaling), first)


def test_module_is_the_function():
    x = drawn(16)
    options = {"theta": 700.0, "layout": "interleaved", "rotary_dim": 12, "scaling": RULES["yarn"]}
    module = RotaryModule(**options)
    assert torch.equal(module.to(torch.bfloat16)(x, POSITIONS), rotary(x, POSITIONS, **options))
    assert not list(module.state_dict())


# Numbers that anyone can check on paper


def vector(*numbers):
    """One token of one head."""
    return torch.tensor(numbers, dtype=F64).view(1, 1, 1, -1)


def turn(x, position, **options):
    return rotary(x, torch.tensor([[position]]), **options).flatten().tolist()


QUARTER = math.pi / 2
THETA_OF_QUARTER = (2 / math.pi) ** 2
"""theta ** (-1 / 2) is pi / 2: the second of two pairs makes a quarter turn a position."""


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("half", [1, -4, 3, 2]),  # pair (2, 4) in channels 1 and 3
        ("interleaved", [1, 2, -4, 3]),  # pair (3, 4) in channels 2 and 3
        ("interleaved-to-half", [1, -4, 2, 3]),  # the same, written to channels 1 and 3
    ],
)
def test_a_quarter_turn(layout, expected):
    found = turn(vector(1, 2, 3, 4), 1, theta=THETA_OF_QUARTER, layout=layout)
    # The first pair turns by one radian: turned back here.
    first = {"half": (0, 2), "interleaved": (0, 1), "interleaved-to-half": (0, 2)}[layout]
    z = complex(*(found[i] for i in first)) * cmath.exp(-1j)
    found[first[0]], found[first[1]] = z.real, z.imag
    assert found == pytest.approx(expected)


def test_the_first_pair_turns_by_the_position_in_radians():
    assert turn(vector(1, 0), 3) == pytest.approx([math.cos(3), math.sin(3)])
    assert turn(vector(0, 1), 3) == pytest.approx([-math.sin(3), math.cos(3)])


def test_half_truncated_turns_clockwise():
    found = turn(vector(1, 5, 0, 7), 3, layout="half-truncated")
    assert found == pytest.approx([math.cos(3), 5, -math.sin(3), 7])


def test_linear_scaling_divides_positions():
    scaling = {"rope_type": "linear", "factor": 4.0}
    assert turn(vector(1, 0), 8, scaling=scaling) == pytest.approx([math.cos(2), math.sin(2)])


def test_llama3_by_hand():
    # theta 16, 4 pairs: frequencies 1, 1/2, 1/4, 1/8. Trained on 4 pi tokens they make 2, 1, 1/2 and
    # 1/4 turns; between low 1/2 and high 3/2 turns the second is halfway.
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 1.5,
        "original_max_position_embeddings": 4 * math.pi,
    }
    found, factor = Rotary().frequencies(8, 16.0, "half", scaling, 1)
    assert found.tolist() == pytest.approx([1, (1 / 2 + 1 / 16) / 2, 1 / 32, 1 / 64])
    assert factor == 1


def test_yarn_by_hand():
    # theta 16, 4 pairs, trained on 64 pi tokens: pair p makes 32 / 2 ** p turns. With beta_fast 32
    # and beta_slow 4 the ramp runs from pair 0 to pair 3.
    scaling = {
        "rope_type": "yarn",
        "factor": math.e**10,
        "beta_slow": 4,
        "original_max_position_embeddings": 64 * math.pi,
        "truncate": False,
    }
    found, factor = Rotary().frequencies(8, 16.0, "half", scaling, 1)
    slow = math.e**-10
    mixed = [1, (2 + slow) / 3 / 2, (1 + 2 * slow) / 3 / 4, slow / 8]
    assert found.tolist() == pytest.approx(mixed)
    assert factor == pytest.approx(2)  # 0.1 ln(e ** 10) + 1


def test_dynamic_and_longrope_switch_behind_the_trained_length():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    frequencies = lambda rule, length: Rotary().frequencies(4, 16.0, "half", rule, length)
    assert frequencies(dynamic, 8)[0].tolist() == pytest.approx([1, 1 / 4])
    # 16 tokens: theta grows by (2 * 16 / 8 - 1) ** (4 / 2) = 9, its square root by 3.
    assert frequencies(dynamic, 16)[0].tolist() == pytest.approx([1, 1 / 12])
    longrope = {
        "rope_type": "longrope",
        "factor": 64.0,
        "short_factor": [1, 2],
        "long_factor": [4, 8],
        "original_max_position_embeddings": 4,
    }
    found, factor = frequencies(longrope, 4)
    assert found.tolist() == pytest.approx([1, 1 / 8])
    assert factor == pytest.approx(2)  # sqrt(1 + ln 64 / ln 4)
    assert frequencies(longrope, 5)[0].tolist() == pytest.approx([1 / 4, 1 / 32])


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "neox"}, "layout 'neox' is not one of"),
        ({"rotary_dim": 5}, "rotary_dim 5 is not a multiple of 2"),
        ({"rotary_dim": 10}, "up to the width 8"),
        ({"rotary_dim": 0}, "rotary_dim 0"),
        ({"rotary_dim": 6, "layout": "half-truncated"}, "rotary_dim 6 is not a multiple of 4"),
        ({"scaling": {"rope_type": "su"}}, "rope_type 'su' is not one of"),
        (
            {"scaling": {"rope_type": "linear", "factor": 2.0}, "layout": "half-truncated"},
            "no scaling",
        ),
        ({"layers": {"full": {}}, "layer_type": "local"}, "'local' is not one of"),
        ({"x": torch.zeros(3, 5, 8)}, r"four axes .* found \[3, 5, 8\]"),
        ({"positions": torch.zeros(5, dtype=torch.int64)}, r"positions \[5\] do not fit"),
        ({"positions": POSITIONS[:, :4]}, r"positions \[2, 4\] do not fit x \[2, 3, 5, 8\]"),
        (
            {"scaling": {**LONGROPE, "original_max_position_embeddings": 8}},
            "needs 4 factors, found 8",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": drawn(8), "positions": POSITIONS, **change}
    with pytest.raises(ValueError, match=message):
        rotary(**arguments)


# Attention with a cache


def stepped(step, q, k, v, schedule, key_valid=None):
    outputs, begin = [], 0
    for size in schedule:
        at = slice(begin, begin + size)
        more = {} if key_valid is None else {"key_valid": key_valid[:, at]}
        outputs.append(step(q[:, :, at], k[:, :, at], v[:, :, at], **more))
        begin += size
    assert begin == q.shape[2]
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("schedule", [(9,), (5, 1, 1, 1, 1), (1, 3, 2, 3), (1,) * 9])
def test_steps_are_one_pass_of_llama(schedule):
    config = LlamaConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    layer = modeling_llama.LlamaAttention(config, layer_idx=0).double().eval()
    rope = modeling_llama.LlamaRotaryEmbedding(config)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1), dtype=F64)
    mask = torch.full((9, 9), torch.finfo(F64).min, dtype=F64).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = layer(x, rope(x, torch.arange(9)[None]), mask)
        q, k, v = (
            projection(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        out = stepped(CachedAttention(rotary={"theta": 500.0}), q, k, v, schedule)
        found = layer.o_proj(out.transpose(1, 2).flatten(2))
    same(found, expected, rtol=1e-5, atol=1e-6)


def numpy_pass(q, k, v, valid, *, theta, window=None, scale=None, sinks=None, scaling=None):
    """One pass over the real tokens of each row, query by query; zeros at padding."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scaling is not None and "mscale_all_dim" in scaling:
        scale *= (0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1) ** 2
    for row, real in enumerate(valid):
        at, values = np.arange(real.sum())[None], v[row, :, real].transpose(1, 0, 2)
        rotated_q, rotated_k = (
            turned(x[row : row + 1, :, real], at, theta=theta, scaling=scaling)[0] for x in (q, k)
        )
        for head, (query, slot) in itertools.product(
            range(q.shape[1]), enumerate(real.nonzero()[0])
        ):
            group = head // (q.shape[1] // k.shape[1])
            begin = 0 if window is None else max(0, query - window)
            scores = scale * (rotated_k[group, begin : query + 1] @ rotated_q[head, query])
            weights = np.exp(scores)
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
            seen = values[group, begin : query + 1]
            out[row, head, slot] = (weights / total) @ seen
    return out


CACHED_CASES = {
    "plain": {},
    "window": {"window": 2},
    "window of one": {"window": 0},
    "scale": {"scale": 0.12},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0, 0.0])},
    "linear": {"scaling": RULES["linear"]},
    "yarn with mscale": {"scaling": RULES["yarn, mscale"]},
    "everything": {
        "window": 3,
        "scale": 0.7,
        "sinks": np.array([0.5, -1.0, 2.0, 0.0]),
        "scaling": RULES["yarn, mscale"],
    },
}


slots = torch.arange(11)  # of three rows
PADDING = {
    "none": slots.expand(3, -1) >= 0,
    "left": slots >= torch.tensor([[3], [0], [4]]),
    "behind the first step": (slots < torch.tensor([[3], [5], [4]])) | (slots >= 5),
    "holes": torch.stack([slots % 3 != 1, slots < 8, slots % 4 > 0]),
}


@pytest.mark.parametrize("name", CACHED_CASES)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("schedule", [(11,), (2, 9), (5, 1, 3, 2), (5, 1, 1, 1, 1, 1, 1)])
def test_steps_are_one_pass_in_numpy(name, padding, schedule):
    options, key_valid = CACHED_CASES[name], PADDING[padding]
    numbers = np.random.default_rng(3)
    q = numbers.normal(size=(3, 4, 11, 8))
    k, v = numbers.normal(size=(3, 2, 11, 8)), numbers.normal(size=(3, 2, 11, 5))
    expected = numpy_pass(q, k, v, key_valid.numpy(), theta=500.0, **options)
    sinks, window = options.get("sinks"), options.get("window")
    step = CachedAttention(
        rotary={"theta": 500.0, "scaling": options.get("scaling")},
        window=None if window is None else (window, 0),
        scale=options.get("scale"),
        sinks=None if sinks is None else torch.from_numpy(sinks),
    )
    tensors = (torch.from_numpy(x) for x in (q, k, v))
    out = stepped(step, *tensors, schedule, None if padding == "none" else key_valid)
    out = torch.where(key_valid[:, None, :, None], out, 0)
    same(out, torch.from_numpy(expected))


def test_a_long_cache_forgets_nothing():
    q, k, v = (
        torch.from_numpy(np.random.default_rng(i).normal(size=(1, 1, 150, 4))) for i in range(3)
    )
    valid = np.ones((1, 150), dtype=bool)
    expected = numpy_pass(*(x.numpy() for x in (q, k, v)), valid, theta=500.0)
    out = stepped(CachedAttention(rotary={"theta": 500.0}), q, k, v, (75, 1, 1, 73))
    same(out, torch.from_numpy(expected))
