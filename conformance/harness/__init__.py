"""The machinery under the requirements: cases, comparison, probes, ledger, report."""
