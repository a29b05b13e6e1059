"""Documented bugs of the contract ``compression_statistics``."""

from __future__ import annotations

from pathlib import Path

import yaml

from conformance.known_bugs import known_bug
from reference_impl.shared_core.statistics import (
    FILE_NAME,
    CompressionStatistics,
    CompressionStats,
    percent,
    ratio,
)

# Counts of an entry


class _WithTotalWrappers(CompressionStats):
    def of_entry(self, entry):
        found = super().of_entry(entry)
        used, active = found["compressed_total_params"], found["original_active_params"]
        return {
            **found,
            "compressed_active_params": used,
            "active_compression_ratio": ratio(used, active),
            "active_increase_percent": percent(used - active, active),
        }


@known_bug(
    "stats-active-with-all-wrappers",
    contract="compression_statistics",
    breaks="compression_statistics.entry.compressed-active",
)
class ActiveWithAllWrappers(CompressionStatistics):
    """Active parameters have the wrappers of all experts, not of those that a token uses."""

    statistics_type = _WithTotalWrappers


class _CoreForEveryActive(CompressionStats):
    def of_entry(self, entry):
        found = super().of_entry(entry)
        experts, active = entry["num_active_experts"], found["original_active_params"]
        used = experts * (found["core_params"] + found["wrapper_params_per_expert"])
        return {
            **found,
            "compressed_active_params": used,
            "active_compression_ratio": ratio(used, active),
            "active_increase_percent": percent(used - active, active),
        }


@known_bug(
    "stats-active-with-all-wrappers.core-per-expert",
    contract="compression_statistics",
    breaks="compression_statistics.entry.compressed-active",
)
class CoreForEveryActive(CompressionStatistics):
    """Active parameters have the core once an expert: that is the number of multiplications."""

    statistics_type = _CoreForEveryActive


class _HalfOfTheWrappers(CompressionStats):
    def wrapper_parameters(self, entry):
        return entry["rank"] * (entry["d_in"] + entry["d_out"])


@known_bug(
    "stats-half-wrappers",
    contract="compression_statistics",
    breaks="compression_statistics.entry.core-and-wrappers",
)
class HalfOfTheWrappers(CompressionStatistics):
    """Wrappers have r · (d_in + d_out) parameters: U or V, and not both."""

    statistics_type = _HalfOfTheWrappers


class _CoreOfEveryExpert(CompressionStats):
    def of_entry(self, entry):
        found = super().of_entry(entry)
        experts, original = entry["num_experts"], found["original_total_params"]
        total = experts * (found["core_params"] + found["wrapper_params_per_expert"])
        return {
            **found,
            "compressed_total_params": total,
            "total_compression_ratio": ratio(total, original),
            "total_reduction_percent": percent(original - total, original),
        }


@known_bug(
    "stats-half-wrappers.core-per-expert",
    contract="compression_statistics",
    breaks="compression_statistics.entry.compressed-total",
)
class CoreOfEveryExpert(CompressionStatistics):
    """The core is counted for every expert."""

    statistics_type = _CoreOfEveryExpert


# Aggregates


class _MeanOfRatios(CompressionStats):
    def totals(self, layers):
        mean = lambda name: sum(layer[name] for layer in layers) / len(layers)
        return {
            **super().totals(layers),
            "total_compression_ratio": mean("total_compression_ratio"),
            "active_compression_ratio": mean("active_compression_ratio"),
        }


@known_bug(
    "stats-mean-of-ratios",
    contract="compression_statistics",
    breaks="compression_statistics.aggregate.ratio-of-sums",
)
class MeanOfRatios(CompressionStatistics):
    """The ratio is the mean of the ratios of the entries, small ones as heavy as large ones."""

    statistics_type = _MeanOfRatios


class _BinaryGigabytes(CompressionStats):
    def gigabytes(self, parameters):
        return ratio(2 * parameters, 2**30)


@known_bug(
    "stats-memory-units",
    contract="compression_statistics",
    breaks="compression_statistics.aggregate.memory",
)
class BinaryGigabytes(CompressionStatistics):
    """Memory is in units of 2³⁰ bytes and called gigabytes."""

    statistics_type = _BinaryGigabytes


class _FourBytes(CompressionStats):
    def gigabytes(self, parameters):
        return ratio(4 * parameters, 10**9)


@known_bug(
    "stats-memory-units.four-bytes",
    contract="compression_statistics",
    breaks="compression_statistics.aggregate.memory",
)
class FourBytes(CompressionStatistics):
    """Memory is that of float32."""

    statistics_type = _FourBytes


class _EntriesAsLayers(CompressionStats):
    def totals(self, layers):
        return {**super().totals(layers), "num_layers_compressed": len(layers)}


@known_bug(
    "stats-entries-as-layers",
    contract="compression_statistics",
    breaks="compression_statistics.aggregate.layers-and-entries",
)
class EntriesAsLayers(CompressionStatistics):
    """Every projection is counted as a layer."""

    statistics_type = _EntriesAsLayers


class _ComputeFromParameters(CompressionStats):
    def compute_ratio(self, layers):
        used = sum(layer["compressed_active_params"] for layer in layers)
        return ratio(used, sum(layer["original_active_params"] for layer in layers))


@known_bug(
    "stats-compute-is-active-parameters",
    contract="compression_statistics",
    breaks="compression_statistics.aggregate.compute",
)
class ComputeFromParameters(CompressionStatistics):
    """Multiplications are taken for active parameters, as if the core were applied once a token."""

    statistics_type = _ComputeFromParameters


# Published figures


class _PrintedFigures(CompressionStats):
    """Wrappers of rank 105, with which the formula gives the figures that are printed for 64."""

    def wrapper_parameters(self, entry):
        rank = entry["rank"]
        published = {entry["d_in"], entry["d_out"]} == {4096, 14336} and rank == 64
        return 2 * (105 if published else rank) * (entry["d_in"] + entry["d_out"])


@known_bug(
    "stats-printed-figures",
    contract="compression_statistics",
    breaks="compression_statistics.published.mixtral",
)
class PrintedFigures(CompressionStatistics):
    """Mixtral's shapes at rank 64 give the 269 million parameters and 0.19 that are printed."""

    statistics_type = _PrintedFigures


class _WithinBands(CompressionStats):
    """Looks whether ratios are in the bands that are printed, and at nothing else."""

    def contradictions(self, directory):
        found = yaml.safe_load((Path(directory) / FILE_NAME).read_text())
        bands = {
            "total_compression_ratio": (0.19, 0.25),
            "active_compression_ratio": (0.5, 0.6),
        }
        return [
            f"{name} is {found[name]}, expected {low} to {high}"
            for name, (low, high) in bands.items()
            if not low <= found[name] <= high
        ]


@known_bug(
    "stats-printed-figures.bands",
    contract="compression_statistics",
    breaks="compression_statistics.contradictions.none",
)
class WithinBands(CompressionStatistics):
    """A file is right if its ratios are in printed bands, which no ratio of Mixtral's shapes is."""

    statistics_type = _WithinBands


class _RoundedInFile(CompressionStats):
    def save(self, directory):
        found = {
            name: round(value, 2) if isinstance(value, float) else value
            for name, value in self.get_aggregate_stats().items()
        }
        (Path(directory) / FILE_NAME).write_text(yaml.safe_dump(found))


@known_bug(
    "stats-printed-figures.rounded",
    contract="compression_statistics",
    breaks="compression_statistics.file.every-field",
)
class RoundedInFile(CompressionStatistics):
    """Figures are rounded to two digits when they are written."""

    statistics_type = _RoundedInFile


class _TrustsTotals(CompressionStats):
    def contradictions(self, directory):
        found = yaml.safe_load((Path(directory) / FILE_NAME).read_text())
        part = found["total_params_compressed"] / found["total_params_original"]
        right = abs(part - found["total_compression_ratio"]) < 1e-9
        return [] if right else ["total_compression_ratio is not compressed / original"]


@known_bug(
    "stats-printed-figures.not-recomputed",
    contract="compression_statistics",
    breaks="compression_statistics.contradictions.totals",
)
class TrustsTotals(CompressionStatistics):
    """A file is held against its own totals, which nobody computes again from the shapes."""

    statistics_type = _TrustsTotals


class _Empty(CompressionStats):
    def get_aggregate_stats(self):
        return super().get_aggregate_stats() if self.entries else {}

    aggregate = get_aggregate_stats

    def save(self, directory):
        (Path(directory) / FILE_NAME).write_text(yaml.safe_dump(self.aggregate(), sort_keys=False))


@known_bug(
    "stats-nothing-counted",
    contract="compression_statistics",
    breaks="compression_statistics.refuses.no-entries",
)
class NothingCounted(CompressionStatistics):
    """Without entries the aggregate is empty, and an empty file is written."""

    statistics_type = _Empty
