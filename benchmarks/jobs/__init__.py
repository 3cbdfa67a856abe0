"""What is measured, one file per job; peers and naive scripts lie beside our own.

`prepare(arguments)` imports, loads and warms up, and returns the work: a function whose time is
taken, and which may return numbers to be recorded.
"""
