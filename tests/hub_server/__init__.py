"""A Hub on loopback for tests: what the real huggingface_hub client asks of one, and faults."""

from .server import TestHub
from .state import Fault, HubState, Large, Repo

__all__ = ["Fault", "HubState", "Large", "Repo", "TestHub"]
