"""What a failure says: rule, case, what was found, and lines that reproduce it alone."""

from __future__ import annotations

from conformance.harness.calls import dtype_name
from conformance.harness.failures import ConformanceFailure
from conformance.harness.shown import shown_by_kind


def failure_message(failure: ConformanceFailure) -> str:
    """The whole text of a failure."""
    lines = []
    if failure.requirement is not None:
        record = failure.requirement
        lines += [f"{record.slug} ({record.level}): {failure.kind}", ""]
        lines += [f"rule    {record.rule}", f"source  {record.source}"]
    lines += [f"found   {failure.summary}"]
    if failure.call is not None:
        lines += [f"case    {failure.call.case!r}"]
        lines += [f"lane    {failure.lane}, in {dtype_name(failure.call.dtype)}"]
    lines += [f"        {detail}" for detail in failure.details]
    lines += diagnosis_lines(failure)
    if failure.call is not None:
        lines += ["", "reproduce"]
        lines += [f"    {line}" for line in reproduction(failure)]
    return "\n".join(lines)


def diagnosis_lines(failure: ConformanceFailure) -> list[str]:
    """Which known bug the failure is, or what was seen of it."""
    if failure.diagnosis is None:
        return []
    from conformance.diagnosis import wording

    said = wording.lines(failure.diagnosis, failure.requirement.slug)
    return ["", *said] if said else []


def reproduction(failure: ConformanceFailure) -> list[str]:
    """Lines of Python that make the failing call, and show the fault, without this suite."""
    call = failure.call
    result = "out, lse" if dict(call.options).get("return_lse") == "True" else "out"
    before, shown_by = shown_by_kind(failure)
    made = [*call.preamble, *failure.import_lines, *call.printed, *before]
    called = f"{result} = {call.source()}"
    return "\n".join(["import torch", *made, called, shown_by, *call.closing]).splitlines()
