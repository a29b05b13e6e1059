"""Other right ways to offer the contract ``moe_router``."""

from __future__ import annotations
