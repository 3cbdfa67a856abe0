"""Where the arithmetic happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from loratool.errors import UsageError
from loratool.report.doctor import Gpu, Torch


def arithmetic_device(text: str) -> torch.device:
    """The one device, or the first of several, of `resolve_devices` for what is arithmetic."""
    return resolve_devices(text, is_arithmetic=True)[0][0]


def resolve_devices(
    text: str, *, is_arithmetic: bool, pays: Callable[[], tuple[bool, str]] | None = None
) -> tuple[tuple[torch.device, ...], str]:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``cuda:0,1`` into devices and a reason.

    Args:
        text: what the user asked for.
        is_arithmetic: the plan spends its time on products and factorisations, not on the disk:
            ``auto`` then takes a GPU if there is one.
        pays: otherwise asked, if there is one: whether ``auto`` should take it, and why.

    Raises:
        UsageError: unknown device, no such GPU, or GPUs of several models.
    """
    reason = "factoring is arithmetic" if is_arithmetic else "asked for"
    if text == "auto":
        if not torch.cuda.is_available():
            return (torch.device("cpu"),), "no GPU"
        if not is_arithmetic:
            wins, reason = pays() if pays else (False, "its time goes into reading")
            if not wins:
                return (torch.device("cpu"),), reason
        text = "cuda"
    name, _, places = text.partition(":")
    if name == "cpu" and not places:
        return (torch.device("cpu"),), "asked for"
    numbers = places.split(",") if places else ["0"]
    if name != "cuda" or not all(n.isdecimal() for n in numbers) or text.endswith(":"):
        raise UsageError(
            "LT-210", "unknown device", expected="auto, cpu, cuda, cuda:1 or cuda:0,1", got=text
        )
    if not torch.cuda.is_available():
        raise UsageError(
            "LT-211",
            "no CUDA device",
            got="a torch build without CUDA" if not torch.version.cuda else "no GPU visible",
            hint="--device cpu",
        )
    known = torch.cuda.device_count()
    for number in numbers:
        if int(number) >= known:
            raise UsageError("LT-212", "no such GPU", expected=f"0 to {known - 1}", got=number)
    devices = tuple(torch.device("cuda", n) for n in dict.fromkeys(map(int, numbers)))
    models = {torch.cuda.get_device_name(d) for d in devices}
    if len(models) > 1:
        raise UsageError(
            "LT-223", "GPUs of several models do not round alike", expected="one model",
            got=", ".join(sorted(models)), hint=f"--device cuda:{numbers[0]}",
        )  # fmt: skip
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return devices, reason


def batch_bytes(device: torch.device) -> int:
    """Float32 matrices of one shape that are factored together: 1/128 of a GPU, none on the CPU.

    Of the memory it has, not of what is free: the batches, and so the bytes, are the same again.
    Every worker may be at one, with three times as much for its factoring.
    """
    if device.type != "cuda":
        return 0
    return min(1 << 29, torch.cuda.get_device_properties(device).total_memory // 128)


@cache
def load_solvers(device: torch.device) -> None:
    """Have torch load its solvers, which takes a GPU a while; threads must not race for that."""
    if device.type == "cuda":
        torch.linalg.eigh(torch.eye(2, device=device))


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """One intra-op thread and no TF32, process-wide, restored afterwards."""
    threads = torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32


def describe_torch() -> Torch:
    """The build of torch, and the devices that it sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = [torch.cuda.get_device_properties(n) for n in range(count)]
    gpus = tuple(Gpu(n, one.name, one.total_memory) for n, one in enumerate(seen))
    return Torch(torch_build(), torch.version.cuda, gpus, torch.backends.mps.is_available())


def torch_build() -> str:
    """Version and build of torch: other ones may round a product differently."""
    return str(torch.__version__)
