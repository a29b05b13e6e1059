"""The requirements of the contract ``loglikelihood``."""
