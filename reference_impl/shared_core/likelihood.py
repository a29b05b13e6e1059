"""To be written."""

from __future__ import annotations


class LogLikelihood:
    """See :class:`conformance.contracts.LogLikelihood`."""

    def loglikelihood(self, *arguments, **options):
        """See :class:`conformance.contracts.LogLikelihood`."""
        raise NotImplementedError("not written yet")
