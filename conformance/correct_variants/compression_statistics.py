"""Other right ways to offer the contract ``compression_statistics``."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import numpy as np
import yaml

from conformance.correct_variants import correct_variant
from reference_impl.shared_core.statistics import (
    FILE_NAME,
    CompressionStatistics,
    CompressionStats,
)


class _PlainQuotients(CompressionStats):
    """Quotients of integers, percentages of quotients, differences of gigabytes."""

    def of_entry(self, entry):
        found = super().of_entry(entry)
        total = found["compressed_total_params"] / found["original_total_params"]
        active = found["compressed_active_params"] / found["original_active_params"]
        return found | {
            "total_compression_ratio": total,
            "total_reduction_percent": 100 * (1 - total),
            "active_compression_ratio": active,
            "active_increase_percent": (active - 1) * 100.0,
        }

    def totals(self, layers):
        found = super().totals(layers)
        total = found["total_params_compressed"] / found["total_params_original"]
        active = found["active_params_compressed"] / found["active_params_original"]
        before, after = (found[f"total_params_{x}"] * 2 / 1e9 for x in ("original", "compressed"))
        return found | {
            "total_reduction_percent": 100.0 * (1.0 - total),
            "active_change_percent": 100.0 * (active - 1.0),
            "total_memory_original_gb": before,
            "total_memory_compressed_gb": after,
            "memory_saved_gb": before - after,
        }


@correct_variant("stats-plain-quotients", contract="compression_statistics")
class PlainQuotients(CompressionStatistics):
    """Percentages are made of quotients that are rounded already, as in the source."""

    statistics_type = _PlainQuotients


class _ReadOnly(CompressionStats):
    """Gives read-only mappings in a tuple, with fields of its own among them."""

    def aggregate(self):
        found = self.get_aggregate_stats()
        layers = tuple(MappingProxyType(x | {"bits": 16}) for x in found["per_layer_stats"])
        return MappingProxyType(found | {"per_layer_stats": layers, "model_name": "a model"})


@correct_variant("stats-read-only", contract="compression_statistics")
class ReadOnly(CompressionStatistics):
    """The aggregate is read-only and has further fields."""

    statistics_type = _ReadOnly


class _Sorted(CompressionStats):
    """Writes sorted fields, in flow style, behind a comment, with numbers in many digits."""

    def save(self, directory):
        text = yaml.safe_dump(self.get_aggregate_stats(), default_flow_style=None, width=60)
        (Path(directory) / FILE_NAME).write_text(f"# statistics\n---\n{text}")


@correct_variant("stats-sorted-yaml", contract="compression_statistics")
class SortedYaml(CompressionStatistics):
    """The fields of the file are sorted, and entries are on a line."""

    statistics_type = _Sorted


class _Numbers(CompressionStats):
    """Gives fractions and numpy's floats."""

    def aggregate(self):
        found = self.get_aggregate_stats()
        part, whole = found["total_params_compressed"], found["total_params_original"]
        return found | {
            "total_compression_ratio": Fraction(part, whole),
            "active_compression_ratio": np.float64(found["active_compression_ratio"]),
            "num_entries": np.int64(found["num_entries"]),
        }


@correct_variant("stats-other-numbers", contract="compression_statistics")
class OtherNumbers(CompressionStatistics):
    """Ratios are a fraction and a number of numpy's."""

    statistics_type = _Numbers


class _NoVerifier:
    """Has the contract's methods alone, and no verifier; checks when it is asked."""

    def __init__(self, entries):
        self.entries = entries

    def aggregate(self):
        return CompressionStats(self.entries).get_aggregate_stats()

    def save(self, directory):
        CompressionStats(self.entries).save(directory)


@correct_variant("stats-checked-late", contract="compression_statistics")
class CheckedLate:
    """Entries are checked when they are counted; there is no verifier."""

    def compression_statistics(self, entries):
        return _NoVerifier(entries)


class _OneLine(CompressionStats):
    """Tells contradictions of any kind in longer lines, and reads floats as decimals."""

    def contradictions(self, directory):
        found = super().contradictions(directory)
        return tuple(f"{FILE_NAME}: error: {line} ({Decimal(len(found))} in all)" for line in found)


@correct_variant("stats-longer-lines", contract="compression_statistics")
class LongerLines(CompressionStatistics):
    """Contradictions are a tuple of longer lines."""

    statistics_type = _OneLine
