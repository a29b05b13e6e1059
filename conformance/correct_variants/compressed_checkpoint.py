"""Other right ways to offer the contract ``compressed_checkpoint``."""

from __future__ import annotations
