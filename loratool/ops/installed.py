"""Packages that are installed beside loratool: those it needs, and those of its extras."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.report.doctor import Extra, Package

if TYPE_CHECKING:
    from packaging.requirements import Requirement

EXTRAS = {
    "plot": "pictures of numbers: --plot",
    "ray": "the machines of a cluster: --executor ray",
    "gguf": "more types of quantised GGUF bases: --dequantize",
}
"""Extra of ``pyproject.toml`` that is there for users -> what it gives."""


def required() -> tuple[Package, ...]:
    """The packages that loratool itself needs; none if it is not installed as a package."""
    return tuple(map(_package, _requirements("")))


def extras() -> tuple[Extra, ...]:
    """The optional parts."""
    return tuple(
        Extra(name, gives, tuple(map(_package, _requirements(name))))
        for name, gives in EXTRAS.items()
    )


def pip_install(packages: Iterable[Package]) -> str:
    """The command that installs packages for this Python, whatever ``pip`` is on the path."""
    pip = shutil.which("pip")
    is_own = pip is not None and Path(pip).parent == Path(sys.executable).parent
    start = "pip" if is_own else f"{shlex.quote(sys.executable)} -m pip"
    return f"{start} install " + " ".join(shlex.quote(p.name + p.needs) for p in packages)


def settings() -> dict[str, str]:
    """Environment variables that are set and obeyed; secrets are not among them."""
    names = ("LORATOOL_PLAIN_IO", "LORATOOL_DEBUG", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE",
             "HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_XET",
             "CUDA_VISIBLE_DEVICES", "NO_COLOR", "TMPDIR")  # fmt: skip
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def _requirements(extra: str) -> Iterator[Requirement]:
    """Those of an extra alone; "" = those that are always needed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("loratool") or ()
    except metadata.PackageNotFoundError:  # run from its source
        return
    for line in lines:
        found = Requirement(line)
        marker = found.marker
        always = marker is None or marker.evaluate({"extra": ""})
        wanted = always if not extra else not always and marker is not None
        if wanted and (marker is None or marker.evaluate({"extra": extra})):
            yield found


def _package(needed: Requirement) -> Package:
    try:
        version = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        version = None
    fits = version is not None and needed.specifier.contains(version, prereleases=True)
    return Package(needed.name, str(needed.specifier), version, fits)
