"""The requirements of the contract ``distillation_loss``."""
