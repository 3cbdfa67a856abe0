"""`doctor`: this installation, looked at from all sides."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loratool import __version__
from loratool.engine.executors import decide_executor
from loratool.engine.machine import available_memory, default_threads, usable_cores
from loratool.errors import list_some, redact
from loratool.ops.installed import extras, pip_install, required, settings
from loratool.options.calls import takes
from loratool.options.hub import Doctor
from loratool.report.doctor import Choice, Disk, DoctorReport, Finding, Login, Package, Torch

_LITTLE_MEMORY = 1_000_000_000
_LITTLE_DISK = 1_000_000_000
_DRIVER = Path("/proc/driver/nvidia/version")


@takes(Doctor)
def doctor(asked: Doctor) -> DoctorReport:
    """Say what this installation has, what ``auto`` takes here and why, and what is missing.

    Nothing is changed.  The token of the Hub is not read out; the Hub is asked whose it is.

    Example:
        >>> lt.doctor(offline=True).ok
        True
    """
    from loratool.store.hub_login import login

    torch, hub_and_word = _torch(), login(offline=asked.offline)
    hub, is_rejected = hub_and_word
    disks, needed = tuple(_disks()), required()
    found = [*_of_torch(torch), *_of_packages(needed), *_of_room(disks)]
    if is_rejected:
        found.append(Finding(f"the Hub rejects the token of {hub.token_from}", _renew(hub)))
    return DoctorReport(
        version=__version__, python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}", prefix=sys.prefix, torch=torch,
        cores=usable_cores(), threads=default_threads(), memory_bytes=available_memory(),
        disks=disks, hub=hub, choices=tuple(_choices(torch)), requires=needed, extras=extras(),
        settings={name: redact(value) for name, value in settings().items()},
        findings=tuple(found),
    )  # fmt: skip


def _renew(hub: Login) -> str:
    is_file = hub.token_from is not None and Path(hub.token_from).is_file()
    return "hf auth login" if is_file else f"unset {hub.token_from}, or give it a living token"


def _torch() -> Torch:
    """As `describe_torch`, also where torch cannot be imported."""
    try:
        from loratool.engine.device import describe_torch

        return describe_torch()
    except Exception as error:  # whatever a broken installation raises
        return Torch(None, error=redact(f"{type(error).__name__}: {error}"))


def _choices(torch: Torch) -> Iterator[Choice]:
    if torch.gpus:
        yield Choice("--device", "cuda", "extract, compress and others that factor")
        yield Choice("--device", "cpu or cuda", "merge into a base: measured before each run")
    elif torch.has_mps:
        yield Choice("--device", "cpu", "no CUDA; Apple's GPU lacks the float64 that sums need")
    else:
        yield Choice("--device", "cpu", "no GPU")
    executor, why = decide_executor(crowded=0)
    yield Choice("--executor", executor, why)


def _disks() -> Iterator[Disk]:
    """One row for each place; where it does not exist yet, of the nearest folder that does."""
    from huggingface_hub import constants

    from loratool.store.bandwidth import takes_direct
    from loratool.store.reader import plain_io

    for place, find in (
        ("here", Path.cwd),
        ("temporary", tempfile.gettempdir),
        ("hub cache", Path(constants.HF_HUB_CACHE).expanduser().absolute),
    ):
        try:
            path = Path(find())
            there = next(folder for folder in (path, *path.parents) if folder.exists())
            free = shutil.disk_usage(there).free
        except OSError as error:  # the working folder is gone; no folder for temporary files
            yield Disk(place, error.strerror or str(error), None, False, None)
            continue
        direct = False if plain_io() else takes_direct(there)
        yield Disk(place, str(path), free, os.access(there, os.W_OK), direct)


def _of_torch(torch: Torch) -> Iterator[Finding]:
    if torch.version is None:
        again = pip_install([Package("torch", "", None, False)])
        yield Finding(f"torch cannot be imported: {torch.error}", f"{again} --force-reinstall")
    elif _DRIVER.exists() and not torch.gpus:
        blind = "an NVIDIA driver is here, but torch sees no GPU"
        built = "an NVIDIA driver is here, and this torch is built without CUDA"
        yield Finding(
            blind if torch.cuda else built,
            "see nvidia-smi, and CUDA_VISIBLE_DEVICES" if torch.cuda else "install one with CUDA",
            is_broken=False,
        )


def _of_packages(needed: tuple[Package, ...]) -> Iterator[Finding]:
    wrong = [p for p in needed if not p.fits]
    if wrong:
        named = list_some(f"{p.name}{p.needs} ({p.version or 'not there'})" for p in wrong)
        yield Finding(f"packages that loratool needs: {named}", pip_install(wrong))


def _of_room(disks: tuple[Disk, ...]) -> Iterator[Finding]:
    for disk in disks:
        if not disk.is_writable:
            what = f"{disk.place}, {disk.path}: cannot be written to"
            yield Finding(what, _elsewhere(disk), is_broken=False)
        elif disk.free_bytes is not None and disk.free_bytes < _LITTLE_DISK:
            yield Finding(f"little room in {disk.path}", _elsewhere(disk), is_broken=False)
    memory = available_memory()
    if memory is not None and memory < _LITTLE_MEMORY:
        yield Finding(f"{memory / 1e6:.0f} MB of memory: merges into large matrices need more",
                      "--dry-run says what a command needs", is_broken=False)  # fmt: skip


def _elsewhere(disk: Disk) -> str:
    """How another place is chosen."""
    return {"here": "cd to another folder", "temporary": "TMPDIR names another place",
            "hub cache": "HF_HOME names another place"}[disk.place]  # fmt: skip
