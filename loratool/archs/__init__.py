"""Name maps and shape facts of architectures, as data: torch-free, no model code."""
