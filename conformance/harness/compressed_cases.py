"""Cases of folders of compressed models, and the plain Python that writes them.

Sizes are of pairwise different kinds, every tensor is random, and nothing of the folder is written by
what reads it: the lines use torch, safetensors, json and yaml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import shown_case
from conformance.harness.core_cases import PROJECTIONS, equal_sizes
from conformance.harness.file_calls import FileCall
from conformance.harness.qwen2_cases import as_strategy

FORMATS = ("pt", "safetensors")
VOCAB, HEADS, KV_HEADS, HEAD_DIM, DENSE = 61, 4, 2, 10, 28
THETA, EPS = 50000.0, 1e-5
BLOCKS = {"qwen3_moe": "mlp", "mixtral": "block_sparse_moe"}


@dataclass(frozen=True, kw_only=True)
class CompressedCase:
    """One folder."""

    model: str = "qwen3_moe"
    experts: int = 5
    rank: int = 3
    layers: int = 3
    dense: tuple[int, ...] = (1,)
    """Layers without experts."""
    top_k: int = 2
    hidden: int = 24
    inner: int = 20
    """The width inside an expert."""
    normalize: bool = True
    tied: bool = False
    format: str = "pt"
    stored: str = "float32"
    """``mixed``: factors in float32 beside others in bfloat16."""
    compression: str | None = "json"
    """How the compression's configuration is written: ``json``, ``yaml``, ``first`` or not at all."""
    statistics: bool = False
    metadata: bool = True
    """Whether a projection's metadata are in a file of their own."""
    placed: bool = True
    """Whether a ``.pt`` file says which layer and projection it holds."""
    step: int = 1
    """``decoder_sparse_step``."""
    which: int = 0
    """What a rule draws among its own choices."""
    seed: int = 0

    def __repr__(self) -> str:
        """The sizes, and whatever else is not at its default."""
        return shown_case(self, always=4)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set(equal_sizes(hidden=self.hidden, inner=self.inner))
        equal |= equal_sizes(hidden=self.hidden, double_inner=2 * self.inner)
        equal |= equal_sizes(experts=self.experts, rank=self.rank)
        return frozenset(equal | ({"one expert"} if self.experts == 1 else set()))

    @property
    def expert_layers(self) -> list[int]:
        """The layers that have experts."""
        return [i for i in range(self.layers) if i not in self.dense and (i + 1) % self.step == 0]

    @property
    def block(self) -> str:
        """What a block is called in files."""
        return BLOCKS[self.model]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each projection."""
        h, i = self.hidden, self.inner
        return {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        common = {
            "model_type": self.model,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCAB,
            "hidden_act": "silu",
            "rms_norm_eps": EPS,
            "rope_theta": THETA,
            "max_position_embeddings": 64,
            "num_experts_per_tok": self.top_k,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if self.model == "mixtral":
            own = {"num_local_experts": self.experts, "intermediate_size": self.inner}
            return {"architectures": ["MixtralForCausalLM"], **common, **own}
        own = {
            "num_experts": self.experts,
            "moe_intermediate_size": self.inner,
            "intermediate_size": DENSE,
            "norm_topk_prob": self.normalize,
            "mlp_only_layers": list(self.dense),
            "decoder_sparse_step": self.step,
        }
        return {"architectures": ["Qwen3MoeForCausalLM"], **common, **own}

    def other_shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights that are not of experts, by their names in the original."""
        h, q, kv = self.hidden, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, h)}
        for i in range(self.layers):
            attention = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
            if self.model == "qwen3_moe":
                attention |= {"q_norm": (HEAD_DIM,), "k_norm": (HEAD_DIM,)}
            each = {f"self_attn.{name}": shape for name, shape in attention.items()}
            each |= {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
            if i in self.expert_layers:
                each[f"{self.block}.gate"] = (self.experts, h)
            else:
                each |= {"mlp.gate_proj": (DENSE, h), "mlp.up_proj": (DENSE, h)}
                each["mlp.down_proj"] = (h, DENSE)
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in each.items()}
        found["model.norm.weight"] = (h,)
        return found if self.tied else found | {"lm_head.weight": (VOCAB, h)}

    def weight_lines(self) -> tuple[str, ...]:
        """Python that makes ``factors`` and ``others``."""
        lines = [
            f"g = torch.Generator().manual_seed({self.seed})",
            "r = lambda *shape: torch.randn(shape, generator=g)",
            f"shapes = {self.shapes}",
            f"u = lambda width: 0.9 * r(width, {self.rank}) / width**0.5",
            "wrapper = lambda o, d: {'U_in': u(d), 'V_in': u(d), 'U_out': u(o), 'V_out': u(o)}",
            "factors = {(i, p): {'core': r(o, d) / d**0.5, "
            f"'wrappers': [wrapper(o, d) for _ in range({self.experts})]}}",
            f"           for i in {self.expert_layers} for p, (o, d) in shapes.items()}}",
            "w = lambda *s: 1.5 * r(*s) / s[-1]**0.5 if len(s) > 1 else 1 + 0.3 * r(*s)",
            f"others = {{name: w(*shape) for name, shape in {self.other_shapes()}.items()}}",
        ]
        if self.stored != "float32":
            lines.append("others = {name: t.bfloat16() for name, t in others.items()}")
        if self.stored == "bfloat16":
            lines += [
                "for f in factors.values():",
                "    f['core'] = f['core'].bfloat16()",
                "    f['wrappers'] = [{k: t.bfloat16() for k, t in x.items()} for x in f['wrappers']]",
            ]
        return tuple(lines)

    def content_lines(self) -> tuple[str, ...]:
        """Python that makes ``contents``, the files of projections, and ``files``, the small ones."""
        places = "for (i, p) in factors"
        lines = [
            f"sizes = {{p: {{'num_experts': {self.experts}, 'd_in': d, 'd_out': o, "
            f"'rank': {self.rank}}} for p, (o, d) in shapes.items()}}",
            "contents = {f'layer_{i}/{p}': {'layer_idx': i, 'projection': p, **f, "
            "'metadata': dict(sizes[p])} for (i, p), f in factors.items()}",
            f"files = {{'config.json': {self.config()}}}",
            "files['compressed_metadata.json'] = {'compressed_layer_indices': "
            f"{self.expert_layers}, 'num_compressed_layers': {len(self.expert_layers)}, "
            f"'total_layers': {self.layers}}}",
        ]
        if not self.placed:
            lines.append("for c in contents.values(): del c['layer_idx'], c['projection']")
        if self.metadata or self.format == "safetensors":
            lines.append(
                f"files |= {{f'layer_{{i}}/{{p}}_metadata.json': dict(sizes[p]) {places}}}"
            )
        if self.compression:
            lines.append(self.compression_line())
        counted = (f"k = {self.top_k}  # experts of a token", *STATISTICS_LINES)
        return (*lines, *(counted if self.statistics else ()))

    def compression_line(self) -> str:
        """Python that adds the compression's configuration to ``files``."""
        found: dict[str, Any] = {"model_name": "tiny", "rank": self.rank}
        found["projections"] = list(PROJECTIONS)
        if self.compression == "first":  # of the source's first version
            found |= {"num_steps": 1000, "lr": 0.001, "output_dir": "/somewhere"}
        else:
            dtype = "float32" if self.stored == "float32" else "bfloat16"
            found |= {"num_experts": self.experts, "dtype": dtype}
        suffix = "yaml" if self.compression == "yaml" else "json"
        return f"files['compression_config.{suffix}'] = {found}"

    def call(
        self,
        *edits: str,
        late: tuple[str, ...] = (),
        after: tuple[str, ...] = (),
        device: str = "cpu",
        **options: str,
    ) -> CompressedCall:
        """The call that loads the folder.

        ``edits`` change ``factors`` and ``others``, ``late`` lines ``contents`` and ``files``, and
        ``after`` lines what has been written; ``options`` are source text.
        """
        lines = (
            "import json, os, tempfile, safetensors.torch, yaml",
            "folder = tempfile.TemporaryDirectory()",
            "source = os.path.join(folder.name, 'model')",
            "os.mkdir(source)",
            *self.weight_lines(),
            *edits,
            *self.content_lines(),
            *late,
            *WRITING_LINES[self.format],
            *WRITING_LINES["small"],
            *after,
            f"ids = torch.randint({VOCAB}, (2, 7), generator=g)",
        )
        if device != "cpu":
            lines += (f"ids = ids.to({device!r})",)
            options["device"] = repr(device)
        return CompressedCall(
            "compressed_checkpoint", lines, ("source",), tuple(options.items()), case=self
        )


STATISTICS_LINES = (
    "def entry(i, p, o, d, E, R):",
    "    n, w = d * o, 2 * R * (d + o)",
    "    return {'layer_idx': i, 'projection': p, 'num_experts': E, 'num_active_experts': k,",
    "            'd_in': d, 'd_out': o, 'rank': R, 'original_total_params': E * n,",
    "            'original_active_params': k * n, 'compressed_total_params': n + E * w,",
    "            'compressed_active_params': n + k * w, 'core_params': n,",
    "            'wrapper_params_per_expert': w, 'total_compression_ratio': (n + E * w) / (E * n),",
    "            'total_reduction_percent': 100 * (1 - (n + E * w) / (E * n)),",
    "            'active_compression_ratio': (n + k * w) / (k * n),",
    "            'active_increase_percent': 100 * ((n + k * w) / (k * n) - 1)}",
    "entries = [entry(i, p, *shapes[p], len(f['wrappers']), sizes[p]['rank'])"
    " for (i, p), f in factors.items()]",
    "total = lambda name: sum(each[name] for each in entries)",
    "before, now = total('original_total_params'), total('compressed_total_params')",
    "active, used = total('original_active_params'), total('compressed_active_params')",
    "files['compression_statistics.yaml'] = {",
    "    'num_layers_compressed': len({each['layer_idx'] for each in entries}),",
    "    'total_params_original': before, 'total_params_compressed': now,",
    "    'total_compression_ratio': now / before, 'total_reduction_percent': 100 * (1 - now / before),",
    "    'active_params_original': active, 'active_params_compressed': used,",
    "    'active_compression_ratio': used / active,",
    "    'active_change_percent': 100 * (used / active - 1),",
    "    'total_memory_original_gb': before * 2 / 1e9, 'total_memory_compressed_gb': now * 2 / 1e9,",
    "    'memory_saved_gb': (before - now) * 2 / 1e9, 'per_layer_stats': entries}",
)
"""Python that counts what is saved, by the formulas of the contract ``compression_statistics``."""

WRITING_LINES = {
    "pt": (
        "for name, content in contents.items():",
        "    os.makedirs(os.path.dirname(f'{source}/{name}'), exist_ok=True)",
        "    torch.save(content, f'{source}/{name}.pt')",
        "torch.save(others, f'{source}/non_moe_weights.pt')",
    ),
    "safetensors": (
        "flat = lambda c: {'core': c['core']} | {f'wrappers.{e}.{k}': t "
        "for e, x in enumerate(c['wrappers']) for k, t in x.items()}",
        "packed = lambda tensors: {k: t.contiguous() for k, t in tensors.items()}",
        "for name, content in contents.items():",
        "    os.makedirs(os.path.dirname(f'{source}/{name}'), exist_ok=True)",
        "    safetensors.torch.save_file(packed(flat(content)), f'{source}/{name}.safetensors')",
        "safetensors.torch.save_file(packed(others), f'{source}/non_moe_weights.safetensors')",
    ),
    "small": (
        "for name, content in files.items():",
        "    with open(f'{source}/{name}', 'w') as file:",
        "        (yaml.safe_dump if name.endswith('yaml') else json.dump)(content, file)",
    ),
}
"""Python that writes the folder."""


@dataclass(frozen=True)
class CompressedCall(FileCall):
    """A call that loads a folder."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(eval(dict(self.options).get("device", "'cpu'")))


@st.composite
def _compressed_cases(draw: st.DrawFn, fixed: dict[str, Any]) -> CompressedCase:
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    model = given.setdefault("model", draw(st.sampled_from([*BLOCKS])))
    if model == "mixtral":
        given |= {"dense": (), "step": 1, "normalize": True}
        given.setdefault("layers", 2)
    else:
        given.setdefault("layers", 2)
        given.setdefault("dense", draw(st.sampled_from([(1,), (0,), ()])))
    choices = {
        "experts": st.sampled_from([3, 4, 5]),
        "rank": st.sampled_from([1, 2]),
        "format": st.sampled_from(FORMATS),
        "normalize": st.booleans(),
        "which": st.integers(0, 999),
        "seed": st.integers(0, 2**16),
    }
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in given}
    return CompressedCase(**given, **drawn)


def compressed_cases(**fixed: Any) -> SearchStrategy[CompressedCase]:
    """Cases of folders; a strategy or a value fixes a field."""
    return _compressed_cases(fixed)
