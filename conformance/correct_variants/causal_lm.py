"""Other right ways to offer the contract ``causal_lm``."""
