"""Run as a program: read one pickle of tensors on stdin and write it to stdout as safetensors.

The parent (`loratool.store.unpickled`) starts it for ``--allow-pickle``.  PyTorch's restricted
unpickler builds tensors and plain containers only; should it ever be tricked, this process can
open no file or socket, start no other, and write to its two pipes alone.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from loratool.dtypes import BY_WORD
from loratool.errors import BadFileError
from loratool.store.header import build_header

OLDEST_TORCH = (2, 10)  # CVE-2026-24747: older restricted unpicklers can be made to corrupt memory
_SLACK_BYTES = 256 << 20
_BYTES_PER_CPU_S = 20_000_000
_FORBIDDEN = ("open", "import", "os.", "subprocess.", "socket.", "shutil.", "ctypes.")


def main() -> None:
    """Convert the file on stdin; a problem is one JSON line on stderr and exit code 1."""
    if not is_safe_torch(torch.__version__):
        _fail("torch", expected=".".join(map(str, OLDEST_TORCH)), got=torch.__version__)
    source = sys.stdin.buffer
    size = os.fstat(source.fileno()).st_size
    _warm_up()
    _lock_down(size)
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
        tensors = pick_tensors(found)
        _write(tensors, size, sys.stdout.buffer)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)|(?:Unsupported|unsupported) \w+ ([\w.]+)", str(error))
        what = next((g for g in named.groups() if g), "") if named else str(error)[:200]
        _fail(
            "blocked",
            got=f"opcode {what}, which torch.save does not write" if what.isdigit() else what,
        )
    except MemoryError:
        _fail("memory", got="more memory than its size explains")
    except (BadFileError, ValueError) as error:
        _fail("content", got=str(error)[:300])
    except Exception as error:
        _fail("damaged", got=f"{type(error).__name__}: {str(error)[:200]}")


def is_safe_torch(version: str) -> bool:
    """True if this torch's restricted unpickler has no known hole."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= OLDEST_TORCH


def pick_tensors(found: object) -> dict[str, torch.Tensor]:
    """The tensors of a state dictionary, also of one inside ``{"state_dict": …}``.

    Raises:
        ValueError: none there, or tensors in a structure that has no names for them.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"a {type(found).__name__}, not a dictionary of tensors")
    own = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
    inner = [k for k, v in found.items() if isinstance(v, Mapping) and _holds_tensors(v)]
    if own and inner:
        raise ValueError(f"tensors beside a dictionary of tensors ({inner[0]})")
    if inner:
        if len(inner) > 1:
            raise ValueError(f"{len(inner)} dictionaries of tensors: {', '.join(map(str, inner))}")
        return pick_tensors(found[inner[0]])
    if not own:
        raise ValueError("no tensors")
    return own


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(v, torch.Tensor) or (isinstance(v, Mapping) and _holds_tensors(v))
        for v in value.values()
    )


def _write(tensors: Mapping[str, torch.Tensor], size: int, out: BinaryIO) -> None:
    specs = []
    for name, tensor in tensors.items():
        word = str(tensor.dtype).removeprefix("torch.")
        if word not in BY_WORD or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} is a {tensor.layout} tensor of {word}")
        specs.append((name, BY_WORD[word].name, tuple(tensor.shape)))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    if total > 4 * size + _SLACK_BYTES // 4:  # strides of 0 make any size from nothing
        raise ValueError(f"{total} bytes of tensors in a file of {size}")
    header, _ = build_header(specs, {"format": "pt"})
    out.write(header)
    for tensor in tensors.values():
        data = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
        out.write(memoryview(data.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    out.flush()


def _warm_up() -> None:
    """Import now what loading imports late."""
    for is_zip in (True, False):
        buffer = io.BytesIO()
        tensors = {
            "a": torch.zeros(2, dtype=torch.bfloat16),
            "b": torch.nn.Parameter(torch.ones(1)),
        }
        torch.save({"a": tensors}, buffer, _use_new_zipfile_serialization=is_zip)
        buffer.seek(0)
        _write(pick_tensors(torch.load(buffer, weights_only=True)), 100, io.BytesIO())


def _lock_down(size: int) -> None:
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    spent = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": spent + 30 + size // _BYTES_PER_CPU_S,
        "RLIMIT_FSIZE": 0,  # no file grows; pipes are no files
        "RLIMIT_NOFILE": 0,  # nothing more is opened: no file, no socket
    }
    if used:
        limits["RLIMIT_AS"] = used * resource.getpagesize() + 4 * size + _SLACK_BYTES
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        low = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (low, low))
    sys.addaudithook(_forbid)


def _forbid(event: str, _args: tuple[Any, ...]) -> None:
    if event.startswith(_FORBIDDEN):
        raise pickle.UnpicklingError(f"Unsupported operation {event}")


def _fail(kind: str, **facts: str) -> NoReturn:
    sys.stderr.write(json.dumps({"kind": kind, **facts}) + "\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
