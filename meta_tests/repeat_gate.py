"""Repeat the gate with random seeds, and count the requirements that correct code fails.

    python -m meta_tests.repeat_gate --seeds 200                            # the reference
    python -m meta_tests.repeat_gate --seeds 100 --variants attention --examples 2

Prints a line for every false alarm and one at the end. docs/tolerances.md records what it printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from hypothesis import settings

from conformance.correct_variants import all_correct_variants
from conformance.harness import profiles
from conformance.harness.failures import ConformanceFailure, Declined, Inconclusive
from conformance.harness.requirement import all_requirements
from conformance.implementations.reference import Reference


def implementations(variants: str | None) -> list[tuple[str, str, object]]:
    """(name, contract, method) of everything that must pass."""
    if variants is None:
        contracts = dict.fromkeys(r.contract for r in all_requirements().values())
        return [("reference", name, getattr(Reference(), name)) for name in contracts]
    chosen = [v for v in all_correct_variants().values() if v.contract == variants]
    return [(v.id, v.contract, getattr(v.make(), v.contract)) for v in chosen]


def alarms_of_seed(seed: int, variants: str | None, examples: int) -> tuple[int, list[str]]:
    """How many requirements ran with the cases of ``seed``, and the false alarms among them."""
    import torch

    torch.set_num_threads(1)
    ran, alarms = 0, []
    gate = settings(profiles.PROFILES["gate"], max_examples=examples)
    with profiles.temporarily(profiles.without_shrinking(gate), seed=seed):
        for name, contract, method in implementations(variants):
            for slug, record in all_requirements().items():
                if record.contract != contract or record.gpu:
                    continue
                try:
                    record.check(method)
                    ran += 1
                except ConformanceFailure as failure:
                    alarms.append(f"seed {seed}: {name} fails {slug}: {failure.summary}")
                except (Declined, Inconclusive):
                    continue
    return ran, alarms


def main() -> None:
    """Run the seeds in processes and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--examples", type=int, default=12, help="cases a requirement")
    parser.add_argument("--variants", metavar="CONTRACT", help="correct variants of this contract")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    start, ran, alarms = time.time(), 0, []
    seeds = range(options.first, options.first + options.seeds)
    work = partial(alarms_of_seed, variants=options.variants, examples=options.examples)
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for seed, (count, found) in zip(seeds, pool.map(work, seeds)):
            ran += count
            alarms += found
            print(f"seed {seed}: {count} requirements passed, {len(found)} failed", flush=True)
            for line in found:
                print(line, flush=True)
    print(
        f"{len(seeds)} repetitions: {len(alarms)} false alarms in {ran + len(alarms)} checks, "
        f"{options.examples} cases each, {time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
