"""The requirements of the contract ``checkpoint_watcher``."""
