"""How every script measures: cases in turn (A B C A B C …), each in a fresh process.

Of each run: the time of the job alone (imports and loading of libraries aside), of the whole
process, user and system time, peak resident memory (`wait4`, children included).  Outputs are
synced to the disk within both times, and gone before the next run.  Ratios are taken repetition
by repetition.  This process stays small, as a child's peak memory starts at its parent's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.timed import sync_tree

ROOT = Path(__file__).parents[1]
NOT_PASSED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
              "PYTHONDONTWRITEBYTECODE")  # fmt: skip
"""Variables that would handicap some of the cases."""
PACKAGES = ("torch", "numpy", "safetensors", "peft", "transformers", "mergekit")


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        name: of the row.
        command: of the process.
        output: file or folder that it makes, if any.
        needs: package that it is skipped without.
        env: variables of its own.
        synced: the process itself waits for the disk (`benchmarks.timed`).
        proof: file that tells of success whatever the exit code says.
    """

    name: str
    command: Sequence[str]
    output: Path | None = None
    needs: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    synced: bool = True
    proof: Path | None = None


def job(name: str, work: str, *arguments: object, output: Path | None = None, **more: Any) -> Case:
    """A case that is a job of `benchmarks.jobs`."""
    sync = ["--sync", str(output)] if output else []
    words = [sys.executable, "-m", "benchmarks.timed", *sync, work, *map(str, arguments)]
    return Case(name, words, output, **more)


def ours(name: str, function: str, output: Path | None, /, **options: Any) -> Case:
    """A case that is one call of loratool's Python API; it makes `output`."""
    env = options.pop("env", {})
    given = options if output is None else {**options, "output": str(output)}
    return job(name, "ours", function, json.dumps(given), output=output, env=env)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every script has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--reps", type=int, default=5)
    made.add_argument("--warm-up", type=int, default=1, help="rounds that do not count")
    made.add_argument("--work", type=Path, help="folder for models (kept) and outputs")
    made.add_argument("--json", type=Path, help="file for the results")
    made.add_argument("--only", action="append", default=[], metavar="REGEX", help="cases")
    made.add_argument("--skip", action="append", default=[], metavar="REGEX", help="cases")
    return made


@contextlib.contextmanager
def work_folder(asked: argparse.Namespace) -> Iterator[Path]:
    """The folder of ``--work``, or one that goes away."""
    if asked.work:
        asked.work.mkdir(parents=True, exist_ok=True)
        yield asked.work.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def compare(
    claim: str,
    title: str,
    cases: Sequence[Case],
    asked: argparse.Namespace,
    settings: Mapping[str, Any] | None = None,
    before: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run cases in turn, print their table, store it where ``--json`` says.

    Args:
        claim: name of the script.
        title: what is measured, in a line.
        cases: the first one that runs is what the others are compared with.
        asked: of `parser`.
        settings: sizes and the like, recorded.
        before: called before each run.
    """  # fmt: skip
    chosen, skipped = [], []
    for case in cases:
        if any(re.search(s, case.name) for s in asked.skip):
            continue
        if asked.only and not any(re.search(o, case.name) for o in asked.only):
            continue
        if case.needs and not importlib.util.find_spec(case.needs):
            skipped.append(f"{case.name} ({case.needs} is not installed)")
            continue
        chosen.append(case)
    for line in skipped:
        print(f"skipped: {line}", flush=True)
    runs: dict[str, list[dict[str, float]]] = {c.name: [] for c in chosen}
    for turn in range(-asked.warm_up, asked.reps):
        for case in chosen:
            if before:
                before()
            found = measure(case)
            if turn >= 0:
                runs[case.name].append(found)
            print(f"{turn + 1:>3} {case.name}: {found['job']:.3f} s", file=sys.stderr, flush=True)
    result = {
        "claim": claim, "title": title, "date": datetime.date.today().isoformat(),
        "machine": machine(), "settings": dict(settings or {}), "runs": runs, "skipped": skipped,
    }  # fmt: skip
    print(table.render(result), flush=True)
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def measure(case: Case, *, keep: bool = False) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of one run, and what its job says itself.

    Raises:
        RuntimeError: it failed.
    """
    clear(case.output)
    env = {k: v for k, v in os.environ.items() if k not in NOT_PASSED}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **case.env}  # fmt: skip
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(case.command, stdout=said, stderr=errors, env=env, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if case.output and not case.synced and case.output.exists():
            sync_tree(case.output)
        whole = time.perf_counter() - start
        if not (case.proof.exists() if case.proof else code == 0):
            errors.seek(0)
            raise RuntimeError(f"{case.name}: exit {code}: {errors.read()[-3000:].decode()}")
        said.seek(0)
        last = said.read().rstrip().rsplit(b"\n", 1)[-1]
    numbers = json.loads(last) if last.startswith(b'{"job"') else {"job": whole}
    if not keep:
        clear(case.output)
    # ru_maxrss is in kilobytes, but on macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        **numbers, "whole": whole, "cpu": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * unit / 1e6,
    }  # fmt: skip


def clear(output: Path | None) -> None:
    """Delete an output, and let the disk come to rest."""
    if output is None:
        return
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    os.sync()


def machine() -> dict[str, Any]:
    """What kind of machine this is; nothing that tells which."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _processor(), "cores": usable, "gpus": _gpus(), "system": platform.system(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(), "packages": dict(_versions()),
    }  # fmt: skip


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found[1].strip()
    return platform.machine()


def _gpus() -> list[str]:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
        return [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return []


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)
