"""Name maps and shape facts of architectures, as data: torch-free, no model code."""

from loratool.archs.layers import experts_are_transposed, is_conv1d
from loratool.archs.names import known_model_types, to_disk, to_memory
from loratool.archs.ties import tied_tensors

__all__ = [
    "experts_are_transposed",
    "is_conv1d",
    "known_model_types",
    "tied_tensors",
    "to_disk",
    "to_memory",
]
