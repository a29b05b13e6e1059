"""Which documented bugs of other people's code are recognised on a CUDA device.

    python meta_tests/elsewhere_on_gpu.py [--simulated]

Prints a line of JSON for each: its name, the bugs that it is, and those that the diagnosis names
first.
"""

import json
import sys

from elsewhere import ELSEWHERE, Elsewhere

from conformance.diagnosis import search
from conformance.harness import profiles
from conformance.harness.failures import ConformanceFailure
from conformance.harness.requirement import all_requirements
from conformance.harness.subject import Subject

LONG = 300.0
"""Seconds: what is named must not depend on how busy the machine is."""


def named_first(bug: Elsewhere) -> list[str]:
    """The planted bugs that the failure of a method on the device is said to be, first of all."""
    requirement = all_requirements()[bug.requirement]
    subject = Subject(requirement.contract, bug.method, device="cuda")
    try:
        requirement.check(subject, seconds=LONG)
    except ConformanceFailure as failure:
        failing = requirement.last_tally.failing
        found = search.diagnose(requirement, subject, failure, failing, seconds=LONG)
        return sorted(found.named[0].ids) if found.named else []
    raise AssertionError(f"{bug.requirement} does not fail")


def main() -> None:
    if "--simulated" in sys.argv:
        import simulated_device  # noqa: F401 - there is a device from here on
    with profiles.temporarily(profiles.without_shrinking(profiles.PROFILES["gate"])):
        for name, bug in ELSEWHERE.items():
            search.forget()
            line = {"name": name, "is": sorted(bug.bugs), "named": named_first(bug)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
