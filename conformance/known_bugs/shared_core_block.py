"""Documented bugs of the contract ``shared_core_block``."""

from __future__ import annotations
