"""The requirements of the contract ``compression_statistics``."""
