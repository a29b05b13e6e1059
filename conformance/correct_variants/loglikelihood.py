"""Other right ways to offer the contract ``loglikelihood``."""
