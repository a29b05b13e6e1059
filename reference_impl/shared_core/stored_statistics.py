"""Whether the statistics beside a compressed model are those of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reference_impl.shared_core.statistics import GIVEN, CompressionStats, differences, named, read
from reference_impl.stored import CheckpointError


def check_statistics(path: Path, stats: CompressionStats) -> None:
    """Raise :class:`CheckpointError` that names a field which the tensors contradict.

    Fields may be missing that the source did not write (``num_entries``, ``compute_ratio``); it
    counted projections as layers, which is accepted.
    """
    try:
        found = read(path)
    except ValueError as error:
        raise CheckpointError(str(path), str(error)) from error
    expected = stats.get_aggregate_stats()
    problems = wrong_layers(found.get("per_layer_stats"), expected.pop("per_layer_stats"))
    if found.get("num_layers_compressed") == expected["num_entries"]:
        del expected["num_layers_compressed"]
    problems += differences(found, {name: x for name, x in expected.items() if name in found}, "")
    if problems:
        raise CheckpointError(str(path), problems[0])


def wrong_layers(found: Any, expected: list[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the entries of layers; their order is free."""
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        return ["per_layer_stats is missing, or no list of mappings"]
    by_place = {(each.get("layer_idx"), each.get("projection")): each for each in found}
    places = {(each["layer_idx"], each["projection"]): each for each in expected}
    if len(by_place) < len(found):
        return ["per_layer_stats has a projection twice"]
    for place in sorted(by_place.keys() ^ places.keys(), key=str):
        what = "is missing" if place in places else "is not of this model"
        return [f"per_layer_stats: layer {place[0]} {place[1]} {what}"]
    problems = []
    for place, right in places.items():
        there = by_place[place]
        asked = {name: x for name, x in right.items() if name in GIVEN or name in there}
        problems += differences(there, asked, f"{named(right)}: ")
    return problems
