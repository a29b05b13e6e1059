"""The requirements of the contract ``moe_router``."""
