"""The requirements of the contract ``parallel_linear``."""
