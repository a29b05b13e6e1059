"""Documented bugs of the contract ``parallel_linear``."""
