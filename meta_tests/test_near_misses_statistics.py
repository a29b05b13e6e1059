"""Subtle mistakes of compression statistics that no catalogue lists, for every requirement."""

import json
from pathlib import Path

import pytest
import yaml
from mutants import Broken

from reference_impl.shared_core import statistics
from reference_impl.shared_core.statistics import (
    FILE_NAME,
    GIVEN,
    CompressionStatistics,
    CompressionStats,
    contradictions_of,
    percent,
    ratio,
)

NEAR_STATISTICS: dict[str, Broken] = {}


def near(*breaks: str):
    """Register statistics, whose docstring says what is wrong with them, for each requirement."""

    def decorate(kind: type) -> type:
        class Adapter(CompressionStatistics):
            statistics_type = kind

        wrong = " ".join(kind.__doc__.split())
        for number, slug in enumerate(breaks):
            name = f"{kind.__name__}-{number}" if number else kind.__name__
            slug = f"compression_statistics.{slug}"
            NEAR_STATISTICS[name] = Broken(name, slug, wrong, Adapter)
        return kind

    return decorate


@pytest.mark.parametrize("name", NEAR_STATISTICS)
def test_near_miss_is_caught(name):
    NEAR_STATISTICS[name].assert_caught()


class Entries(CompressionStats):
    """Has other fields of entries."""

    def of_entry(self, entry):
        found = super().of_entry(entry)
        return found | self.other(found)


class Totals(CompressionStats):
    """Has other fields of the aggregate."""

    def totals(self, layers):
        found = super().totals(layers)
        return found | self.other(found, layers)


# Entries


@near("entry.original")
class ActiveOriginalIsTheTotal(Entries):
    """Of the original all experts are active."""

    def other(self, found):
        return {"original_active_params": found["original_total_params"]}


@near("entry.ratios")
class RatiosInverted(Entries):
    """Ratios are original / compressed."""

    def other(self, found):
        total = ratio(found["original_total_params"], found["compressed_total_params"])
        return {"total_compression_ratio": total}


@near("entry.ratios")
class RatiosInFourDigits(Entries):
    """Ratios have four digits."""

    def other(self, found):
        return {name: round(found[name], 4) for name in found if name.endswith("_ratio")}


@near("entry.percentages")
class ReductionOfTheWholeIsNegative(Entries):
    """The reduction is a change: negative for fewer."""

    def other(self, found):
        return {"total_reduction_percent": -found["total_reduction_percent"]}


@near("entry.percentages")
class FractionsForPercentages(Entries):
    """The increase is a share and not a percentage."""

    def other(self, found):
        return {"active_increase_percent": found["active_increase_percent"] / 100}


@near("entry.as-given")
class SortedEntries(Totals):
    """Entries are sorted by layer and projection."""

    def other(self, found, layers):
        key = lambda layer: (layer["layer_idx"], layer["projection"])
        return {"per_layer_stats": sorted(layers, key=key)}


@near("entry.as-given")
class WidthsExchanged(Entries):
    """d_in and d_out are exchanged, which no count shows."""

    def other(self, found):
        return {"d_in": found["d_out"], "d_out": found["d_in"]}


# Aggregates


@near("aggregate.totals")
class FirstOfALayer(Totals):
    """Of a layer's projections the last one alone is in the totals."""

    def other(self, found, layers):
        last = {layer["layer_idx"]: layer for layer in layers}
        return {"total_params_original": sum(x["original_total_params"] for x in last.values())}


@near("aggregate.active")
class ActiveInProportion(Totals):
    """Active parameters are the total times k / E of the first entry."""

    def other(self, found, layers):
        first = layers[0]
        share = first["num_active_experts"] / first["num_experts"]
        return {"active_params_compressed": int(found["total_params_compressed"] * share)}


@near("aggregate.reduction")
class ReductionIsNeverNegative(Totals):
    """A model that has grown is reduced by nothing."""

    def other(self, found, layers):
        return {"total_reduction_percent": max(0.0, found["total_reduction_percent"])}


@near("aggregate.active-change")
class ChangeIsAReduction(Totals):
    """The change is positive for fewer."""

    def other(self, found, layers):
        return {"active_change_percent": -found["active_change_percent"]}


@near("aggregate.compute")
class ComputeOfAllExperts(Totals):
    """All experts are multiplied with, not those that are active."""

    def other(self, found, layers):
        done = sum(
            layer["num_experts"] * (layer["core_params"] + layer["wrapper_params_per_expert"])
            for layer in layers
        )
        return {"compute_ratio": ratio(done, found["total_params_original"])}


@near("aggregate.memory")
class SavedOfActive(Totals):
    """What is saved is counted on active parameters."""

    def other(self, found, layers):
        saved = found["active_params_original"] - found["active_params_compressed"]
        return {"memory_saved_gb": self.gigabytes(saved)}


@near("aggregate.layers-and-entries")
class LayersUpToTheLast(Totals):
    """Layers are counted up to the largest number."""

    def other(self, found, layers):
        return {"num_layers_compressed": max(layer["layer_idx"] for layer in layers) + 1}


@near("aggregate.all-active")
class AtMostAllButOne(Entries):
    """At most all experts but one are active."""

    def other(self, found):
        used = min(found["num_active_experts"], found["num_experts"] - 1) or 1
        used = found["core_params"] + used * found["wrapper_params_per_expert"]
        return {"compressed_active_params": used}


@near("aggregate.one-expert")
class OneExpertIsLeftAlone(Entries):
    """A single expert is counted as if it were not compressed."""

    def other(self, found):
        if found["num_experts"] > 1:
            return {}
        return {"compressed_total_params": found["core_params"]}


@near("aggregate.one-entry")
class OneEntryIsAModel(Totals):
    """A single entry is taken for one of three projections."""

    def other(self, found, layers):
        return {"num_entries": 3} if len(layers) == 1 else {}


@near("aggregate.exact-integers", "file.exact-integers")
class SumsOfFloats(Totals):
    """Sums are made in floats."""

    def other(self, found, layers):
        original = float(sum(float(layer["original_total_params"]) for layer in layers))
        return {"total_params_original": int(original)}


@near("aggregate.order-of-entries")
class RatioOfTheFirstTwo(Totals):
    """The compute ratio is that of the first entries."""

    def other(self, found, layers):
        return {"compute_ratio": self.compute_ratio(layers[:2])}


@near("aggregate.again")
class CountsOnAndOn(Totals):
    """Each time that it is asked it adds to what it has counted."""

    def other(self, found, layers):
        self.counted = getattr(self, "counted", 0) + found["total_params_original"]
        return {"total_params_original": self.counted}


@near("published.models", "published.mixtral")
class SmallerSideTwice(CompressionStats):
    """Wrappers of both sides are counted with the width of the input."""

    def wrapper_parameters(self, entry):
        return 4 * entry["rank"] * min(entry["d_in"], entry["d_out"])


# Files


@near("file.every-field")
class JsonForYaml(CompressionStats):
    """Writes JSON, in which 1e-05 is a number, and to YAML 1.1 a word."""

    def save(self, directory):
        text = json.dumps(self.get_aggregate_stats())
        (Path(directory) / FILE_NAME).write_text(text)


@near("file.every-field")
class TuplesInTheFile(CompressionStats):
    """Writes Python's tuples, which no other parser reads."""

    def save(self, directory):
        found = self.get_aggregate_stats()
        found["per_layer_stats"] = tuple(found["per_layer_stats"])
        (Path(directory) / FILE_NAME).write_text(yaml.dump(found))


@near("file.every-field")
class EntriesAreNotWritten(CompressionStats):
    """The file has the aggregate alone."""

    def save(self, directory):
        found = self.get_aggregate_stats()
        del found["per_layer_stats"]
        (Path(directory) / FILE_NAME).write_text(yaml.safe_dump(found))


@near("file.replaced")
class WritesOverTheBeginning(CompressionStats):
    """An older file's end is left where the new one is shorter."""

    def save(self, directory):
        path = Path(directory) / FILE_NAME
        old = path.read_text() if path.exists() else ""
        text = yaml.safe_dump(self.get_aggregate_stats(), sort_keys=False)
        path.write_text(text + old[len(text) :])


@near("file.replaced")
class LeavesABackup(CompressionStats):
    """The older file is left under another name."""

    def save(self, directory):
        path = Path(directory) / FILE_NAME
        if path.exists():
            path.rename(path.with_suffix(".yaml.bak"))
        super().save(directory)


# Contradictions


class Verifier(CompressionStats):
    """Judges files in another way."""

    def contradictions(self, directory):
        return [line for line in contradictions_of(directory) if self.tells(line)]


@near("contradictions.of-the-file")
class HeldAgainstItself(CompressionStats):
    """A file is held against the statistics' own entries."""

    def contradictions(self, directory):
        found = statistics.read(Path(directory) / FILE_NAME)
        return statistics.differences(found, self.get_aggregate_stats(), "")


@near("contradictions.none")
class DifferentOrderIsWrong(CompressionStats):
    """A file is right if it is the text that would be saved, in its order and its digits."""

    def contradictions(self, directory):
        found = statistics.read(Path(directory) / FILE_NAME)
        text = yaml.safe_dump(found, sort_keys=True)
        return [] if (Path(directory) / FILE_NAME).read_text() == text else ["the text differs"]


@near("contradictions.totals")
class LayersAreNotChecked(Verifier):
    """The number of layers is taken as it is."""

    def tells(self, line):
        return not line.startswith("num_layers_compressed")


@near("contradictions.totals")
class FirstContradictionAlone(CompressionStats):
    """Of contradictions that are small the sum is taken: a part in ten thousand is none."""

    def contradictions(self, directory):
        found = statistics.read(Path(directory) / FILE_NAME)
        self.entries = [{k: x[k] for k in GIVEN} for x in found["per_layer_stats"]]
        return [
            name
            for name, value in self.get_aggregate_stats().items()
            if name != "per_layer_stats" and abs(found[name] - value) > 1e-3 * abs(value)
        ]


@near("contradictions.entries", "contradictions.impossible-sizes")
class EntriesAreNotChecked(CompressionStats):
    """Fields of entries are taken as they are, and sums are made of them."""

    def contradictions(self, directory):
        found = statistics.read(Path(directory) / FILE_NAME)
        right = self.totals(found["per_layer_stats"])
        return statistics.differences(found, right, "")


@near("contradictions.rounded", "contradictions.printed-figures")
class RatiosWithinAPercent(Verifier):
    """Ratios and memory may be off, as printed figures are."""

    def tells(self, line):
        return "_ratio" not in line and "_gb" not in line and "_percent" not in line


@near("contradictions.missing-fields")
class WhatIsMissingIsRight(Verifier):
    """Fields that are missing are not looked for."""

    def tells(self, line):
        return "missing" not in line


@near("contradictions.missing-entry")
class AsManyAsItSays(Verifier):
    """The number of entries is taken as it is."""

    def tells(self, line):
        return not line.startswith("num_entries")


@near("contradictions.duplicates")
class TwiceIsTwoEntries(Verifier):
    """An entry that is there twice is two."""

    def tells(self, line):
        return "twice" not in line


@near("contradictions.damaged-file")
class NothingToContradict(CompressionStats):
    """A file that cannot be read has nothing that contradicts it."""

    def contradictions(self, directory):
        try:
            return contradictions_of(directory)
        except ValueError:
            return []


@near("contradictions.no-code")
class LoadsObjects(CompressionStats):
    """Files are read with a loader that makes any object."""

    def contradictions(self, directory):
        text = (Path(directory) / FILE_NAME).read_text()
        found = yaml.load(text, Loader=yaml.UnsafeLoader)
        return statistics.differences(found, self.get_aggregate_stats(), "")


# Refusals


@near(
    "refuses.rank-below-one",
    "refuses.sizes-below-one",
    "refuses.more-active-than-there-are",
    "refuses.duplicates",
)
class Unchecked(CompressionStats):
    """Entries are taken as they are."""

    def add(self, entry):
        self.entries.append(dict(entry))


@near("refuses.no-active-experts", "refuses.sizes-below-one")
class NothingOfNothingIsOne(CompressionStats):
    """What would be divided by zero is 1."""

    def add(self, entry):
        self.entries.append(dict(entry))

    def of_entry(self, entry):
        raised = {name: max(1, entry[name]) for name in ("num_active_experts", "num_experts")}
        return super().of_entry(entry | raised) | dict(entry)


@near("refuses.duplicates")
class TheLastOneCounts(CompressionStats):
    """An entry that is given again takes the place of the first."""

    def add(self, entry):
        key = (entry["layer_idx"], entry["projection"])
        self.entries = [x for x in self.entries if (x["layer_idx"], x["projection"]) != key]
        super().add(entry)


@near("refuses.more-active-than-there-are")
class ActiveUpToAll(CompressionStats):
    """k above E is taken for E."""

    def add(self, entry):
        experts = entry["num_experts"]
        super().add(entry | {"num_active_experts": min(entry["num_active_experts"], experts)})


@near("entry.percentages")
class IncreaseOfTheTotal(Entries):
    """The increase is that of the total."""

    def other(self, found):
        more = found["compressed_total_params"] - found["original_total_params"]
        return {"active_increase_percent": percent(more, found["original_total_params"])}
