"""How long the disks alone will be at work with a merge."""

from __future__ import annotations

from pathlib import Path

from loratool.api.merge_job import MergeJob
from loratool.report.merge import LeastTime
from loratool.store.bandwidth import are_on_one_disk, read_speed, write_speed
from loratool.store.stubs import remote_file

_WORTH_BYTES = 1_000_000_000
"""Output from which somebody wants to know."""

_MOST_FILES = 16


def least_time(job: MergeJob) -> LeastTime | None:
    """Measure the disks; None for small outputs, and where neither speed can be told."""
    plan, folder = job.merge.plan, Path(job.output or ".").absolute().parent
    files = [shard.path for shard in job.base.checkpoint.shards if not remote_file(shard.path)]
    if plan.output_bytes < _WORTH_BYTES or not folder.is_dir():
        return None
    read = read_speed(files[:: len(files) // _MOST_FILES + 1])
    write = write_speed(folder)
    return fastest(
        plan.read_bytes, read, plan.output_bytes, write,
        one_disk=bool(files) and are_on_one_disk(files[0], folder),
    )  # fmt: skip


def fastest(
    read_bytes: int, read: float | None, write_bytes: int, write: float | None, *, one_disk: bool
) -> LeastTime | None:
    """Reads and writes overlap, but where they share a disk they share its time."""
    times = [n / speed for n, speed in ((read_bytes, read), (write_bytes, write)) if speed]
    if not times:
        return None
    seconds = sum(times) if one_disk else max(times)
    return LeastTime(seconds, read_bytes, read, write_bytes, write)
