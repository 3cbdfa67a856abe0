"""Kinds of change, with their tensors."""
