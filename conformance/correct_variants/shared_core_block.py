"""Other right ways to offer the contract ``shared_core_block``."""

from __future__ import annotations
