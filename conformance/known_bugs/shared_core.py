"""Documented bugs of the contract ``shared_core``."""

from __future__ import annotations
