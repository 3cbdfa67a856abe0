"""``loratool doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import loratool as lt
from loratool.cli import options as opt
from loratool.cli.render import format_bytes, line, plural, safe, some, table
from loratool.cli.voice import Voice
from loratool.options.hub import Doctor

if TYPE_CHECKING:
    from loratool.report.doctor import DoctorReport, Login, Torch

EXIT_BROKEN = 10
_DIRECT = {True: "yes", False: "no", None: "unknown"}


@click.command(
    cls=opt.Command,
    name="doctor",
    short_help="This installation: devices, memory, Hub login, what is missing.",
    examples=(
        "loratool doctor",
        "loratool doctor --offline    # asks the Hub nothing",
        "loratool doctor --json       # for a bug report; without secrets",
    ),
)
@opt.taking(Doctor)
@opt.general
def command(**options: Any) -> int:
    """Look at this installation: what is there, what `auto` takes and why, what is missing.

    Exit code 0: all commands can run; 10: something is broken.
    """
    voice = Voice.take(options)
    report = lt.doctor(**options)
    voice.show(report, render(report, voice), result=list(_findings(report)))
    return 0 if report.ok else EXIT_BROKEN


def render(report: DoctorReport, voice: Voice) -> Iterator[str]:
    """The report, line by line."""
    yield line("loratool", report.version)
    yield line("python", report.python, safe(report.platform), safe(report.prefix))
    yield line("torch", *_torch(report.torch), tone=None if report.torch.version else "bad")
    for gpu in report.torch.gpus:
        yield line(f"cuda:{gpu.index}", safe(gpu.name), format_bytes(gpu.memory_bytes))
    yield line("cores", str(report.cores), f"--threads is {report.threads}")
    if report.memory_bytes is not None:
        yield line("memory", f"--max-memory is {format_bytes(report.memory_bytes)}",
                   "the least of what machine, containers and ulimit leave")  # fmt: skip
    yield from _disks(report)
    yield line("hub", safe(report.hub.endpoint), *_login(report.hub))
    for choice in report.choices:
        yield line("auto", f"{choice.option} {choice.takes}: {choice.why}")
    yield from _packages(report, voice)
    if report.settings:
        yield line("set", *(f"{name}={safe(value)}" for name, value in report.settings.items()))
    yield from _findings(report)
    if report.ok:
        yield line("ok", "every command can run", tone="good")


def _torch(torch: Torch) -> list[str]:
    if torch.version is None:
        return ["cannot be imported"]
    cuda = f"CUDA {torch.cuda}" if torch.cuda else "built without CUDA"
    gpus = "" if torch.gpus else "no GPU"
    return [safe(torch.version), cuda, gpus, "MPS, which is not used" if torch.has_mps else ""]


def _disks(report: DoctorReport) -> list[str]:
    rows = [
        (d.place, "?" if d.free_bytes is None else format_bytes(d.free_bytes),
         _DIRECT[d.takes_direct], safe(d.path))
        for d in report.disks
    ]  # fmt: skip
    return table(rows, ("disk", "free", "direct I/O", "folder"), right=(1,))


def _login(hub: Login) -> list[str]:
    token = f"token from {safe(hub.token_from)}" if hub.token_from else ""
    return ["offline" if hub.is_offline else "", token, safe(hub.user) if hub.user else hub.why]


def _packages(report: DoctorReport, voice: Voice) -> Iterator[str]:
    from loratool.ops.installed import pip_install

    if not report.requires:
        yield line("packages", "loratool runs from its source: not known what it needs")
    else:
        wrong = [p.name for p in report.requires if not p.fits]
        there = plural(len(report.requires), "package")
        yield line("packages", f"{there} needed, " + (
            f"{some(wrong)} missing or of another version" if wrong else "all there"
        ))  # fmt: skip
    if voice.verbose:
        rows = [(safe(p.name), p.needs, p.version or "not there") for p in report.requires]
        yield from table(rows, ("package", "needed", "installed"))
    for extra in report.extras:
        lacking = [p for p in extra.packages if not p.fits]
        word = "there" if extra.is_there else "not known"
        yield line("extra", f"{extra.name}: {extra.gives}",
                   f"not there, {pip_install(lacking)}" if lacking else word)  # fmt: skip


def _findings(report: DoctorReport) -> Iterator[str]:
    for one in report.findings:
        label, tone = ("broken", "bad") if one.is_broken else ("note", "warn")
        yield line(label, safe(one.what, cap=600), safe(one.do, cap=600), tone=tone)
