"""Documented bugs of the contract ``causal_lm``."""
