"""Documented bugs of the contract ``moe_router``."""

from __future__ import annotations
