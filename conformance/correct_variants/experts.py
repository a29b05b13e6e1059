"""Other right ways to offer the contract ``experts``."""

from __future__ import annotations
