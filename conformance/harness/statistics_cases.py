"""Cases of compression statistics: entries, and what each field is by counting tensors.

Sizes are drawn so that no entry has the ratio of another, and layers have several entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import Call
from conformance.harness.qwen2_cases import as_strategy

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BYTES_OF_A_PARAMETER = 2


class Entry(NamedTuple):
    """A projection of a layer."""

    layer_idx: int
    projection: str
    num_experts: int
    num_active_experts: int
    d_in: int
    d_out: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class StatisticsCase:
    """The entries that statistics are of."""

    entries: tuple[Entry, ...]
    published: str = ""
    """The name of a model whose figures are known."""
    seed: int = 0

    def __repr__(self) -> str:
        """The entries as plain tuples."""
        return f"StatisticsCase(entries={[tuple(entry) for entry in self.entries]!r})"

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set()
        if len(self.entries) == 1:
            equal.add("one entry")
        if len({entry.layer_idx for entry in self.entries}) == len(self.entries):
            equal.add("one entry a layer")
        if len({entry[2:] for entry in self.entries}) == 1:
            equal.add("equal entries")
        if all(entry.num_active_experts == entry.num_experts for entry in self.entries):
            equal.add("all experts are active")
        return frozenset(equal)

    def call(self, *edits: str) -> Call:
        """The call that makes the statistics; ``edits`` are lines that change ``entries``."""
        fields = repr(Entry._fields)
        lines = (
            f"rows = {[tuple(entry) for entry in self.entries]!r}",
            f"entries = [dict(zip({fields}, row)) for row in rows]",
            *edits,
        )
        return Call("compression_statistics", lines, ("entries",), case=self)

    @property
    def one(self) -> int:
        """The number of the entry that a rule about one of them is about."""
        return self.seed % len(self.entries)


SINGLE = {"one entry", "one entry a layer", "equal entries"}
"""What is confusable in a case of one entry."""


# What the fields are


def tensors_of(entry: Entry, experts: int) -> tuple[list[int], list[int]]:
    """The sizes of all tensors of so many experts: as they were, and the wrappers that they get."""
    original = [prod((entry.d_out, entry.d_in)) for _ in range(experts)]
    wrappers = [
        prod((width, entry.rank))
        for _ in range(experts)
        for width in (entry.d_in, entry.d_in, entry.d_out, entry.d_out)
    ]
    return original, wrappers


def fields_of(entry: Entry) -> dict[str, Any]:
    """The fields of an entry: integers, and quotients as fractions."""
    core = prod((entry.d_out, entry.d_in))
    total, wrappers = map(sum, tensors_of(entry, entry.num_experts))
    active, active_wrappers = map(sum, tensors_of(entry, entry.num_active_experts))
    return {
        **entry._asdict(),
        "original_total_params": total,
        "original_active_params": active,
        "compressed_total_params": core + wrappers,
        "compressed_active_params": core + active_wrappers,
        "core_params": core,
        "wrapper_params_per_expert": wrappers // entry.num_experts,
        "total_compression_ratio": Fraction(core + wrappers, total),
        "total_reduction_percent": 100 - 100 * Fraction(core + wrappers, total),
        "active_compression_ratio": Fraction(core + active_wrappers, active),
        "active_increase_percent": 100 * Fraction(core + active_wrappers, active) - 100,
    }


def aggregate_of(entries: tuple[Entry, ...]) -> dict[str, Any]:
    """The fields of the aggregate but its list of entries: integers, and quotients as fractions."""
    each = [fields_of(entry) for entry in entries]
    total = lambda name: sum(fields[name] for fields in each)
    original, compressed = total("original_total_params"), total("compressed_total_params")
    active, used = total("original_active_params"), total("compressed_active_params")
    multiplied = sum(
        fields["num_active_experts"] * (fields["core_params"] + fields["wrapper_params_per_expert"])
        for fields in each
    )
    size = Fraction(BYTES_OF_A_PARAMETER, 10**9)
    return {
        "num_entries": len(entries),
        "num_layers_compressed": len({entry.layer_idx for entry in entries}),
        "total_params_original": original,
        "total_params_compressed": compressed,
        "total_compression_ratio": Fraction(compressed, original),
        "total_reduction_percent": 100 - 100 * Fraction(compressed, original),
        "active_params_original": active,
        "active_params_compressed": used,
        "active_compression_ratio": Fraction(used, active),
        "active_change_percent": 100 * Fraction(used, active) - 100,
        "compute_ratio": Fraction(multiplied, active),
        "total_memory_original_gb": size * original,
        "total_memory_compressed_gb": size * compressed,
        "memory_saved_gb": size * (original - compressed),
    }


def document_of(entries: tuple[Entry, ...]) -> dict[str, Any]:
    """What a right file has: the aggregate with the fields of every entry."""
    each = [plain(fields_of(entry)) for entry in entries]
    return plain(aggregate_of(entries)) | {"per_layer_stats": each}


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with floats in the place of fractions."""
    return {k: float(v) if isinstance(v, Fraction) else v for k, v in fields.items()}


# Published models


def block(
    experts: int, active: int, hidden: int, intermediate: int, rank: int
) -> tuple[Entry, ...]:
    """The three projections of one layer."""
    sizes = {"gate_proj": (hidden, intermediate), "up_proj": (hidden, intermediate)}
    sizes["down_proj"] = (intermediate, hidden)
    return tuple(
        Entry(0, name, experts, active, d_in, d_out, rank) for name, (d_in, d_out) in sizes.items()
    )


MIXTRAL = block(8, 2, 4096, 14336, 64)
PUBLISHED: dict[str, tuple[tuple[Entry, ...], dict[str, float]]] = {
    "Mixtral-8x7B at rank 64": (
        MIXTRAL,
        {
            "total_params_original": 1_409_286_144,
            "total_params_compressed": 232_783_872,
            "active_params_original": 352_321_536,
            "active_params_compressed": 190_316_544,
            "total_compression_ratio": 0.165179,
            "total_reduction_percent": 83.482143,
            "active_compression_ratio": 0.540179,
            "active_change_percent": -45.982143,
            "compute_ratio": 1.040179,
            "total_memory_original_gb": 2.818572,
            "total_memory_compressed_gb": 0.465568,
            "memory_saved_gb": 2.353005,
        },
    ),
    "one projection of Mixtral-8x7B at rank 64": (
        MIXTRAL[:1],
        {
            "total_params_original": 469_762_048,
            "total_params_compressed": 77_594_624,
            "active_params_original": 117_440_512,
            "active_params_compressed": 63_438_848,
        },
    ),
    "Qwen3-30B-A3B at rank 32": (
        block(128, 8, 2048, 768, 32),
        {"total_compression_ratio": 0.122396, "active_compression_ratio": 0.239583},
    ),
    "Qwen3-30B-A3B at rank 64": (
        block(128, 8, 2048, 768, 64),
        {
            "total_params_original": 3 * 201_326_592,
            "total_params_compressed": 3 * 47_710_208,
            "total_compression_ratio": 0.236979,
            "active_compression_ratio": 0.354167,
            "compute_ratio": 1.229167,
        },
    ),
    "Qwen3-30B-A3B at rank 128": (
        block(128, 8, 2048, 768, 128),
        {"total_compression_ratio": 0.466146, "active_compression_ratio": 0.583333},
    ),
}
"""Shapes of published models, and figures worked out by hand; quotients to six decimals."""

PRINTED = {
    "total_params_compressed": 269_000_000,
    "total_compression_ratio": 0.19,
    "total_reduction_percent": 81.0,
    "active_params_compressed": 199_000_000,
    "active_compression_ratio": 0.57,
    "active_change_percent": -43.0,
    "total_memory_compressed_gb": 0.54,
    "memory_saved_gb": 2.28,
}
"""The figures that are printed for MIXTRAL and do not follow from the formula."""


# Strategies

WIDTHS = st.integers(5, 5000)
NUMBERS = st.integers(3, 200)
RANKS = st.integers(1, 300)
LARGE = st.integers(10**8, 10**9)
"""Widths of matrices with more elements than a float counts exactly."""


def statistics_cases(
    *,
    least: int = 4,
    most: int = 7,
    experts: SearchStrategy[int] = NUMBERS,
    active: str = "some",
    width: SearchStrategy[int] = WIDTHS,
    rank: SearchStrategy[int] = RANKS,
) -> SearchStrategy[StatisticsCase]:
    """Entries of such sizes, of several layers; ``active`` experts are "some", or "all"."""
    return _statistics_cases((least, most), experts, active, width, rank)


@st.composite
def _statistics_cases(
    draw: st.DrawFn,
    numbers: tuple[int, int],
    experts: SearchStrategy[int],
    active: str,
    width: SearchStrategy[int],
    rank: SearchStrategy[int],
) -> StatisticsCase:
    keys = draw(st.permutations([(layer, name) for layer in (2, 7, 11) for name in PROJECTIONS]))
    number = draw(st.integers(*numbers))
    entries = []
    for layer, name in keys[:number]:
        total = draw(experts)
        chosen = total if active == "all" else draw(st.integers(1, max(1, total - 1)))
        sizes = draw(width), draw(width), draw(rank)
        entries.append(Entry(layer, name, total, chosen, *sizes))
    return StatisticsCase(entries=tuple(entries), seed=draw(st.integers(0, 99)))


def published_cases(*names: str) -> SearchStrategy[StatisticsCase]:
    """The entries of published models (default: of all)."""
    chosen = as_strategy(st.sampled_from(names or tuple(PUBLISHED)))
    return chosen.map(lambda name: StatisticsCase(entries=PUBLISHED[name][0], published=name))
