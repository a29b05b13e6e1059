"""To be written."""

from __future__ import annotations


class DistillationLoss:
    """See :class:`conformance.contracts.DistillationLoss`."""

    def distillation_loss(self, *arguments, **options):
        """See :class:`conformance.contracts.DistillationLoss`."""
        raise NotImplementedError("not written yet")
