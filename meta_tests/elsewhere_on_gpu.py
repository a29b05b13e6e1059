"""Which documented bugs of other people's code are recognised on a CUDA device.

    python meta_tests/elsewhere_on_gpu.py [--simulated]

Prints a line of JSON for each: its name, the bugs that it is, and those that the diagnosis names
first.
"""

import json
import sys

from diagnosing import failed
from elsewhere import ELSEWHERE

from conformance.diagnosis import search
from conformance.harness import profiles


def main() -> None:
    if "--simulated" in sys.argv:
        import simulated_device  # noqa: F401 - there is a device from here on
    with profiles.temporarily(profiles.without_shrinking(profiles.PROFILES["gate"])):
        for name, bug in ELSEWHERE.items():
            search.forget()
            _, found = failed(bug.requirement, bug.method, device="cuda")
            first = sorted(found.named[0].ids) if found.named else []
            line = {"name": name, "is": sorted(bug.bugs), "named": first}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
