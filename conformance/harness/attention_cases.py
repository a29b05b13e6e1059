"""Cases of attention: sizes, options and a seed, drawn by Hypothesis, and the call that they make."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call, shown_case

# Query and key/value heads. The first, to which cases shrink, can still tell the groups apart.
HEADS = ((4, 2), (6, 2), (6, 3), (8, 4), (5, 1), (3, 3), (1, 1))
GROUPED_HEADS = ((4, 2), (6, 2), (6, 3), (8, 2), (12, 4), (10, 5), (16, 8))
WIDTHS = (8, 12, 16, 36, 64, 128)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One call of attention; every field but the sizes is off by default."""

    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    q_len: int = 3
    kv_len: int = 5
    head_dim: int = 8
    value_dim: int = 8
    dtype: str = "float32"
    seed: int = 0
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    mask: str | None = None
    """``boolean``, ``boolean per head``, ``bias``, ``bias per head``, ``infinite`` (0 or -inf) or
    ``lowest`` (0 or the lowest finite number of the dtype); every row sees a key. Not to be drawn
    with padding: a row whose real keys are all at the lowest number is neither empty nor not."""
    padding: str | None = None
    """``left`` or ``right``: keys that are padding, a different number in each row; ``holes``:
    padding anywhere."""
    cache: str | None = None
    """``nan`` or ``garbage``: a preallocated cache whose unused slots hold that."""
    packing: str | None = None
    """``segments`` or ``cumulative``: several documents in each row."""
    positions: str | None = None
    """``shuffled``, or ``ring``: a ring cache after it wrapped."""
    sinks: bool = False
    memory: str = "contiguous"
    """``transposed``, ``fused`` (slices of one QKV buffer), ``expanded`` (k and v of stride 0 over
    the batch) or ``offset`` (inside a larger storage)."""
    magnitude: float = 1.0
    """Standard deviation of q; that of k and v is 1."""

    def __repr__(self) -> str:
        """The sizes, and whatever else is not at its default."""
        return shown_case(self, always=7)

    def confusable(self) -> frozenset[str]:
        """Coincidences of sizes under which some wrong implementations give the right answer."""
        sizes = {
            "batch": self.batch,
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "q_len": self.q_len,
            "kv_len": self.kv_len,
        }
        equal = {f"{a} = {b}" for a, b in itertools.combinations(sizes, 2) if sizes[a] == sizes[b]}
        if self.kv_heads == 1:
            equal.add("one kv head")
        if self.batch == 1:
            equal.add("one batch row")
        if self.window is not None and all(
            side is None or side >= self.kv_len - 1 for side in self.window
        ):
            equal.add("window covers every key")
        return frozenset(equal)

    def call(self, dtype: torch.dtype, device: str = "cpu") -> Call:
        """The call, with inputs of ``dtype`` on ``device``."""
        lines, options = _inputs(self, dtype), {}
        for name, value in (
            ("causal", self.causal),
            ("window", self.window),
            ("scale", self.scale),
            ("softcap", self.softcap),
        ):
            if value is not None and value is not False:
                options[name] = repr(value)
        for add in (_add_mask, _add_padding, _add_cache, _add_packing, _add_positions, _add_sinks):
            more_lines, more_options = add(self, dtype)
            lines += more_lines
            options |= more_options
        if device != "cpu":
            tensors = ["q", "k", "v", *(name for name in options if name == options[name])]
            lines += [f"{', '.join(tensors)} = (x.to('{device}') for x in ({', '.join(tensors)}))"]
        lines += _memory(self)
        return Call("attention", tuple(lines), ("q", "k", "v"), tuple(options.items()), dtype, self)


def _inputs(case: AttentionCase, dtype: torch.dtype) -> list[str]:
    shapes = [
        (case.batch, case.q_heads, case.q_len, case.head_dim),
        (case.batch, case.kv_heads, case.kv_len, case.head_dim),
        (case.batch, case.kv_heads, case.kv_len, case.value_dim),
    ]
    if case.memory == "expanded":
        shapes[1], shapes[2] = (1, *shapes[1][1:]), (1, *shapes[2][1:])
    lines = [
        f"g = torch.Generator().manual_seed({case.seed})",
        f"q, k, v = (torch.randn(s, generator=g) for s in {shapes})",
    ]
    if case.magnitude != 1:
        lines.append(f"q = q * {case.magnitude!r}")
    if dtype != torch.float32:
        lines.append(f"q, k, v = (x.to({dtype}) for x in (q, k, v))")
    return lines


def _memory(case: AttentionCase) -> list[str]:
    if case.memory == "transposed":
        return [
            "q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))",
        ]
    if case.memory == "fused":  # [batch, length, heads * width] buffers, as a QKV projection leaves
        return [
            "rows = lambda x: x.transpose(1, 2).flatten(2)",
            "kv = torch.cat([rows(k), rows(v), rows(v)], dim=-1)",
            "n = k.shape[1] * k.shape[3]",
            "k, v = (kv[..., i:i + w].unflatten(-1, (k.shape[1], -1)).transpose(1, 2)"
            " for i, w in ((0, n), (n, v.shape[1] * v.shape[3])))",
            "q = torch.cat([rows(q), rows(q)], dim=-1)[..., :q.shape[1] * q.shape[3]]"
            f".unflatten(-1, ({case.q_heads}, -1)).transpose(1, 2)",
        ]
    if case.memory == "expanded":
        return [f"k, v = (x.expand({case.batch}, -1, -1, -1) for x in (k, v))"]
    if case.memory == "offset":
        return [
            "q, k, v = (torch.nn.functional.pad(x, (3, 1, 2, 1))[..., 2:-1, 3:-1]"
            " for x in (q, k, v))",
        ]
    return []


def _add_mask(case: AttentionCase, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    if case.mask is None:
        return [], {}
    heads = case.q_heads if case.mask.endswith("per head") else 1
    shape = (case.batch, heads, case.q_len, case.kv_len)
    if case.mask.startswith("bias"):
        lines = [f"mask = torch.randn({shape}, generator=g)"]
        return [*lines, *_cast("mask", dtype)], {"mask": "mask"}
    lines = [
        f"mask = torch.rand({shape}, generator=g) < 0.6",
        # Every row sees a key, also where a causal mask leaves it only the first.
        "mask[..., 0] = True",
    ]
    if case.mask in ("infinite", "lowest"):
        hidden = "-torch.inf" if case.mask == "infinite" else f"torch.finfo({dtype}).min"
        lines.append(f"mask = torch.zeros({shape}, dtype={dtype}).masked_fill(~mask, {hidden})")
    return lines, {"mask": "mask"}


def _cast(name: str, dtype: torch.dtype) -> list[str]:
    return [] if dtype == torch.float32 else [f"{name} = {name}.to({dtype})"]


def _row_lengths(case: AttentionCase, low: int) -> list[int]:
    """A number from ``low`` to ``kv_len`` a row, the rows different where there is room."""
    random = Random(case.seed)
    choices = list(range(low, case.kv_len + 1))
    random.shuffle(choices)
    return [choices[row % len(choices)] for row in range(case.batch)]


def _add_padding(case: AttentionCase, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    if case.padding is None:
        return [], {}
    real = _row_lengths(case, low=1)
    slot = f"torch.arange({case.kv_len})"
    if case.padding == "holes":
        line = f"key_valid = torch.rand({(case.batch, case.kv_len)}, generator=g) < 0.6"
        return [line, "key_valid[:, 0] = True"], {"key_valid": "key_valid"}
    if case.padding == "left":
        line = f"key_valid = {slot} >= torch.tensor({[[case.kv_len - n] for n in real]})"
    else:
        line = f"key_valid = {slot} < torch.tensor({[[n] for n in real]})"
    return [line], {"key_valid": "key_valid"}


def _add_cache(case: AttentionCase, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    if case.cache is None:
        return [], {}
    fill = "torch.nan" if case.cache == "nan" else "300.0"
    lengths = _row_lengths(case, low=min(case.q_len, case.kv_len))
    return [
        f"key_lengths = torch.tensor({lengths})",
        f"unused = (torch.arange({case.kv_len}) >= key_lengths[:, None])[:, None, :, None]",
        f"k, v = (x.masked_fill(unused, {fill}) for x in (k, v))",
    ], {"key_lengths": "key_lengths"}


def _add_packing(case: AttentionCase, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    if case.packing == "segments":
        # Three documents or more, at other places in each row; their ids need more than 8 bits.
        shift = f"torch.tensor({[[row] for row in range(case.batch)]})"
        segments = {
            name: f"(torch.arange({length}) + {shift}) * 3 // {length} * 256"
            for name, length in (("q_segments", case.q_len), ("k_segments", case.kv_len))
        }
        lines = [f"{name} = {source}" for name, source in segments.items()]
        return lines, {name: name for name in segments}
    if case.packing == "cumulative":
        random = Random(case.seed)
        documents = min(3, case.q_len, case.kv_len)
        cuts = {
            name: [0, *sorted(random.sample(range(1, length), documents - 1)), length]
            for name, length in (("q", case.q_len), ("k", case.kv_len))
        }
        if case.q_len == case.kv_len:  # self-attention: the same documents on both sides
            cuts["k"] = cuts["q"]
        return [
            f"cu_seqlens_q = torch.tensor({cuts['q']})",
            f"cu_seqlens_k = torch.tensor({cuts['k']})",
        ], {"cu_seqlens_q": "cu_seqlens_q", "cu_seqlens_k": "cu_seqlens_k"}
    return [], {}


def _add_positions(case: AttentionCase, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    if case.positions is None:
        return [], {}
    random = Random(case.seed)
    k_positions, q_positions = [], []
    # Often beyond what bfloat16 (256) and float16 (2048) count exactly.
    far = random.choice((0, 300, 5000))
    for _ in range(case.batch):
        if case.positions == "ring":
            # After `total` tokens, slot s holds the newest position p with p % kv_len == s.
            total = far + case.kv_len + random.randrange(1, case.kv_len + 1)
            slots = [s + (total - 1 - s) // case.kv_len * case.kv_len for s in range(case.kv_len)]
            queries = list(range(total - case.q_len, total))
        else:
            total = far + case.kv_len + 4
            slots = random.sample(range(far, total), case.kv_len)
            queries = [random.randrange(min(slots), total) for _ in range(case.q_len)]
        k_positions.append(slots)
        q_positions.append(queries)
    return [
        f"q_positions = torch.tensor({q_positions})",
        f"k_positions = torch.tensor({k_positions})",
    ], {"q_positions": "q_positions", "k_positions": "k_positions"}


def _add_sinks(case: AttentionCase, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    if not case.sinks:
        return [], {}
    lines = [f"sinks = torch.randn({case.q_heads}, generator=g) + 0.5"]
    return [*lines, *_cast("sinks", dtype)], {"sinks": "sinks"}


@st.composite
def attention_cases(
    draw: st.DrawFn,
    *,
    heads: tuple[tuple[int, int], ...] = HEADS,
    lengths: str = "any",
    q_len: int | None = None,
    kv_len: SearchStrategy[int] | int | None = None,
    widths: tuple[int, ...] = WIDTHS,
    value_width: SearchStrategy[str] | str = "equal",
    dtypes: tuple[str, ...] = DTYPES,
    batch: int | None = None,
    **options: Any,
) -> AttentionCase:
    """Cases with ``options`` (fields of AttentionCase, each a value or a strategy).

    ``lengths`` is ``any``, ``equal``, ``longer`` (more keys than queries) or ``shorter``; a causal
    case has more queries than keys only if asked for. ``value_width`` is ``equal`` to the key width
    or ``different`` from it. Three cases in four have sizes that cannot be confused, as far as the
    arguments allow; the others are convenient ones.
    """
    convenient = draw(st.integers(0, 3)) == 3
    telling_heads = tuple(pair for pair in heads if 1 < pair[1] < pair[0])
    q_heads, kv_heads = draw(st.sampled_from(heads if convenient else telling_heads or heads))
    queries, keys = draw(_lengths(lengths))
    if not convenient:
        queries, keys = _apart(queries, keys, lengths, {q_heads, kv_heads})
    drawn = {name: _draw(draw, option) for name, option in options.items()}
    if lengths == "any" and drawn.get("causal"):  # rows that see nothing are a rule of their own
        queries, keys = min(queries, keys), max(queries, keys)
    queries = queries if q_len is None else q_len
    keys = keys if kv_len is None else _draw(draw, kv_len)
    if batch is None:
        taken = set() if convenient else {1, q_heads, kv_heads, queries, keys}
        batch = draw(st.sampled_from([rows for rows in (2, 3, 5, 7, 9, 1) if rows not in taken]))
    head_dim = draw(st.sampled_from(widths))
    value_dim = head_dim
    if _draw(draw, value_width) == "different":
        value_dim = draw(st.sampled_from([w for w in (4, 8, 12, 24) if w != head_dim]))
    return AttentionCase(
        batch=batch,
        q_heads=q_heads,
        kv_heads=kv_heads,
        q_len=queries,
        kv_len=keys,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
        **drawn,
    )


def _apart(queries: int, keys: int, relation: str, taken: set[int]) -> tuple[int, int]:
    """The same lengths or a little longer, none of them in ``taken``, their relation kept."""
    while queries in taken or (relation == "equal" and keys in taken):
        queries, keys = queries + 1, keys + 1
    while keys in taken or (relation != "equal" and keys == queries):
        queries, keys = queries + (relation == "shorter"), keys + 1
    return queries, keys


@st.composite
def _lengths(draw: st.DrawFn, relation: str) -> tuple[int, int]:
    """Numbers of queries and keys."""
    if relation == "equal":
        length = draw(st.integers(5, 24))
        return length, length
    if relation == "longer":
        queries = draw(st.integers(1, 13))
        return queries, queries + draw(st.integers(1, 17))
    if relation == "shorter":
        keys = draw(st.integers(1, 9))
        return keys + draw(st.integers(1, 9)), keys
    return draw(st.integers(1, 17)), draw(st.integers(1, 24))


def _draw(draw: st.DrawFn, value: Any) -> Any:
    return draw(value) if isinstance(value, SearchStrategy) else value
