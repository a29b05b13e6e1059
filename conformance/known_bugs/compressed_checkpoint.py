"""Documented bugs of the contract ``compressed_checkpoint``."""

from __future__ import annotations
