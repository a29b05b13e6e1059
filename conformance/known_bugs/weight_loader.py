"""Documented bugs of the contract ``weight_loader``."""
