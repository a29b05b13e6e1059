"""The requirements of the contract ``compressed_checkpoint``."""
