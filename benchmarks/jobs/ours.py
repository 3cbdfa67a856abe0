"""One call of loratool's Python API: FUNCTION and its keywords as JSON.

With the keyword ``warm`` it is the second such call of its process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

import loratool as lt
from benchmarks.harness import clear


def prepare(arguments: list[str]) -> Callable[[], None]:
    name, options = arguments[0], json.loads(arguments[1])
    call = getattr(lt, name)
    first = [options.pop(k) for k in ("adapters", "tuned", "adapter") if k in options]
    is_warm = options.pop("warm", False)
    if options.get("device", "").startswith("cuda"):
        for number in range(torch.cuda.device_count()):
            torch.zeros(1, device=f"cuda:{number}")  # the driver's start

    def work() -> None:
        call(*first, **options)

    if is_warm:
        work()
        clear(Path(options["output"]))
    return work
