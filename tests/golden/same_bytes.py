"""The sha256 of everything that every writing command makes of every sample.

A redesign must not change a byte.  The table holds for one build of torch on one family of
processors (`loratool` promises the same bytes there), so this is a tool and not a test:

    python -m tests.golden.same_bytes record     write the table anew
    python -m tests.golden.same_bytes check      name every output that differs; exit code 1 if any

Exit codes and messages of refusals are outputs too: what was refused stays refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from loratool import cli

HERE = Path(__file__).parent
TABLE = HERE / "same_bytes.json"
LLM = HERE.parent / "data" / "llm"
METHODS = ("svd", "ties", "ties-peft", "dare", "dare-ties", "magnitude", "slerp", "core", "sce",
           "knots-ties", "della", "breadcrumbs", "tsv", "iso-c", "iso-cts", "factors-linear",
           "factors-ties")  # fmt: skip


def cases() -> Iterator[tuple[str, str]]:
    """(name, command line); ``S`` is the sample, every line writes ``out…``."""
    for folder in sorted(p for p in LLM.iterdir() if (p / "base").is_dir()):
        s = folder.name
        merge = "merge S --base S/base -o out"
        yield f"{s} merge", merge
        yield f"{s} merge untied", f"{merge} --untie"
        yield f"{s} merge bf16", f"{merge} --dtype bfloat16"
        yield f"{s} merge exact", f"{merge} --exact --dtype float16"
        yield f"{s} merge stochastic", f"{merge} --dtype bfloat16 --rounding stochastic --seed 7"
        yield f"{s} merge undo", f"{merge} --save-undo out.undo.safetensors"
        yield f"{s} merge two", f"{merge} S --weights 0.7,-0.2"
        yield f"{s} merge ties", f"{merge} S --weights 0.7,0.2 --method ties --param density=0.5"
        yield f"{s} rescale", "rescale S 0.5 -o out"
        yield f"{s} rescale baked", "rescale S -0.3 -o out"
        yield f"{s} rescale base", "rescale S -0.3 -o out --base S/base"
        yield f"{s} rescale peft", "rescale S 0.7 -o out --for peft"
        yield f"{s} compress", "compress S --rank 2 -o out"
        yield f"{s} compress energy", "compress S --energy 0.8 -o out --base S/base"
        yield f"{s} compress size", "compress S --size 2500 -o out"
        yield f"{s} combine", "merge S:0.7 S:-0.2 -o out"
        yield f"{s} combine base", "merge S:0.7 S:-0.2 -o out --base S/base --into adapter"
        yield f"{s} combine rank", "merge S:0.7 S:0.2 -o out --rank 2"
        yield f"{s} subtract", "subtract S S:0.4 -o out"
    yield from _after_a_merge()
    for method in METHODS:
        two = "merge lora_linear:0.6 lora_rslora:0.4 -o out --method"
        yield f"method {method}", f"{two} {method}"
        yield f"method {method} rank", f"{two} {method} --rank 3"
    yield "demo", "demo -o out --json"


def _after_a_merge() -> Iterator[tuple[str, str]]:
    """Commands on merged weights: ``M`` are those of the sample."""
    for folder in sorted(p for p in LLM.iterdir() if (p / "base").is_dir()):
        s = folder.name
        yield f"{s} extract", "extract M --base S/base --rank 2 -o out"
        yield f"{s} extract auto", "extract M --base S/base -o out --keep all"
        yield f"{s} extract size", "extract M --base S/base --size 6000 -o out"
        rest = "--save-residual out.rest.safetensors"
        yield f"{s} extract residual", f"extract M --base S/base --rank 2 -o out {rest}"
        yield f"{s} subtract from", "subtract S --from M -o out"
        yield f"{s} subtract from base", "subtract S --from M --base S/base -o out"
        yield f"{s} swap", "swap S S:0.3 --in M -o out --base S/base"


def run(site: Path, line: str) -> dict[str, str]:
    """File -> half of its sha256 of what a command line leaves, and why it refused if it did."""
    for old in site.glob("out*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        code = cli.run(line.split())
    found = {} if code == 0 else {"": f"{code} {said.getvalue().split(' · hint')[0].strip()[:200]}"}
    for file in sorted(p for top in site.glob("out*") for p in (top, *top.rglob("*"))):
        if file.is_file():
            name = file.relative_to(site).as_posix()
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def table() -> dict[str, dict[str, str]]:
    """Every case, run in a folder of its own."""
    site = Path(tempfile.mkdtemp(prefix="loratool-bytes-"))
    before = Path.cwd()
    made: dict[str, dict[str, str]] = {}
    try:
        os.chdir(site)
        for folder in sorted(LLM.iterdir()):
            shutil.copytree(folder, site / folder.name)
        merged = ""
        for name, line in cases():
            sample = name.split()[0]
            if "M" in line.split() and merged != sample:
                _merge(sample)
                merged = sample
            words = [_named(word, sample) for word in line.split()]
            made[name] = run(site, " ".join(words))
    finally:
        os.chdir(before)
        shutil.rmtree(site)
    return made


def _merge(sample: str) -> None:
    """Weights that later commands start from."""
    shutil.rmtree("merged", ignore_errors=True)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for option in ("--untie", "--exact"):  # one of them is right for every sample
            if cli.run(f"merge {sample} --base {sample}/base -o merged {option}".split()) == 0:
                return


def _named(word: str, sample: str) -> str:
    if word == "M":
        return "merged"
    return sample + word[1:] if word.partition("/")[0].partition(":")[0] == "S" else word


def environment() -> str:
    """Whose bytes they are."""
    import torch

    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def main(word: str) -> int:
    """``record`` or ``check``."""
    made = table()
    if word == "record":
        TABLE.write_text(
            json.dumps({"environment": environment(), "outputs": made}, indent=0, sort_keys=True)
        )
        print(f"{len(made)} cases, {sum(map(len, made.values()))} outputs recorded")
        return 0
    old = json.loads(TABLE.read_text())
    if old["environment"] != environment():
        print(f"recorded on {old['environment']}, this is {environment()}: differences may be its")
    names = {**old["outputs"], **made}
    differing = [name for name in names if old["outputs"].get(name) != made.get(name)]
    for name in differing:
        then, now = old["outputs"].get(name, {}), made.get(name, {})
        print(name, sorted(k for k in {**then, **now} if then.get(k) != now.get(k)))
        if then.get("") != now.get(""):
            print("   ", then.get("", "written"), "->", now.get("", "written"))
    print(f"{len(made)} cases, {len(differing)} differ")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
