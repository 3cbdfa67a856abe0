"""What `loratool.doctor` returns."""

from __future__ import annotations

from typing import Any, ClassVar

from loratool.frozen import Frozen
from loratool.report.base import Report


class Gpu(Frozen):
    """A CUDA device: its number, name and bytes of memory in all."""

    index: int
    name: str
    memory_bytes: int


class Torch(Frozen):
    """The build of torch.

    Attributes:
        version: with its build, ``2.13.0+cpu``; None if it cannot be imported.
        cuda: version of CUDA that it was built for; None if for none.
        gpus: CUDA devices that it sees.
        has_mps: Apple's GPU is there; loratool does not use it.
        error: why it cannot be imported.
    """

    version: str | None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    has_mps: bool = False
    error: str | None = None


class Disk(Frozen):
    """A place where bytes go.

    Attributes:
        place: ``here``, ``temporary``, ``hub cache``.
        path: the folder; why it cannot be looked at, if so.
        free_bytes: None if it cannot be looked at.
        is_writable: files may be made there.
        takes_direct: reads and writes past the page cache; None if that cannot be told.
    """

    place: str
    path: str
    free_bytes: int | None
    is_writable: bool
    takes_direct: bool | None


class Login(Frozen):
    """How this machine stands with the Hub; the token itself is nowhere here.

    Attributes:
        endpoint: address of the Hub.
        is_offline: the network is not used.
        token_from: variable or file that holds the token; None without one.
        user: whose token it is; None if nobody was asked, or did not answer.
        why: there is no user, in words.
    """

    endpoint: str
    is_offline: bool
    token_from: str | None
    user: str | None = None
    why: str = ""


class Package(Frozen):
    """A package that loratool needs, or that an extra brings.

    Attributes:
        name: of the distribution.
        needs: versions that fit, ``>=2.6``.
        version: that is installed, None if none is.
        fits: it is there, in such a version.
    """

    name: str
    needs: str
    version: str | None
    fits: bool


class Extra(Frozen):
    """An optional part of the installation: what it gives, and the packages it takes."""

    name: str
    gives: str
    packages: tuple[Package, ...]

    @property
    def is_there(self) -> bool:
        """True if every package fits, and it is known which those are."""
        return bool(self.packages) and all(p.fits for p in self.packages)


class Choice(Frozen):
    """What ``auto`` stands for here.

    Attributes:
        option: ``--device``, ``--executor``.
        takes: the word.
        why: in words.
    """

    option: str
    takes: str
    why: str


class Finding(Frozen):
    """Something to know about this installation.

    Attributes:
        what: is so.
        do: what to type, or do.
        is_broken: commands fail until it is done.
    """

    what: str
    do: str
    is_broken: bool = True


class DoctorReport(Report):
    """Result of `loratool.doctor`.

    Attributes:
        version: of loratool.
        python: its version.
        platform: system and processor.
        prefix: the environment that this Python belongs to.
        torch: its build and what it sees.
        cores: that this process may use.
        threads: that ``--threads`` is by default.
        memory_bytes: that ``--max-memory`` is by default; None if no limit is known.
        disks: where outputs, temporary files and the Hub's cache go.
        hub: endpoint and login.
        choices: what ``auto`` takes.
        requires: packages that loratool needs; empty if it is not installed as one itself.
        extras: optional parts.
        settings: environment variables that are set and obeyed, by name.
        findings: what is missing or could be better.
    """

    command: ClassVar[str] = "doctor"
    version: str
    python: str
    platform: str
    prefix: str
    torch: Torch
    cores: int
    threads: int
    memory_bytes: int | None
    disks: tuple[Disk, ...]
    hub: Login
    choices: tuple[Choice, ...]
    requires: tuple[Package, ...]
    extras: tuple[Extra, ...]
    settings: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """False if something is broken."""
        return not any(f.is_broken for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types, with ``is_there`` of every extra."""
        there = [{"is_there": e.is_there} for e in self.extras]
        found = super().to_json()
        return found | {"extras": [e | t for e, t in zip(found["extras"], there, strict=True)]}
