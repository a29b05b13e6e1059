"""Documented bugs of the contract ``experts``."""

from __future__ import annotations
