"""Other right ways to offer the contract ``weight_loader``."""
