"""Planted bugs of the contract ``loglikelihood``."""
