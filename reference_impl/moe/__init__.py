"""A mixture of experts: routing, experts in three forms, and the block of both."""
