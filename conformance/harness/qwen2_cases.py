"""Cases of Qwen2 directories: sizes, files and inputs, drawn by Hypothesis.

Every tensor is random, biases and norm weights included, and no two axes that a loader could confuse
have the same size: vocabulary, width, heads times head width and intermediate width all differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import shown_case
from conformance.harness.file_calls import FileCall
from reference_impl.qwen2.config import Qwen2Config

HEADS = ((4, 2, 16), (6, 3, 10), (6, 2, 8), (8, 2, 12), (2, 2, 14), (4, 1, 12), (8, 4, 6))
"""Query heads, key/value heads, head width."""
HIDDEN = (40, 56, 72)
INTERMEDIATE = (48, 60, 84, 96)
RANKS = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class QwenCase:
    """One directory, and token ids."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 56
    intermediate: int = 96
    vocab: int = 101
    layers: int = 2
    tied: bool = False
    ranks: int = 1
    batch: int = 2
    tokens: int = 9
    seed: int = 0
    files: int = 1
    """Number of safetensors files; with more than one there is an index."""
    stored: str = "float32"
    """Dtype of the tensors, and what ``config.json`` says."""
    theta: float = 1e6
    theta_at: str = "rope_parameters"
    """Where ``config.json`` has it: there, since transformers 5, or at the ``top``."""
    max_positions: int = 512
    extra: tuple[tuple[str, int], ...] = ()
    """Numbers that one rule alone draws."""

    def __repr__(self) -> str:
        """The sizes, and whatever else is not at its default."""
        return shown_case(self, always=9)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set()
        if self.ranks == 1:
            equal.add("one rank")
        if self.kv_heads in (1, self.heads):
            equal.add("one map of heads")
        if self.batch == 1:
            equal.add("one of batch")
        if self.tokens in (self.heads, self.kv_heads, 1):
            equal.add("as many tokens as heads")
        return frozenset(equal)

    @property
    def drawn(self) -> dict[str, int]:
        """What one rule alone draws."""
        return dict(self.extra)

    def config(self) -> Qwen2Config:
        """The truth about the model."""
        return Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.theta,
            rms_norm_eps=1e-5,
            max_positions=self.max_positions,
            tied=self.tied,
        )

    def config_json(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        rope: dict[str, Any] = {"rope_theta": self.theta}
        if self.theta_at == "rope_parameters":
            rope = {"rope_parameters": rope | {"rope_type": "default"}}
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "dtype": self.stored,
            "eos_token_id": None,
        } | rope

    def state_lines(self) -> tuple[str, ...]:
        """Python that makes ``state``, the tensors by name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, inner = self.hidden, self.intermediate
        layer = {
            "input_layernorm.weight": f"n({hidden})",
            "self_attn.q_proj.weight": f"w({q}, {hidden})",
            "self_attn.q_proj.bias": f"r({q})",
            "self_attn.k_proj.weight": f"w({kv}, {hidden})",
            "self_attn.k_proj.bias": f"r({kv})",
            "self_attn.v_proj.weight": f"w({kv}, {hidden})",
            "self_attn.v_proj.bias": f"r({kv})",
            "self_attn.o_proj.weight": f"w({hidden}, {q})",
            "post_attention_layernorm.weight": f"n({hidden})",
            "mlp.gate_proj.weight": f"w({inner}, {hidden})",
            "mlp.up_proj.weight": f"w({inner}, {hidden})",
            "mlp.down_proj.weight": f"w({hidden}, {inner})",
        }
        made = ", ".join(f"'{name}': {value}" for name, value in layer.items())
        lines = [
            f"g = torch.Generator().manual_seed({self.seed})",
            "r = lambda *shape: torch.randn(shape, generator=g)",
            "w = lambda *shape: 1.2 * r(*shape) / shape[-1] ** 0.5",
            "n = lambda *shape: 1 + 0.3 * r(*shape)",
            f"state = {{'model.embed_tokens.weight': r({self.vocab}, {hidden})}}",
            f"layer = lambda: {{{made}}}",
            f"state |= {{f'model.layers.{{i}}.{{k}}': t for i in range({self.layers})"
            " for k, t in layer().items()}",
            f"state['model.norm.weight'] = n({hidden})",
        ]
        if not self.tied:
            lines.append(f"state['lm_head.weight'] = w({self.vocab}, {hidden})")
        if self.stored != "float32":
            lines.append(f"state = {{k: t.to(torch.{self.stored}) for k, t in state.items()}}")
        return tuple(lines)

    def call(
        self,
        contract: str,
        *edits: str,
        saved: tuple[str, ...] = (),
        config: Mapping[str, Any] | None = None,
        device: str = "cpu",
        done: str = "",
        **options: str,
    ) -> FileCall:
        """The call of ``contract`` on the directory.

        ``edits`` are lines that change ``state`` or ``config``; ``saved`` lines that change ``files``
        (file name → tensors), ``index`` (tensor name → file name) or, beginning with ``after:``, what
        is on disk in ``directory``. ``config`` replaces entries of ``config.json``; ``options`` are
        options of the contract as source text.
        """
        given = self.config_json() | dict(config or {})
        lines = (
            "import json, os, tempfile, safetensors.torch",
            "folder = tempfile.TemporaryDirectory()",
            "directory = folder.name",
            f"config = {_python(given)}",
            *self.state_lines(),
            *edits,
            *self.file_lines(),
            *[line for line in saved if not line.startswith("after: ")],
            "for name, tensors in files.items():",
            "    safetensors.torch.save_file(tensors, os.path.join(directory, name), {'format': 'pt'})",
            "write = lambda n, x: open(os.path.join(directory, n), 'w').write(json.dumps(x))",
            "_ = write('config.json', config)",
            "index_json = {'metadata': {}, 'weight_map': index}",  # transformers wants both
            "_ = index and write('model.safetensors.index.json', index_json)",
            *[line.removeprefix("after: ") for line in saved if line.startswith("after: ")],
            f"ids = torch.randint({self.vocab}, ({self.batch}, {self.tokens}), generator=g)",
        )
        if device != "cpu":
            options["device"] = repr(device)
        arguments = ("directory",)
        return FileCall(contract, lines, arguments, tuple(options.items()), case=self, done=done)

    def file_lines(self) -> tuple[str, ...]:
        """Python that deals ``state`` out to ``files``, and makes the ``index``."""
        if self.files == 1:
            return ("files, index = {'model.safetensors': state}, {}",)
        name = f"f'model-{{i + 1:05}}-of-{self.files:05}.safetensors'"
        return (
            f"dealt = {{k: i % {self.files} for i, k in enumerate(state)}}",
            f"files = {{{name}: {{k: t for k, t in state.items() if dealt[k] == i}}"
            f" for i in range({self.files})}}",
            "index = {k: name for name, tensors in files.items() for k in tensors}",
        )


def _python(given: Mapping[str, Any]) -> str:
    """A JSON object as Python."""
    return repr(json.loads(json.dumps(given)))


def fits(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether heads can be split over ranks."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def qwen_cases(
    ranks: tuple[int, ...] = RANKS, heads: tuple[tuple[int, int, int], ...] = HEADS, **fixed: Any
) -> SearchStrategy[QwenCase]:
    """Cases of any shape that fits one of ``ranks``; a strategy or a value fixes a field."""
    return _qwen_cases(ranks, heads, fixed)


@st.composite
def _qwen_cases(
    draw: st.DrawFn,
    ranks: tuple[int, ...],
    heads: tuple[tuple[int, int, int], ...],
    fixed: Mapping[str, Any],
) -> QwenCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    number = given.setdefault("ranks", draw(st.sampled_from(ranks)))
    fitting = [shape for shape in heads if fits(shape[0], shape[1], number)]
    shape = draw(st.sampled_from(fitting))
    for name, value in zip(("heads", "kv_heads", "head_dim"), shape):
        given.setdefault(name, value)
    inner = [size for size in INTERMEDIATE if size % number == 0]
    widths = [size for size in HIDDEN if size != given["heads"] * given["head_dim"]]
    choices = {
        "hidden": st.sampled_from(widths),
        "intermediate": st.sampled_from(inner),
        "vocab": st.sampled_from([101, 97, 113]),
        "layers": st.sampled_from([2, 3, 1]),
        "tied": st.booleans(),
        "batch": st.integers(2, 3),
        "tokens": st.sampled_from([9, 5, 7, 11]),
        "seed": st.integers(0, 2**16),
        "files": st.sampled_from([1, 1, 3]),
        "theta": st.sampled_from([1e6, 5e5, 3e4]),
        "theta_at": st.sampled_from(["rope_parameters", "top"]),
    }
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in given}
    return QwenCase(**given, **drawn)


def as_strategy(value: Any) -> SearchStrategy[Any]:
    """A strategy as it is, anything else as the one value."""
    return value if isinstance(value, SearchStrategy) else st.just(value)


def extras(**strategies: SearchStrategy[int]) -> SearchStrategy[tuple[tuple[str, int], ...]]:
    """Numbers that one rule alone draws, as a case keeps them."""
    return st.fixed_dictionaries(strategies).map(lambda drawn: tuple(drawn.items()))
