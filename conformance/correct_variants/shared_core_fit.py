"""Other right ways to offer the contract ``shared_core_fit``."""

from __future__ import annotations
