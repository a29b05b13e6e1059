"""Other right ways to offer the contract ``distillation_loss``."""
