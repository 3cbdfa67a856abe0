"""Whether a GPU pays for a plan that streams: measured on this machine, not guessed."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from loratool.engine.device import exact_arithmetic
from loratool.engine.machine import usable_cores
from loratool.engine.rows import op_of
from loratool.engine.run import RunOptions
from loratool.engine.step import Lane, Nowhere, StepWork
from loratool.frozen import Frozen, replace
from loratool.location import RemoteFile
from loratool.plan import Plan, Step
from loratool.report.text import plural
from loratool.store.bandwidth import write_speed
from loratool.store.reader import FileReader

_MOVING = 0.3e-9  # seconds of a core for a byte: its checksum, the write past the page cache
_START_S = 2.5  # of a GPU: its context and libraries
GPU_LANES = 8
"""Threads beside GPUs that add, of all of them together: so many copy as fast as a machine's memory
allows, and each takes pinned memory."""

_GAIN = 1.15  # a GPU must be this much faster


class Rates(Frozen):
    """Bytes per second.

    Attributes:
        cpu: that all cores read, sum and write, if the disk lets them.
        disk: that the output's disk takes; None if that was not to be measured.
        gpu: that the GPU sums, and the cores beside it read and write.
    """

    cpu: float
    disk: float | None = None
    gpu: float | None = None


def gpu_pays(plan: Plan, folder: Path | None, workers: int) -> tuple[bool, str]:
    """Whether a GPU is the faster one for the sums of a plan, and why, in words with numbers.

    Args:
        plan: that streams; there is a GPU.
        folder: where the output goes.
        workers: that the CPU would have.
    """
    step = _heaviest(plan)
    if step is None:
        return False, "nothing to compute"
    cores = min(workers, usable_cores())
    seconds = _trial(step, torch.device("cpu"))
    rates = Rates(cores / (seconds + _MOVING))
    if plan.read_bytes / rates.cpu <= _START_S:
        return decide(rates, plan.read_bytes, cores)
    rates = replace(rates, disk=write_speed(folder) if folder else None)
    if rates.disk is None or rates.cpu < rates.disk * _GAIN:
        seconds = _trial(step, torch.device("cuda", 0))
        rates = replace(rates, gpu=min(1 / seconds, min(GPU_LANES, cores) / _MOVING))
    return decide(rates, plan.read_bytes, cores)


def decide(rates: Rates, nbytes: int, cores: int) -> tuple[bool, str]:
    """What rates say.

    Args:
        rates: measured; those that could change nothing may be missing.
        nbytes: to be read.
        cores: behind the rate of the CPU.
    """
    here = plural(cores, "core")
    cpu = f"{here} sum {_spell(rates.cpu)}"
    if nbytes / rates.cpu <= _START_S:
        return False, f"{here} need {nbytes / rates.cpu:.1f} s, less than a GPU takes to start"
    if rates.gpu is None:
        disk = "" if rates.disk is None else f", the disk takes {_spell(rates.disk)}"
        return False, f"{cpu}{disk}: a GPU would not help"
    most = rates.disk or rates.gpu
    on_cpu, on_gpu = min(rates.cpu, most), min(rates.gpu, most)
    wins = nbytes / on_gpu + _START_S < nbytes / on_cpu / _GAIN
    disk = "" if rates.disk is None else f"; the disk takes {_spell(rates.disk)}"
    return wins, f"{cpu}, the GPU {_spell(rates.gpu)}{disk}"


def _spell(rate: float) -> str:
    return f"{rate / 1e9:.1f} GB/s"


def _heaviest(plan: Plan) -> Step | None:
    """The largest tensor that changes go into, block by block."""
    summed = [
        step for step in plan.steps
        if step.parts and op_of(step).kernel and not op_of(step).is_module
        and not any(isinstance(ref.file, RemoteFile) for ref in step.refs())
    ]  # fmt: skip
    return max(summed, key=lambda step: step.view[0] * step.view[1], default=None)


def _trial(step: Step, device: torch.device) -> float:
    """Seconds for a byte of a step's first piece, read from memory: the best of three runs."""
    with FileReader() as reader, exact_arithmetic():
        work = StepWork(step, RunOptions(device).env(reader), Nowhere())
        lane, piece = Lane(device), work.pieces[0]
        times = []
        for _ in range(3):  # the first one loads the factors, and what the kernel needs
            start = time.perf_counter()
            read = work.process(lane, piece)
            times.append((time.perf_counter() - start) / read)
    return min(times)
