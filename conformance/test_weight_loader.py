"""The requirements of the contract ``weight_loader``."""
