"""To be written."""

from __future__ import annotations


class CheckpointWatcher:
    """See :class:`conformance.contracts.CheckpointWatcher`."""

    def checkpoint_watcher(self, *arguments, **options):
        """See :class:`conformance.contracts.CheckpointWatcher`."""
        raise NotImplementedError("not written yet")
