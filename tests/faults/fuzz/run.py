"""Meet mutated files and measure.

python -m tests.faults.fuzz.run --headers 20000 --configs 2000 [--seed 0] [--keep FOLDER]

Every case is a file on disk that `inspect` and the planner of `merge` look at.  Right is an
answer or a `LoratoolError`; anything else, more than 5 s, or a peak over 300 MB is a failure.
Prints one JSON object; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from loratool.adapter import ReadOptions
from loratool.api.merge_job import NameOptions, prepare_merge
from loratool.errors import LoratoolError
from loratool.ops.bind import BindOptions
from loratool.ops.inputs import Access
from loratool.ops.summary import summarize
from loratool.store.checkpoint import open_checkpoint
from loratool.store.header import read_header
from tests.faults.fuzz.mutate import mutate_json, mutate_safetensors

HANG_S = 60.0
"""What is not over by then hangs, on any machine; how slow the slowest was is processor time."""
LIMIT_BYTES = 300_000_000
DATA = Path(__file__).parents[2] / "data" / "llm"
SAMPLES = ("lora_linear", "lora_dora", "lora_gpt2_conv1d", "lora_modules_to_save",
           "lora_target_params_mixtral", "lora_trainable_tokens")  # fmt: skip
Case = tuple[str, Callable[[], object]]


class TooSlow(BaseException):
    """No `Exception`: nothing under test may swallow it."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def plan(adapter: Path, base: Path, out: Path) -> None:
    prepare_merge(
        [str(adapter)], base=base, weights=None, mean=False,
        names=NameOptions(BindOptions(), ReadOptions()), access=Access(offline=True), dtype=None,
        shard_bytes=None, output=out, with_provenance=True,
    )  # fmt: skip


class Folder:
    """An adapter and its base on disk; any one file of them can be exchanged for a while."""

    def __init__(self, root: Path, sample: str) -> None:
        self.root = root / sample
        self.adapter, self.base = self.root / "adapter", self.root / "base"
        source = DATA / sample
        for target, origin in ((self.adapter, source), (self.base, source / "base")):
            target.mkdir(parents=True)
            for file in sorted(origin.iterdir()):
                if file.suffix in (".json", ".safetensors") and file.name[0].islower():
                    (target / file.name).write_bytes(file.read_bytes())
        (self.adapter / "merged.safetensors").unlink(missing_ok=True)
        (self.adapter / "inmemory_names.json").unlink(missing_ok=True)
        weights = next(self.base.glob("*.safetensors"))
        names = [ref.name for ref in read_header(weights).tensors]
        self.index = self.base / "model.safetensors.index.json"
        self.index.write_text(
            json.dumps(
                {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, weights.name)}
            )
        )
        self.files = {p: p.read_bytes() for p in sorted(self.root.rglob("*")) if p.is_file()}

    @contextmanager
    def exchanged(self, path: Path, data: bytes) -> Iterator[None]:
        path.write_bytes(data)
        try:
            yield
        finally:
            path.write_bytes(self.files[path])

    def looks(self) -> Iterator[Case]:
        yield "inspect adapter", lambda: summarize(self.adapter, tensors=True)
        yield "inspect base", lambda: summarize(self.base)
        yield "plan", lambda: plan(self.adapter, self.base, self.root / "out")


class Runner:
    def __init__(self, keep: Path | None) -> None:
        self.keep = keep
        self.cases = 0
        self.answers: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.slowest = 0.0

    def meet(self, name: str, data: bytes, looks: Iterator[Case]) -> None:
        """Look at one mutated file in every way."""
        self.cases += 1
        for what, look in looks:
            started = time.process_time()
            try:
                with alarm(HANG_S):
                    look()
                self.answers["accepted"] += 1
            except LoratoolError as error:
                self.answers[error.code] += 1
            except TooSlow:
                self._fail(name, data, what, f"more than {HANG_S} s")
            except Exception:
                self._fail(name, data, what, traceback.format_exc(limit=-4))
            self.slowest = max(self.slowest, time.process_time() - started)

    def _fail(self, name: str, data: bytes, what: str, why: str) -> None:
        self.failures.append({"case": name, "look": what, "why": why})
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / name.replace("/", "-")).write_bytes(data)


def fuzz(headers: int, configs: int, seed: int, keep: Path | None) -> dict[str, Any]:
    started = time.perf_counter()
    runner = Runner(keep)
    with tempfile.TemporaryDirectory() as root:
        folders = [Folder(Path(root), sample) for sample in SAMPLES]
        loose = Path(root) / "loose.safetensors"
        weights = [d for f in folders for p, d in f.files.items() if p.suffix == ".safetensors"]
        for number in range(headers):
            rng = random.Random(f"{seed} header {number}")
            data = mutate_safetensors(rng.choice(weights), rng.choice(weights), rng)
            loose.write_bytes(data)
            looks = iter((("header", lambda: read_header(loose)),
                          ("inspect", lambda: summarize(loose, tensors=True, alpha=1.0)),
                          ("checkpoint", lambda: open_checkpoint(loose))))  # fmt: skip
            runner.meet(f"header-{number}", data, looks)
        for number in range(configs):
            rng = random.Random(f"{seed} config {number}")
            folder = rng.choice(folders)
            path = rng.choice([p for p in folder.files if p.suffix == ".json"])
            data = mutate_json(folder.files[path], rng)
            with folder.exchanged(path, data):
                runner.meet(f"config-{number}-{path.name}", data, folder.looks())
        for number in range(configs // 4):  # headers in their folder, up to the plan
            rng = random.Random(f"{seed} placed {number}")
            folder = rng.choice(folders)
            path = rng.choice([p for p in folder.files if p.suffix == ".safetensors"])
            data = mutate_safetensors(folder.files[path], rng.choice(weights), rng)
            with folder.exchanged(path, data):
                runner.meet(f"placed-{number}", data, folder.looks())
    peak = peak_bytes()
    return {
        "cases": runner.cases, "seed": seed, "failures": runner.failures,
        "slowest_s": round(runner.slowest, 3), "peak_bytes": peak,
        "seconds": round(time.perf_counter() - started, 1),
        "heavy": sorted({"torch", "numpy", "transformers", "peft"} & sys.modules.keys()),
        "answers": dict(runner.answers.most_common()),
        "ok": not runner.failures and peak < LIMIT_BYTES,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--headers", type=int, default=20_000)
    parser.add_argument("--configs", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for files that failed")
    options = parser.parse_args()
    found = fuzz(options.headers, options.configs, options.seed, options.keep)
    print(json.dumps(found, indent=1))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
