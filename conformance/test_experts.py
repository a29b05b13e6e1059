"""The requirements of the contract ``experts``."""
