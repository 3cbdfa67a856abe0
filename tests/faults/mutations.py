"""Every kind of file that a command reads, mutated from a seed, and the command run on it.

A kind is one line of `KINDS`: the files, how they are changed, the commands that read them.
`meet` runs cases in one process; a case is right if it ends with an exit code of the contract,
soon and in little memory, and leaves no output behind that was refused or cannot be read again.

    python -m tests.faults.mutations KIND NUMBER [--keep]      one case, with its words and answer
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from loratool import cli
from tests.faults.fuzz import change
from tests.faults.fuzz.mutate import mutate_json, mutate_tensors
from tests.faults.process import cpu_s, peak_bytes, tensors_in
from tests.faults.site_of_kinds import make_site

CPU_S = 5.0
PEAK_BYTES = 300_000_000
CODES = (0, 3, 4, 8, 9)
Change = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        files: patterns, relative to the site.
        change: of a file's bytes.
        commands: one is taken; ``{at}`` is the folder that holds the file's folder.
        before: folder of the site that ``work/`` is a copy of.
        codes: exit codes that a command may end with.
        same: output -> what it has the tensors of, in every bit, wherever a command ends with 0.
    """

    files: tuple[str, ...]
    change: Change
    commands: tuple[str, ...]
    before: str | None = None
    codes: tuple[int, ...] = CODES
    same: Mapping[str, str] = field(default_factory=dict)


T = "--threads 1"
OUT = f"{T} -o work/out"
MERGE = f"merge {{at}}/adapter --base {{at}}/base {OUT}"
MERGES = (MERGE, f"{MERGE} --dry-run", f"{MERGE} --allow-unmatched", f"{MERGE} --dtype bfloat16",
          f"{MERGE} --rank-from file", f"{MERGE} --untie", f"{MERGE} --keep-tied",
          f"{MERGE} --resize-embeddings", f"{MERGE} --moe-layout eoi")  # fmt: skip
ADAPTER = ("inspect {at}/adapter --tensors", "inspect {at}/adapter --json",
           "rescale {at}/adapter 0.5 -o work/out", f"compress {{at}}/adapter --rank 1 {OUT}",
           f"subtract {{at}}/adapter in/sql {OUT}", f"compare {{at}}/adapter in/style {T}",
           f"inspect {{at}}/adapter --spectrum {T}", *MERGES)  # fmt: skip
BASE = ("inspect {at}/base", *MERGES, f"inspect {{at}}/adapter --base {{at}}/base {T}",
        f"extract {{at}}/base --base {{at}}/base --rank 1 {OUT}")  # fmt: skip
MADE = (f"verify work/out {T}", f"verify work/out --base in/base --adapter in/style {T}",
        f"merge in/sql --base in/base {OUT} --force", f"merge in/sql --base in/base {OUT}",
        "rescale in/sql 2 -o work/out --force",
        f"subtract in/style --from work/out {T} -o work/back",
        f"swap in/style in/sql --in work/out {T} -o work/back", "inspect work/out")  # fmt: skip
ONE = f"merge in/style --base in/one.safetensors {T} -o work/out.safetensors"
GOES_ON = f"merge in/style --base in/base {OUT}"
BACK = f"subtract in/style --from work/out --undo in/undo.safetensors {T}"
MANY = "rescale in/style in/sql 0.3 -o work/all/"
FILE = "{at}/adapter/it.safetensors"
FLAT = (f"inspect {FILE} --tensors", f"inspect {FILE} --spectrum {T}",
        f"rescale {FILE} 0.5 -o work/out.safetensors",
        f"compress {FILE} --rank 1 {T} -o work/out.safetensors",
        f"convert {FILE} --to peft --base {{at}}/base/it.safetensors {OUT}",
        f"convert {FILE} --to peft --skip te {OUT}",
        f"convert {FILE} --to lycoris -o work/out.safetensors",
        f"merge {FILE} --base {{at}}/base/it.safetensors {T} -o work/out.safetensors")  # fmt: skip

CODED = ("inspect {at}/base", f"merge {{at}}/adapter --base {{at}}/base --dequantize {OUT}",
         f"merge {{at}}/adapter --base {{at}}/base --requant {OUT}",
         f"inspect {{at}}/adapter --base {{at}}/base {T}")  # fmt: skip
GGUF = ("inspect {at}/adapter/it.gguf", f"convert {{at}}/adapter/it.gguf --to peft {OUT}",
        f"inspect {{at}}/adapter/it.gguf --spectrum {T}",
        "rescale {at}/adapter/it.gguf 0.5 -o work/out.gguf")  # fmt: skip
MLX = ("inspect {at}/adapter --json", "check {at}/adapter --for mlx",
       f"convert {{at}}/adapter --to peft {OUT}", f"merge {{at}}/adapter in/lora {OUT}",
       f"compress {{at}}/adapter --rank 1 {OUT}")  # fmt: skip

KINDS = {
    "flat-header": Kind(("flat/*/adapter/*.safetensors",), change.safetensors, FLAT),
    "flat-tensors": Kind(("flat/*/adapter/*.safetensors",), mutate_tensors, FLAT),
    "coded": Kind(("codes/*/base/*.json", "codes/*/base/*.safetensors"), change.any_file, CODED),
    "gguf": Kind(("gguf/adapter/it.gguf",), change.gguf, GGUF),
    "mlx": Kind(("mlx/adapter/*.json", "mlx/adapter/*.safetensors"), change.any_file, MLX,
                codes=(10, *CODES)),
    "flat-base": Kind(("flat/*/base/*.safetensors",), change.safetensors, FLAT),
    "adapter-config": Kind(("samples/*/adapter/adapter_config.json",), mutate_json, ADAPTER),
    "adapter-header": Kind(("samples/*/adapter/*.safetensors",), change.safetensors, ADAPTER),
    "adapter-tensors": Kind(("samples/*/adapter/*.safetensors",), mutate_tensors, ADAPTER),
    "base-header": Kind(("samples/*/base/*.safetensors",), change.safetensors, BASE),
    "base-tensors": Kind(("samples/*/base/*.safetensors",), mutate_tensors, BASE),
    "base-config": Kind(("samples/*/base/config.json",), mutate_json, BASE),
    "index": Kind(("samples/*/base/*.index.json",), mutate_json, BASE),
    "module-weights": Kind(("in/weights.yaml",), change.yaml_file, (
        f"{GOES_ON} --module-weights in/weights.yaml",
        f"merge in/style in/sql {OUT} --module-weights in/weights.yaml"), codes=(2, *CODES)),
    "recipe": Kind(("in/recipe.yaml",), change.yaml_file, (
        "run in/recipe.yaml --dry-run", "run in/recipe.yaml"), codes=(2, 5, 6, *CODES)),
    "undo": Kind(("in/undo.safetensors",), change.patch_file, (
        f"subtract in/style --from in/merged --undo in/undo.safetensors {OUT}",),
        codes=(6, *CODES), same={"work/out": "in/base"}),
    "residual": Kind(("in/rest.safetensors",), change.patch_file, (
        f"merge in/lora --base in/base --residual in/rest.safetensors {OUT}",),
        codes=(6, *CODES)),
    "merged": Kind(("work/out/*.safetensors",), change.weights, (
        f"verify work/out --base in/base --adapter in/style {T}", f"{BACK} -o work/back",
        f"{BACK} -o work/back", f"{GOES_ON} --force", "inspect work/out"), "made",
        (2, 5, 10, *CODES), {"work/back": "in/base"}),
    "left": Kind(("work/out.loratool-partial/*.safetensors",), change.weights, (
        GOES_ON, GOES_ON, f"merge in/sql --base in/base {OUT}"),
                 "left", (5, *CODES), {"work/out": "made/out"}),
    "record": Kind(("work/out/loratool.json",), change.record, MADE, "made", (2, 5, *CODES)),
    "record-in-file": Kind(("work/out.safetensors",), change.record_in_file, (
        f"{ONE} --force", ONE, f"verify work/out.safetensors {T}", "inspect work/out.safetensors",
        f"subtract in/style --from work/out.safetensors {T} -o work/back.safetensors",
        f"merge in/sql --base work/out.safetensors --no-provenance {T} -o work/b.safetensors"),
        "made", (2, 5, *CODES)),
    "journal": Kind(("work/out.loratool-partial/.journal",), change.lines, (
        GOES_ON, GOES_ON, f"{GOES_ON} --restart", f"merge in/sql --base in/base {OUT}",
        f"rescale in/style 2 {OUT} --force"), "left", (5, *CODES)),
    "series": Kind(("work/all/.loratool-series",), change.lines, (MANY, f"{MANY} --force"),
                   "left", (5, *CODES)),
    "card": Kind(("card/README.md",), change.card, ("push card me/card --dry-run",),
                 codes=(0, 7, 9)),
    "pushed": Kind(("card/*.json", "card/*.safetensors"), change.pushed, (
        "push card me/card --dry-run",), codes=(0, 3, 4, 7, 9)),
    "tokenizer": Kind(("tok/adapter/*.json", "tok/adapter/*.model", "tok/base/*.json",
                       "tok/base/*.model", "tok/base/vocab.txt"), change.tokenizer, (
        f"merge tok/adapter --base tok/base {OUT}", "rescale tok/adapter 2 -o work/out")),
    "pickle": Kind(("pickle/adapter_model.bin",), change.pickle_file, (
        "inspect pickle --allow-pickle", f"merge pickle --base in/base --allow-pickle {OUT}",
        f"rescale pickle 2 --allow-pickle {OUT}"[:-len(OUT)] + "-o work/out")),
    "arguments": Kind((), lambda data, _: data, (), codes=(2, 5, 6, 10, *CODES)),
}  # fmt: skip


@dataclass
class Found:
    """What became of a number of cases."""

    wrong: list[str] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    peak: int = 0


class TooSlow(BaseException):
    """No `Exception`: nothing under test may swallow it."""


# ------------------------------------------------------------------------------- one case


@dataclass(frozen=True)
class Case:
    """A command on a mutated file; `path` is None if only the words are odd."""

    path: Path | None
    data: bytes
    words: list[str]


def case_of(name: str, number: int, site: Path) -> Case:
    """The case of this number, always the same."""
    kind, rng = KINDS[name], random.Random(f"{name} {number}")
    if not kind.files:
        return Case(None, b"", change.arguments(rng))
    path = rng.choice(sorted(p for pattern in kind.files for p in site.glob(pattern)))
    data = kind.change(path.read_bytes(), rng)
    at = path.parents[1].relative_to(site)
    words = rng.choice(kind.commands).format(at=at).split()
    return Case(path, data, words + (["--json"] if rng.random() < 0.3 else []))


def meet(name: str, start: int, count: int, site: str, **env: str) -> dict[str, Any]:
    """Run cases of a kind on a copy of a site; `site` must hold what `make_site` made."""
    os.environ.update(env)
    if name == "pickle":
        change.open_pickles_in_forks()
    if name in ("card", "pushed"):
        change.use_hub(env["HF_ENDPOINT"])
    found = Found()
    top = Path(tempfile.mkdtemp(prefix="loratool-mutations-"))
    try:
        os.chdir(shutil.copytree(site, top / "site"))
        for number in range(start, start + count):
            meet_one(name, number, found)
    finally:
        os.chdir("/")
        shutil.rmtree(top, ignore_errors=True)
    return vars(found)


def meet_one(name: str, number: int, found: Found) -> None:
    """Run one case in the working folder, which is a site."""
    kind = KINDS[name]
    case = prepared(name, number)
    old = case.path.read_bytes() if case.path else b""
    before, started = peak_bytes(), cpu_s()
    if case.path:
        case.path.write_bytes(case.data)
    try:
        code, text = run(case.words)
    finally:
        if case.path and case.path.parent.exists():
            case.path.write_bytes(old)
    spent, grown = cpu_s() - started, peak_bytes() - before
    found.codes[str(code)] += 1
    found.slowest, found.peak = max(found.slowest, spent), max(found.peak, grown)
    problems = list(_problems(kind, case, code, text))
    problems += [f"{spent:.1f} s"] if spent > CPU_S else []
    problems += [f"{grown / 1e6:.0f} MB"] if grown > PEAK_BYTES else []
    found.wrong += [f"{name} {number}: {p}: {' '.join(case.words)[:300]}" for p in problems]


def prepared(name: str, number: int) -> Case:
    """A case, and ``work/`` as it needs it."""
    before = KINDS[name].before
    shutil.rmtree("work", ignore_errors=True)
    if before is None:
        Path("work").mkdir()
    else:
        shutil.copytree(before, "work", symlinks=True)
    return case_of(name, number, Path.cwd())


def _problems(kind: Kind, case: Case, code: int | None, text: str) -> Iterator[str]:
    if code is None or "LT-001" in text or code not in kind.codes:
        yield f"exit {code} {text.strip()[-300:]}"
    out = Path("work/out")
    if kind.before is None and out.exists() and kind.files:
        if code != 0 or "--dry-run" in case.words:
            yield f"exit {code}, and an output"
        elif (again := run(["inspect", str(out)]))[0] != 0:
            yield f"inspect refuses the output: {again[1].strip()[-300:]}"
    for made, like in kind.same.items() if code == 0 else ():
        if Path(made).exists() and tensors_in(Path(made)) != tensors_in(Path(like)):
            yield f"{made} is not {like}"


def run(words: list[str]) -> tuple[int | None, str]:
    """Exit code and all that was printed; None = it did not end in time."""
    printed = io.StringIO()
    try:
        with alarm(), redirect_stdout(printed), redirect_stderr(printed):
            return cli.run(words), printed.getvalue()
    except TooSlow:
        return None, "more than a minute"


@contextmanager
def alarm() -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, 4 * CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("number", type=int)
    parser.add_argument("--keep", action="store_true", help="keep the files")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="loratool-site-"))
    make_site(str(root), None)
    os.chdir(root)
    os.environ["LORATOOL_DEBUG"] = "1"
    found = Found()
    case = prepared(options.kind, options.number)
    print(case.path, case.data[:2000], " ".join(case.words)[:1000], sep="\n")
    meet_one(options.kind, options.number, found)
    print(found)
    if options.keep:
        if case.path:
            case.path.write_bytes(case.data)
        print("kept:", root)
    else:
        shutil.rmtree(root)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
