"""Where the arithmetic happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loratool.errors import UsageError


def resolve_device(text: str, *, is_arithmetic: bool) -> tuple[torch.device, str]:
    """Turn ``auto``, ``cpu`` or ``cuda[:n]`` into a device and a reason in words.

    Args:
        text: what the user asked for.
        is_arithmetic: the plan spends its time on products and factorisations, not on the disk:
            ``auto`` then takes a GPU if there is one.

    Raises:
        UsageError: unknown device, or no such GPU.
    """
    if text == "auto":
        if not is_arithmetic:
            return torch.device("cpu"), "I/O-bound, a GPU would not help"
        if not torch.cuda.is_available():
            return torch.device("cpu"), "no GPU"
        text = "cuda"
    name, _, number = text.partition(":")
    if name == "cpu" and not number:
        return torch.device("cpu"), "asked for"
    if name != "cuda" or (number and not number.isdecimal()):
        raise UsageError("LT-210", "unknown device", expected="auto, cpu or cuda[:n]", got=text)
    if not torch.cuda.is_available():
        raise UsageError(
            "LT-211",
            "no CUDA device",
            got="a torch build without CUDA" if not torch.version.cuda else "no GPU visible",
            hint="--device cpu",
        )
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        raise UsageError(
            "LT-212", "no such GPU", expected=f"0 to {torch.cuda.device_count() - 1}", got=number
        )
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.device("cuda", index), "factoring is arithmetic" if is_arithmetic else "asked for"


def batch_bytes(device: torch.device) -> int:
    """Float32 matrices of one shape that are factored together: 1/64 of a GPU, none on the CPU.

    Of the memory it has, not of what is free: the batches, and so the bytes, are the same again.
    """
    if device.type != "cuda":
        return 0
    return min(1 << 30, torch.cuda.get_device_properties(device).total_memory // 64)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """One intra-op thread and no TF32, process-wide, restored afterwards."""
    threads = torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # torch loads its solvers lazily, and threads must not race for that
        torch.linalg.eigh(torch.eye(2, device="cuda"))
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32


def torch_build() -> str:
    """Version and build of torch: other ones may round a product differently."""
    return str(torch.__version__)
