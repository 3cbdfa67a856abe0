"""Bytes and disk: headers, checkpoints, readers, writers, sidecars, the Hub."""
