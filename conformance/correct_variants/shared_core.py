"""Other right ways to offer the contract ``shared_core``."""

from __future__ import annotations
