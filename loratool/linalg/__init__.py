"""Functions of tensors: no names, no I/O."""
