"""Which known bug a failure is, told by running the failing cases through the planted bugs.

Every planted bug is a hypothesis that can be executed: where what the implementation gave equals what
the bug gives, on the failing case and on every other case of the requirement, that is a diagnosis,
and it cites where the bug is documented. Where no known bug fits, and no pair of them, what was seen
is said, and no cause. A guess is never dressed as a finding.
"""
