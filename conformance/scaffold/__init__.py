"""``python -m conformance init``: what a repository needs to hold its code to the suite.

:mod:`.adapter` writes the skeleton of an adapter, :mod:`.in_repository` the tests that run the suite
in the repository itself, :mod:`.settings_table` the table in ``pyproject.toml``; the workflows are in
``templates``. :mod:`.files` writes all of it, or nothing.
"""
