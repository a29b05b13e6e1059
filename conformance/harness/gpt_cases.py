"""Cases of GPT checkpoints: sizes, names, containers and inputs, drawn by Hypothesis.

Every tensor of every case is random and asymmetric, out-projections and scalars included: a freshly
initialised checkpoint has zero projections, and every wrong conversion of it computes zeros alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import shown_case
from conformance.harness.file_calls import FileCall
from reference_impl.gpt.config import (
    GPTConfig,
    attention_shapes,
    head_key,
    mlp_shapes,
    next_multiple,
    scalars_needed,
    scalars_padding,
)

FORMATS = ("small", "medium")
LAYERS = {"small": (8, 12, 6, 10), "medium": (12, 16, 8, 8)}
SHALLOW = {"small": (8, 6), "medium": (8,)}
"""Depths for requirements that run a model many times and that no skip of the medium one concerns."""
HEADS = ((2, 16), (3, 8), (3, 12), (2, 8))
"""Number and width of heads, where the width is given."""
WORLDS = (8, 1, 3, 7)
CONTAINERS = ("training", "bare", "safetensors")

WRAPPED = {
    "": "key",
    "_orig_mod.": "'_orig_mod.' + key",
    "module.": "'module.' + key",
    "model.": "'model.' + key",
    "module._orig_mod.": "'module._orig_mod.' + key",
    "_orig_mod.module.": "'_orig_mod.module.' + key",
    "inner _orig_mod.": r"re.sub(r'^(blocks\.\d+)\.', r'\1._orig_mod.', key)",
    "deep": "re.sub(r'(attn|mlp)[.]', r'\\1._orig_mod.', key)",
    "model.module.": "'model.module.' + key",
    "both": r"'module.' + re.sub(r'^(blocks\.\d+)\.', r'\1._orig_mod.', key)",
}
"""How a wrapper changes names, as Python that maps ``key``."""

SAVED = {
    "training": "torch.save({'step': 3, 'code': '…', 'model': saved, 'val_loss': 3.2}, source)",
    "bare": "torch.save(saved, source)",
    "safetensors": "safetensors.torch.save_file(saved, source, metadata={'format': 'pt'})",
    "memory": "source = {'step': 3, 'code': '…', 'model': saved, 'val_loss': 3.2}",
}
"""How ``saved`` becomes a ``source``, as Python."""


@dataclass(frozen=True, kw_only=True)
class GPTCase:
    """One checkpoint, and token ids."""

    format: str = "small"
    layers: int = 12
    heads: int = 2
    head_dim: int | None = 16
    """None: the width is not given, and is 128."""
    vocab: int = 37
    """Rows of the embeddings."""
    batch: int = 2
    tokens: int = 11
    seed: int = 0
    world: int = 8
    """Ranks of training, which decide how many scalars of padding a small checkpoint has."""
    stored: str = "float32"
    """``float32``: every tensor; ``as-trained``: bfloat16 where the script has it."""
    container: str = "training"
    wrapped: str = "_orig_mod."
    reordered: bool = False
    blank: bool = False
    """Tensors of zeros that take no memory, for shapes of any size; the file is only inspected."""
    extra: tuple[tuple[str, int], ...] = ()
    """Numbers that one rule alone draws."""

    def __repr__(self) -> str:
        """The sizes, and whatever else is not at its default."""
        return shown_case(self, always=8)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set()
        if self.batch == 1:
            equal.add("one of batch")
        if self.tokens < 4:
            equal.add("few tokens")
        if self.format == "medium" and self.layers < 12:
            equal.add("no skips")
        return frozenset(equal)

    @property
    def width(self) -> int:
        """Width of the model."""
        return self.heads * (self.head_dim or 128)

    @property
    def head_rows(self) -> int:
        """Rows of the LM head."""
        return next_multiple(self.vocab, 128)

    @property
    def drawn(self) -> dict[str, int]:
        """What one rule alone draws."""
        return dict(self.extra)

    def config(self) -> GPTConfig:
        """The truth about the checkpoint."""
        padding = scalars_padding(self.layers, self.world) if self.format == "small" else 0
        return GPTConfig(
            format=self.format,
            num_layers=self.layers,
            num_heads=self.heads,
            head_dim=self.head_dim or 128,
            vocab_size=self.vocab,
            padded_vocab_size=self.head_rows,
            scalars_size=scalars_needed(self.layers) + padding,
        )

    def state_lines(self) -> tuple[str, ...]:
        """Python that makes ``state``, the tensors under their bare names."""
        width, rows = self.width, f"{self.vocab}, {self.width}"
        lines = [
            f"g = torch.Generator().manual_seed({self.seed})",
            "r = lambda *shape: torch.randn(shape, generator=g)",
            "w = lambda *shape: 1.5 * r(*shape) / shape[-1] ** 0.5",
            "h = lambda *shape: 8 * w(*shape)",
            *(["r = w = h = lambda *shape: torch.zeros(1).expand(shape)"] if self.blank else []),
            f"state = {{'embed.weight': r({rows})}}",
            f"state |= {{f'value_embeds.{{i}}.weight': r({rows}) for i in range(3)}}",
        ]
        shapes = attention_shapes(self.format, width) | mlp_shapes(self.format, width)
        for name, shape in shapes.items():
            where = " if i != 7" if name.startswith("attn.") else ""
            each = f"for i in range({self.layers}){where}"
            lines.append(f"state |= {{f'blocks.{{i}}.{name}': w{shape} {each}}}")
        lines.append(f"state['{head_key(self.format)}'] = h({self.head_rows}, {width})")
        size = self.config().scalars_size
        lines.append(f"state['scalars'] = 0.3 + 1.4 * torch.rand({size}, generator=g)")
        if self.config().scalars_padding:
            lines.append(f"state['scalars'][{scalars_needed(self.layers)}:] = 1")
        if self.stored == "as-trained":
            kinds = "'embed'" if self.format == "small" else "('embed', 'blocks')"
            kept = f"any(part in k for part in {kinds})" if "(" in kinds else f"{kinds} in k"
            lines.append(f"state = {{k: t.bfloat16() if {kept} else t for k, t in state.items()}}")
        return tuple(lines)

    def call(
        self, *edits: str, device: str = "cpu", saved: tuple[str, ...] = (), **options: str
    ) -> GPTCall:
        """The call that opens the checkpoint.

        ``edits`` are lines that change ``state``, ``saved`` lines that change what is saved or the
        file; ``options`` are options of the contract as source text.
        """
        suffix = "safetensors" if self.container == "safetensors" else "pt"
        order = "reversed(state.items())" if self.reordered else "state.items()"
        lines = (
            "import collections, os, re, tempfile, safetensors.torch",
            "folder = tempfile.TemporaryDirectory()",
            f"source = os.path.join(folder.name, 'checkpoint.{suffix}')",
            *self.state_lines(),
            *edits,
            f"saved = {{{WRAPPED[self.wrapped]}: tensor for key, tensor in {order}}}",
            *[line for line in saved if not line.startswith("after: ")],
            SAVED[self.container],
            *[line.removeprefix("after: ") for line in saved if line.startswith("after: ")],
            f"ids = torch.randint({self.vocab}, ({self.batch}, {self.tokens}), generator=g)",
        )
        if self.head_dim is not None:
            options = {"head_dim": str(self.head_dim)} | options
        if device != "cpu":
            lines += (f"ids = ids.to({device!r})",)
            options["device"] = repr(device)
        return GPTCall("gpt_checkpoint", lines, ("source",), tuple(options.items()), case=self)


@dataclass(frozen=True)
class GPTCall(FileCall):
    """A call that opens a checkpoint; what is then done with it completes the source text."""

    done: str = ".load().logits(ids)"


def gpt_cases(
    depths: Mapping[str, tuple[int, ...]] = LAYERS, **fixed: Any
) -> SearchStrategy[GPTCase]:
    """Cases of either format; a strategy or a value fixes a field, ``depths`` says how many blocks."""
    return _gpt_cases(depths, fixed)


@st.composite
def _gpt_cases(
    draw: st.DrawFn, depths: Mapping[str, tuple[int, ...]], fixed: Mapping[str, Any]
) -> GPTCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    format = given.setdefault("format", draw(st.sampled_from(FORMATS)))
    if "heads" not in given:
        given["heads"], head_dim = draw(st.sampled_from(HEADS))
        given.setdefault("head_dim", head_dim)
        may_be_128 = format == "small" or given.get("layers", 16) == 16
        if draw(st.integers(0, 7)) == 7 and may_be_128 and "head_dim" not in fixed:
            given["heads"], given["head_dim"] = 1, None
    if given.get("head_dim", 0) is None:
        given.setdefault("layers", 16 if format == "medium" else 6)
    choices = {
        "layers": st.sampled_from(depths[format]),
        "vocab": st.integers(20, 60),
        "batch": st.integers(2, 4),
        "tokens": st.integers(5, 19),
        "seed": st.integers(0, 2**16),
        "world": st.sampled_from(WORLDS),
        "stored": st.sampled_from(["float32", "float32", "as-trained"]),
        "container": st.sampled_from(CONTAINERS),
        "wrapped": st.sampled_from(["_orig_mod.", ""]),
    }
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in given}
    return GPTCase(**given, **drawn)


def as_strategy(value: Any) -> SearchStrategy[Any]:
    """A strategy as it is, anything else as the one value."""
    return value if isinstance(value, SearchStrategy) else st.just(value)


def extras(**numbers: SearchStrategy[int]) -> SearchStrategy[tuple[tuple[str, int], ...]]:
    """Numbers that one rule alone draws, for the field ``extra``."""
    return st.fixed_dictionaries(numbers).map(lambda drawn: tuple(drawn.items()))
