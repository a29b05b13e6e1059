"""The requirements of the contract ``causal_lm``."""
