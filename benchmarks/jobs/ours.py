"""One call of loratool's Python API: FUNCTION and its keywords as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

import loratool as lt


def prepare(arguments: list[str]) -> Callable[[], None]:
    name, options = arguments[0], json.loads(arguments[1])
    call = getattr(lt, name)
    first = [options.pop(k) for k in ("adapters", "tuned", "adapter") if k in options]
    if options.get("device", "").startswith("cuda"):
        for number in range(torch.cuda.device_count()):
            torch.zeros(1, device=f"cuda:{number}")  # the driver's start

    def work() -> None:
        call(*first, **options)

    return work
