"""Loads the plugin in a checkout.

Where the package is installed too, its entry point has registered the plugin under the same name,
and pytest takes no plugin twice.
"""

pytest_plugins = ["conformance.plugin"]
