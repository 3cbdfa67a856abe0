"""`cp -r --reflink=never BASE OUT`: what moving the bytes costs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable


def prepare(arguments: list[str]) -> Callable[[], None]:
    def work() -> None:
        subprocess.run(["cp", "-r", "--reflink=never", *arguments], check=True)

    return work
