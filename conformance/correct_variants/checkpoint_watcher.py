"""Other right ways to offer the contract ``checkpoint_watcher``."""
