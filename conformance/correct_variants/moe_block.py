"""Other right ways to offer the contract ``moe_block``."""

from __future__ import annotations
