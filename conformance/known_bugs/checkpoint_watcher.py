"""Planted bugs of the contract ``checkpoint_watcher``."""
