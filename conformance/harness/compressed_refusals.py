"""Checks that damaged folders are refused: nothing is loaded, written or executed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

from conformance.harness.compressed_cases import CompressedCase
from conformance.harness.compressed_damage import DAMAGES, Damage, Damager, edited_statistics
from conformance.harness.compressed_files import digests
from conformance.harness.compressed_subject import counted, load
from conformance.harness.failures import ConformanceFailure, Declined
from conformance.harness.subject import Subject

_loads: WeakKeyDictionary[Subject, set[tuple[str, str]]] = WeakKeyDictionary()


def must_load_undamaged(subject: Subject, case: CompressedCase) -> None:
    """Refusing everything proves nothing: a folder of this model and format loads."""
    known = _loads.setdefault(subject, set())
    if (case.model, case.format) not in known:
        load(subject, case.call(device=subject.device))
        known.add((case.model, case.format))


def refused(subject: Subject, case: CompressedCase, damager: Damager) -> tuple[Exception, Damage]:
    """The exception with which the damaged folder is refused; fails where it is not."""
    must_load_undamaged(subject, case)
    case = replace(case, statistics=damager is edited_statistics)
    damage = damager(case)
    call = case.call(late=damage.late, after=damage.after, device=subject.device)
    folder = Path(call.named("folder").name)
    before, error = digests(folder), None
    try:
        load(subject, call)
    except (ConformanceFailure, Declined) as failure:
        raised = isinstance(failure, Declined) or failure.kind.startswith("raised ")
        if not raised or not isinstance(failure.__cause__, Exception):
            raise
        error = failure.__cause__
    counted()
    executed = folder / "model.executed"
    if executed.exists():
        executed.unlink()
        raise ConformanceFailure("executed code", "the pickle of a file was executed", call=call)
    if digests(folder) != before:
        raise ConformanceFailure("half written", "a refused folder was changed", call=call)
    if error is None:
        what = " ".join(damager.__doc__.split())
        raise ConformanceFailure("accepted", f"the folder is loaded although: {what}", call=call)
    return error, damage


def assert_refused(
    subject: Subject, case: CompressedCase, damager: Damager, *, kinds: int = 1
) -> None:
    """The damaged folder raises an exception; nothing is written and no code is executed.

    ``kinds``: how many of the damager's choices are tried, from the drawn one on.
    """
    for further in range(kinds):
        refused(subject, replace(case, which=case.which + further), damager)


NAMED = tuple(name for name in DAMAGES if name != "contradictory_config")
"""Kinds of damage that are in one file."""
ONLY_PT = ("other_place", "flipped_bit", "pickled_code")


def assert_names_file(subject: Subject, case: CompressedCase) -> None:
    """The error names the file, the folder or the weight that is to blame."""
    names = [name for name in NAMED if case.format == "pt" or name not in ONLY_PT]
    damager = DAMAGES[names[case.seed % len(names)]]
    error, damage = refused(subject, case, damager)
    if not any(part in str(error) for part in (damage.named, *damage.named.split("/")[-1:])):
        case = replace(case, statistics=damager is edited_statistics)
        call = case.call(late=damage.late, after=damage.after, device=subject.device)
        summary = f"{type(error).__name__} does not name {damage.named}: {str(error)[:200]}"
        raise ConformanceFailure("unclear error", summary, call=call)
