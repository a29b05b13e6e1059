"""The requirements of the contract ``shared_core_fit``."""
