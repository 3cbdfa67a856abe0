"""Planners: from headers and options to a `Plan`; data only, no torch."""
