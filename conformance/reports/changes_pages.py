"""The pages of what changed between two runs: ``report.html`` and ``summary.md``."""

from __future__ import annotations

from collections.abc import Iterable

from conformance.reports.changes import BETTER, MEANINGS, WORSE, Changes
from conformance.reports.files import PAGE, SUMMARY
from conformance.reports.markdown import code, escaped, fitting, table
from conformance.reports.page import command_line, enumerated, render


def pages(changes: Changes) -> dict[str, str]:
    """The files by name."""
    return {PAGE: page(changes), SUMMARY: summary(changes)}


def page(changes: Changes) -> str:
    """The changes as HTML, the worse ones first."""
    return render(
        "changes.html.j2",
        changes=changes,
        headline=headline(changes),
        kinds=[(kind, why, changes.of(kind)) for kind, why in MEANINGS.items()],
        tones={
            kind: "worse" if kind in WORSE else "better" if kind in BETTER else "soft"
            for kind in MEANINGS
        },
        counted=counted(changes),
        command=command_line(changes.after.header),
    )


def headline(changes: Changes) -> str:
    """One sentence: what became worse, else that nothing did."""
    parts = [f"{len(found)} {kind}" for kind in MEANINGS if (found := changes.of(kind))]
    if not parts:
        return "Nothing changed."
    worse = "Worse" if changes.worse else "Nothing became worse"
    return f"{worse}: {enumerated(parts)}."


def counted(changes: Changes) -> list[tuple[str, str, str]]:
    """Name, before and after of the counts of both runs."""
    old, new = changes.before.footer["counts"], changes.after.footer["counts"]
    rows = [("verdict", changes.before.footer["verdict"], changes.after.footer["verdict"])]
    for level in ("core", "extended"):
        ends = [counts["levels"][level] for counts in (old, new)]
        told = [f"{each.get('pass', 0):,} of {each['suite']:,}" for each in ends]
        rows.append((f"{level} requirements passed", *told))
    rows.append(
        (
            "cases executed",
            *(
                f"{counts['cases']['executed']:,} of {counts['cases']['drawn']:,}"
                for counts in (old, new)
            ),
        )
    )
    for lane in sorted({*old["comparisons"], *new["comparisons"]}):
        numbers = (f"{counts['comparisons'].get(lane, 0):,}" for counts in (old, new))
        rows.append((f"{lane} comparisons", *numbers))
    return rows


def summary(changes: Changes) -> str:
    """The changes as Markdown that fits a comment."""
    return fitting(lambda most: "\n".join(_lines(changes, most)))


def _lines(changes: Changes, most: int) -> Iterable[str]:
    yield from ("## Conformance: what changed", "", headline(changes), "")
    yield from table(("", "before", "now"), counted(changes), right=2)
    for kind, why in MEANINGS.items():
        found = changes.of(kind)
        if not found:
            continue
        yield from ("", f"### {kind[:1].upper()}{kind[1:]} ({len(found)}: {why})", "")
        yield from table(
            ("requirement", "before", "now", "why"),
            (
                (code(each.id), each.before, each.after, code(each.why) if each.why else "")
                for each in found[:most]
            ),
        )
        if len(found) > most:
            yield from ("", f"… and {len(found) - most} more")
    if changes.notes:
        yield from ("", "### The runs differ", "", *(f"- {escaped(n)}" for n in changes.notes))
    yield ""
