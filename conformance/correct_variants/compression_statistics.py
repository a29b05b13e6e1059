"""Other right ways to offer the contract ``compression_statistics``."""

from __future__ import annotations
