"""Measurements, one script per claim: `python -m benchmarks.NAME` from the checkout."""
