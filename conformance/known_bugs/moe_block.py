"""Documented bugs of the contract ``moe_block``."""

from __future__ import annotations
