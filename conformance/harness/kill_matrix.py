"""Which requirements catch which planted bug, and whether correct variants pass them all.

Tests are called as functions here, without a pytest run inside pytest.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import hypothesis

from conformance.correct_variants import CorrectVariant, all_correct_variants
from conformance.harness import profiles
from conformance.harness.failures import ConformanceFailure, Declined, Inconclusive, NotRun
from conformance.harness.lanes import PRECISION, semantic_and_exact_only
from conformance.harness.memo import keep_whole_gate
from conformance.harness.requirement import all_requirements
from conformance.known_bugs import PlantedBug, all_known_bugs


@dataclass(frozen=True)
class Kill:
    """A requirement that an implementation fails, how, and in which lane."""

    requirement: str
    kind: str
    lane: str


@dataclass(frozen=True)
class Row:
    """One planted bug in the matrix."""

    id: str
    contract: str
    breaks: str
    caught_by: tuple[str, ...]
    without_precision_lane: bool
    """Whether the semantic and exact lanes catch it alone."""


def failures(
    method: object,
    contract: str,
    *,
    seed: int | None = None,
    only: Container[str] | None = None,
    cases: int | None = None,
) -> list[Kill]:
    """The requirements of ``contract`` that ``method`` fails under the gate profile.

    With a ``seed`` the cases are drawn anew instead of being those of the gate. ``only`` names the
    requirements that are checked, ``cases`` bounds how many cases of each.
    """
    settings = profiles.without_shrinking(profiles.PROFILES["gate"])
    if cases is not None:
        settings = hypothesis.settings(settings, max_examples=cases)
    found = []
    with profiles.temporarily(settings, seed=seed):
        for slug, record in all_requirements().items():
            if record.contract != contract or record.gpu or (only is not None and slug not in only):
                continue
            try:
                record.check(method)
            except ConformanceFailure as failure:
                found.append(Kill(slug, failure.kind, failure.lane))
            except (Declined, Inconclusive, NotRun):
                continue
    return found


FEWER_CASES = {
    "gpt_checkpoint": 3,
    "parallel_linear": 3,
    "weight_loader": 3,
    "causal_lm": 3,
    "flat_shards": 3,
    "moe_router": 4,
    "experts": 4,
    "moe_block": 4,
    "expert_parallel_block": 4,
    "shared_core": 4,
    "shared_core_fit": 4,
    "shared_core_block": 4,
    "compressed_checkpoint": 3,
    "distillation_loss": 4,
    "loglikelihood": 4,
    "checkpoint_watcher": 3,
}
"""Contracts whose cases take too long to run them all against every bug, and how many are run.

Of the requirement whose rule a bug breaks all of the gate's cases are run all the same.
"""


def row(bug: PlantedBug) -> Row:
    """The row of one planted bug."""
    kills = kills_of(bug)
    caught = any(kill.lane != PRECISION for kill in kills)
    if kills and not caught:  # the precision lane was first; see whether it was needed
        with semantic_and_exact_only():
            caught = bool(kills_of(bug))
    slugs = tuple(kill.requirement for kill in kills)
    return Row(bug.id, bug.contract, bug.breaks, slugs, caught)


def kills_of(bug: PlantedBug) -> list[Kill]:
    """The requirements that catch a planted bug."""
    method = getattr(bug.make(), bug.contract)
    cases = FEWER_CASES.get(bug.contract)
    kills = failures(method, bug.contract, cases=cases)
    if cases is None or any(kill.requirement == bug.breaks for kill in kills):
        return kills
    return failures(method, bug.contract, only=(bug.breaks,)) + kills


def kill_matrix(processes: int = 2) -> list[Row]:
    """A row for every planted bug, in the order of the catalogue."""
    return in_processes(_row_by_id, list(all_known_bugs()), processes)


def false_alarms(
    variants: Iterable[CorrectVariant], seed: int | None = None
) -> list[tuple[str, Kill]]:
    """Requirements that correct variants fail, as (variant id, kill); it must be empty."""
    return [
        (variant.id, kill)
        for variant in variants
        for kill in failures(getattr(variant.make(), variant.contract), variant.contract, seed=seed)
    ]


def false_alarms_over_seeds(seeds: Iterable[int], processes: int = 2) -> list[tuple[str, Kill]]:
    """:func:`false_alarms` of every correct variant with the cases of every seed."""
    found = in_processes(_false_alarms_of_seed, list(seeds), processes)
    return [alarm for alarms in found for alarm in alarms]


def as_data(rows: Iterable[Row]) -> dict[str, dict[str, object]]:
    """The matrix as plain data, by bug id."""
    return {r.id: {k: v for k, v in asdict(r).items() if k != "id"} for r in rows}


def _row_by_id(id: str) -> Row:
    return row(all_known_bugs()[id])


def _false_alarms_of_seed(seed: int) -> list[tuple[str, Kill]]:
    return false_alarms(all_correct_variants().values(), seed)


def in_processes(function: Callable, work: list, processes: int) -> list:
    """What ``function`` gives for each piece of work, in fresh processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_prepare) as pool:
        return list(pool.map(function, work))


def _prepare() -> None:
    import torch

    torch.set_num_threads(1)
    keep_whole_gate()
