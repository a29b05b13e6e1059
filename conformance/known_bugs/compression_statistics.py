"""Documented bugs of the contract ``compression_statistics``."""

from __future__ import annotations
