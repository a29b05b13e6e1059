"""Planted bugs of the contract ``distillation_loss``."""
