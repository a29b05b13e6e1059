"""Other right ways to offer the contract ``parallel_linear``."""
