"""The requirements of the contract ``moe_block``."""
