"""How much larger the errors of other implementations are than the reference's.

    python -m meta_tests.numerics_factors attention rotary experts

Prints a line for every correct variant and every small loss of the contracts: requirements in which the
numerics ledger would call it worse, and its largest factor, by lane. docs/numerics.md records them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

from conformance.correct_variants import all_correct_variants
from conformance.harness import profiles
from conformance.harness.failures import ConformanceFailure, Declined, Inconclusive
from conformance.harness.numerics import NAMED, Recording, compare, entry_of
from conformance.harness.requirement import all_requirements
from conformance.implementations.reference import Reference

LANES = ("precision", "semantic")


def errors_of(
    subject: object, contract: str, slugs: Collection[str] | None = None
) -> tuple[Recording, list[str]]:
    """What requirements of a contract measured, all or those named, and the slugs that failed."""
    entries, failed = {}, []
    for slug, record in all_requirements().items():
        if record.contract != contract or record.gpu or slug not in (slugs or (slug,)):
            continue
        try:
            with profiles.temporarily(profiles.without_shrinking(profiles.active())):
                entries[slug] = entry_of(record.check(getattr(subject, contract)).errors)
        except ConformanceFailure:
            failed.append(slug)
        except (Declined, Inconclusive):
            continue
    return Recording(dict.fromkeys(NAMED), entries), failed


def others(contract: str) -> list[tuple[str, object]]:
    """(name, implementation) of the correct variants and the small losses of a contract."""
    from small_losses import LOSSES

    variants = [v for v in all_correct_variants().values() if v.contract == contract]
    losses = [loss for loss in LOSSES if hasattr(loss, contract)]
    return [(v.id, v.make()) for v in variants] + [(loss.__name__, loss()) for loss in losses]


def main() -> None:
    """Print the table for the contracts on the command line."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contracts", nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for contract in arguments.contracts:
        base, _ = errors_of(Reference(), contract)
        print(f"{contract}, {len(base.entries)} requirements", flush=True)
        for name, implementation in others(contract):
            head, failed = errors_of(implementation, contract)
            found = compare(base, head, head.entries)
            line = f"  {name:<28}"
            for lane in LANES:
                factors = [row.factor for row in found.rows if row.lane == lane]
                worse = {row.id for row in found.worse if row.lane == lane}
                line += f"  {lane} {len(worse):>3} worse, to {max(factors, default=1):5.2f}"
            print(line + (f"  failed {len(failed)}" if failed else ""), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
