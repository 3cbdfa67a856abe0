"""Runs plans: the one loop that touches tensor bytes, and its kernels."""
