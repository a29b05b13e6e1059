"""What compressing experts saves, counted exactly, and whether a file of such counts is right.

Counts are integers of any size and ratios are quotients of them, never rounded. Source of the
formulas and of the fields: LawrenceRLiu/MoE_Factorize_Compress, ``src/compression_stats.py``. The
figures in that repository's documents do not follow from them: see :func:`contradictions_of`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from reference_impl.atomic_files import write_atomically

FILE_NAME = "compression_statistics.yaml"
SIZES = ("num_experts", "num_active_experts", "d_in", "d_out", "rank")
"""The fields of an entry that everything is computed from."""
GIVEN = ("layer_idx", "projection", *SIZES)
BYTES_PER_PARAMETER = 2
GIGABYTE = 10**9
TOLERANCE = 1e-9
"""Relative; parsers and writers keep sixteen digits, and what is rounded by hand has few."""

SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Makes plain values alone; the one in C, where there is one, is ten times as quick."""
SAFE_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

Fields = dict[str, Any]


class CompressionStats:
    """Counts of compressed projections; the names are those of the source."""

    def __init__(self, entries: Iterable[Mapping[str, Any]] = ()) -> None:
        self.entries: list[Fields] = []
        for entry in entries:
            self.add(entry)

    def add_layer_stats(
        self,
        layer_idx: int,
        projection: str,
        num_experts: int,
        d_in: int,
        d_out: int,
        rank: int,
        num_active_experts: int,
    ) -> None:
        """Add a projection of a layer; ValueError for sizes that are none, and for one given twice."""
        given = (layer_idx, projection, num_experts, num_active_experts, d_in, d_out, rank)
        self.add(dict(zip(GIVEN, given)))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry, which has the fields ``GIVEN`` and no others."""
        wrong = sorted(set(entry) ^ set(GIVEN))
        if wrong:
            raise ValueError(f"an entry has {', '.join(wrong)} missing or unknown")
        problems = [*impossible(entry), *repeated([*self.entries, entry])]
        if problems:
            raise ValueError("; ".join(problems))
        self.entries.append({name: entry[name] for name in GIVEN})

    def get_aggregate_stats(self) -> Fields:
        """The fields of the file, see :meth:`conformance.contracts.Statistics.aggregate`."""
        if not self.entries:
            raise ValueError("there is no entry to count")
        return self.totals([self.of_entry(entry) for entry in self.entries])

    aggregate = get_aggregate_stats

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the file; an old one stays until the new one is whole."""
        text = yaml.dump(self.get_aggregate_stats(), Dumper=SAFE_DUMPER, sort_keys=False)
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(directory) / FILE_NAME, lambda file: file.write(text.encode()))

    def contradictions(self, directory: str | os.PathLike[str]) -> list[str]:
        """See :func:`contradictions_of`."""
        return contradictions_of(directory)

    def of_entry(self, entry: Mapping[str, Any]) -> Fields:
        """The fields of an entry."""
        experts, active = entry["num_experts"], entry["num_active_experts"]
        core = entry["d_in"] * entry["d_out"]
        wrappers = self.wrapper_parameters(entry)
        total, used = core + experts * wrappers, core + active * wrappers
        return {
            **{name: entry[name] for name in GIVEN},
            "original_total_params": experts * core,
            "original_active_params": active * core,
            "compressed_total_params": total,
            "compressed_active_params": used,
            "core_params": core,
            "wrapper_params_per_expert": wrappers,
            "total_compression_ratio": ratio(total, experts * core),
            "total_reduction_percent": percent(experts * core - total, experts * core),
            "active_compression_ratio": ratio(used, active * core),
            "active_increase_percent": percent(used - active * core, active * core),
        }

    def wrapper_parameters(self, entry: Mapping[str, Any]) -> int:
        """Of one expert: U and V on either side of the core."""
        return 2 * entry["rank"] * (entry["d_in"] + entry["d_out"])

    def totals(self, layers: Sequence[Mapping[str, Any]]) -> Fields:
        """The fields of the file over those of its entries: ratios of sums."""
        original, compressed, active, used = (
            sum(layer[f"{kind}_params"] for layer in layers)
            for kind in (
                "original_total",
                "compressed_total",
                "original_active",
                "compressed_active",
            )
        )
        return {
            "num_entries": len(layers),
            "num_layers_compressed": len({layer["layer_idx"] for layer in layers}),
            "total_params_original": original,
            "total_params_compressed": compressed,
            "total_compression_ratio": ratio(compressed, original),
            "total_reduction_percent": percent(original - compressed, original),
            "active_params_original": active,
            "active_params_compressed": used,
            "active_compression_ratio": ratio(used, active),
            "active_change_percent": percent(used - active, active),
            "compute_ratio": self.compute_ratio(layers),
            "total_memory_original_gb": self.gigabytes(original),
            "total_memory_compressed_gb": self.gigabytes(compressed),
            "memory_saved_gb": self.gigabytes(original - compressed),
            "per_layer_stats": list(layers),
        }

    def compute_ratio(self, layers: Sequence[Mapping[str, Any]]) -> float:
        """Multiplications for a token: each active expert applies the core between its wrappers."""
        done = sum(
            layer["num_active_experts"]
            * (layer["core_params"] + layer["wrapper_params_per_expert"])
            for layer in layers
        )
        return ratio(done, sum(layer["original_active_params"] for layer in layers))

    def gigabytes(self, parameters: int) -> float:
        """Of so many parameters, in units of 10⁹ bytes."""
        return ratio(BYTES_PER_PARAMETER * parameters, GIGABYTE)


class CompressionStatistics:
    """The contract ``compression_statistics``."""

    statistics_type = CompressionStats

    def compression_statistics(self, entries: Sequence[Mapping[str, Any]]) -> CompressionStats:
        """See :class:`conformance.contracts.CompressionStatistics`."""
        return self.statistics_type(entries)


def ratio(part: int, whole: int) -> float:
    """The quotient, rounded once to the nearest float."""
    return float(Fraction(part, whole))


def percent(part: int, whole: int) -> float:
    """A hundred times the quotient, rounded once."""
    return float(Fraction(100 * part, whole))


def is_size(value: object) -> bool:
    """Whether it is a whole number of at least one (True is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def impossible(entry: Mapping[str, Any]) -> list[str]:
    """What of an entry cannot be, one line each, naming the field."""
    found = [
        f"{named(entry)}: {name} is {entry[name]!r}, expected a whole number of at least 1"
        for name in SIZES
        if not is_size(entry[name])
    ]
    active, experts = entry["num_active_experts"], entry["num_experts"]
    if not found and active > experts:
        found.append(f"{named(entry)}: num_active_experts is {active}, of num_experts {experts}")
    return found


def repeated(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which projections of a layer are there twice."""
    keys = [(entry["layer_idx"], entry["projection"]) for entry in entries]
    twice = {key for key in keys if keys.count(key) > 1}
    return [f"layer_idx {layer}: projection {name!r} is there twice" for layer, name in twice]


def named(entry: Mapping[str, Any]) -> str:
    """What an entry is called in a message."""
    return f"layer {entry.get('layer_idx')} {entry.get('projection')}"


# Files


def contradictions_of(directory: str | os.PathLike[str]) -> list[str]:
    """What of a file its per-layer entries contradict, one line each; empty for a right one.

    Everything is computed again from the sizes of the entries. So the block of figures that the
    source's documents print is found wrong: 0.19 where its shapes give 0.1652. ValueError, naming
    the file, for one that cannot be read.
    """
    found = read(Path(directory) / FILE_NAME)
    layers = found.get("per_layer_stats")
    if not isinstance(layers, list) or not layers:
        return ["per_layer_stats is missing or empty: nothing can be computed from it"]
    problems = []
    for number, layer in enumerate(layers):
        if not isinstance(layer, Mapping):
            problems.append(f"per_layer_stats: number {number} is no mapping")
            continue
        missing = [name for name in GIVEN if name not in layer]
        problems += [f"{named(layer)}: {name} is missing" for name in missing]
        problems += [] if missing else impossible(layer)
    if problems:
        return problems
    stats = CompressionStats()
    stats.entries = [{name: layer[name] for name in GIVEN} for layer in layers]
    right = stats.get_aggregate_stats()
    problems = repeated(stats.entries)
    for layer, expected in zip(layers, right.pop("per_layer_stats")):
        problems += differences(layer, expected, f"{named(layer)}: ")
    return problems + differences(found, right, "")


def read(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file, read without making objects of any type but YAML's own."""
    try:
        found = yaml.load(path.read_text("utf-8"), Loader=SAFE_LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds {type(found).__name__}, expected a mapping")
    return found


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> list[str]:
    """The fields that are missing or different."""
    problems = []
    for name, value in expected.items():
        if name not in found:
            problems.append(f"{where}{name} is missing")
        elif not same(found[name], value):
            problems.append(f"{where}{name} is {found[name]!r}, the entries give {value!r}")
    return problems


def same(found: object, expected: object) -> bool:
    """Equal; a quotient within what writing it with sixteen digits may change."""
    if not isinstance(expected, float):
        return type(found) is type(expected) and found == expected
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return False
    return math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
