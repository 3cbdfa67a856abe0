"""Do all writing commands still write the same bytes?  For before and after a redesign.

    python -m tests.golden.same_bytes record table.json      (before)
    python -m tests.golden.same_bytes check table.json       (after, on the same machine)

Every command runs on every sample that it accepts; what it refuses is recorded by its error code.
A table belongs to one torch build and CPU family: elsewhere only rows of ``--exact`` must agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import loratool as lt

DATA = Path(__file__).parents[1] / "data" / "llm"
METHODS = ("svd", "slerp", "ties", "dare", "magnitude", "core", "knots-ties", "tsv", "iso-c",
           "factors-linear", "factors-ties")  # fmt: skip


def hashes(path: Path) -> dict[str, str]:
    """File -> sha256 of everything that a command wrote."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {
        p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def commands(sample: Path, work: Path) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Name of a case, and what writes its output."""
    adapter, base = str(sample), sample / "base"
    merged, undo, rest = work / "merged", work / "undo.safetensors", work / "rest.safetensors"
    twin = work / "twin"
    if base.exists():
        yield "merge", lambda out: lt.merge([adapter], base=base, output=out)
        yield "merge 0.3", lambda out: lt.merge([f"{adapter}:0.3"], base=base, output=out)
        yield "merge exact", lambda out: lt.merge([adapter], base=base, output=out, exact=True)
        yield "merge bf16", lambda out: lt.merge([adapter], base=base, output=out, dtype="bfloat16")
        yield (
            "merge stochastic",
            lambda out: lt.merge(
                [adapter], base=base, output=out, dtype="float16", rounding="stochastic", seed=3
            ),
        )
        lt.merge([adapter], base=base, output=merged, save_undo=undo)
        yield "undo file", lambda out: shutil.copy(undo, out)
        yield (
            "subtract --undo",
            lambda out: lt.subtract([adapter], merged=merged, output=out, undo=undo),
        )
        yield "subtract --from", lambda out: lt.subtract([adapter], merged=merged, output=out)
        yield "extract", lambda out: lt.extract(merged, base=base, output=out, rank=2)
        yield (
            "extract all",
            lambda out: lt.extract(
                merged, base=base, output=out, keep=["all"], energy=0.9, save_residual=rest
            ),
        )
        yield "residual file", lambda out: shutil.copy(rest, out)
    yield "rescale", lambda out: lt.rescale([adapter], 0.3, output=out)
    yield "rescale 2", lambda out: lt.rescale([adapter], 2.0, output=out)
    yield "compress", lambda out: lt.compress(adapter, output=out, rank=1)
    yield "compress energy", lambda out: lt.compress(adapter, output=out, energy=0.8)
    lt.rescale([adapter], -0.7, output=twin)
    if base.exists():
        yield "swap", lambda out: lt.swap(adapter, str(twin), merged=merged, output=out)
        yield (
            "merge ties",
            lambda out: lt.merge([adapter, str(twin)], base=base, output=out, method="ties"),
        )
    yield "merge A B", lambda out: lt.merge([adapter, str(twin)], output=out)
    yield "subtract A B", lambda out: lt.subtract([adapter, str(twin)], output=out)
    for method in METHODS:
        yield (
            f"merge A B {method}",
            lambda out, method=method: lt.merge(  # type: ignore[misc]
                [adapter, str(twin)], output=out, method=method
            ),
        )


def one_sample(sample: Path) -> dict[str, Any]:
    """Case -> hashes of its files, or its error code."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cases = commands(sample, work)
        number = 0
        while True:
            try:
                name, call = next(cases)
            except StopIteration:
                return found
            except lt.LoratoolError as error:  # what the rest builds on is refused
                found["setting up"] = error.code
                return found
            number += 1
            is_file = name.endswith("file")
            out = work / (f"{number}.safetensors" if is_file else str(number))
            try:
                call(out)
                found[name] = hashes(out)
            except lt.LoratoolError as error:
                found[name] = error.code
            except FileNotFoundError:
                found[name] = "none"


def table() -> dict[str, Any]:
    """Everything."""
    torch.set_num_threads(1)
    kind = torch.backends.cpu.get_cpu_capability()
    machine = f"torch {torch.__version__}, {platform.machine()}, {kind}"
    samples = sorted(p for p in DATA.iterdir() if p.is_dir())
    return {"machine": machine, "cases": {p.name: one_sample(p) for p in samples}}


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Places where two tables differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from differences(before.get(key), after.get(key), f"{place} · {key}".strip(" ·"))
    elif before != after:
        yield f"{place}: {str(before)[:12]} -> {str(after)[:12]}"


def main() -> int:
    """Record or check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    found = table()
    count = sum(len(v) for v in found["cases"].values())
    if options.what == "record":
        options.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{count} cases recorded ({found['machine']})")
        return 0
    odd = list(differences(json.loads(options.file.read_text()), found))
    print("\n".join(odd[:200]))
    print(f"{count} cases, {len(odd)} differences")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
