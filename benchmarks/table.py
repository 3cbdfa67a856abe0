"""Tables of results: `python -m benchmarks.table` writes those of `results/` into README.md here.

And the project's README.md gets its row on merging.

A table has one row per case: the job's time (imports aside), the whole process, user + system
time, peak memory, then what the job says itself; the last column is its time over the first row's.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARKS = "<!-- results -->", "<!-- end of results -->"
HEADLINE = "merge rank 16 into 1.71 GB"
KNOWN = ("job", "whole", "cpu", "peak_mb")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (least–most)."""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


def render(result: Mapping[str, Any]) -> str:
    """One result as Markdown: a line on the machine, and the table."""
    runs = {name: found for name, found in result["runs"].items() if found}
    if not runs:
        return "nothing was run"
    first = next(iter(runs))
    more = list(dict.fromkeys(k for found in runs.values() for k in found[0] if k not in KNOWN))
    head = ["", "job s", "process s", "CPU s", "peak MB", *more, f"× {first}"]
    lines = [f"**{result['title']}** · {_about(result)}", "", _row(head), _row(["---"] * len(head))]
    for name, found in runs.items():
        jobs = [run["job"] for run in found]
        digits = 2 if max(jobs) >= 1 else 3
        ratios = [run["job"] / one["job"] for run, one in zip(found, runs[first], strict=True)]
        lines.append(_row([
            name, spread(jobs, digits), spread([run["whole"] for run in found], digits),
            f"{statistics.median(run['cpu'] for run in found):.2f}",
            f"{max(run['peak_mb'] for run in found):.0f}",
            *(spread([run[key] for run in found]) if key in found[0] else "" for key in more),
            "1" if name == first else spread(ratios),
        ]))  # fmt: skip
    return "\n".join([*lines, *(f"\nskipped: {line}" for line in result["skipped"])])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _about(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if k != "numpy")
    settings = ", ".join(f"{k} {v}" for k, v in result["settings"].items())
    gpus = {name: machine["gpus"].count(name) for name in machine["gpus"]}
    cards = "".join(f", {count} × {name}" for name, count in gpus.items())
    count = len(next(iter(result["runs"].values())))
    return (
        f"{result['date']}, {machine['cores']} cores ({machine['cpu']}), "
        f"{machine['memory_gb']} GB{cards}, {packages}; n = {count}"
        + (f"; {settings}" if settings else "")
    )


def readme(text: str, results: Sequence[Mapping[str, Any]]) -> str:
    """README.md with the tables of all results between its marks."""
    body = "\n\n".join(f"### {r['claim']}\n\n{render(r)}" for r in results)
    pattern = f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}"
    return re.sub(pattern, lambda _: f"{MARKS[0]}\n\n{body}\n\n{MARKS[1]}", text, flags=re.S)


def front(text: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The project's README.md with its row on merging as last measured."""
    runs = next(r["runs"] for r in results if r["title"].startswith(HEADLINE))

    def told(name: str) -> str:
        seconds = statistics.median(run["job"] for run in runs[name])
        peak = max(run["peak_mb"] for run in runs[name])
        memory = f"{peak / 1e3:.1f} GB" if peak >= 1e3 else f"{peak:.0f} MB"
        return f"{seconds:.1f} s" + (f", {memory}" if name != "cp" else "")

    row = _row([
        "rank 16 into 1.7 GB of bfloat16",
        f"PEFT: {told('PEFT cpu')}; a naive script: {told('naive script')}",
        f"{told('loratool cpu')} (`cp` + fsync: {told('cp')})",
    ])  # fmt: skip
    return re.sub(r"^\| rank 16 into 1\.7 GB.*$", lambda _: row, text, flags=re.M)


def stored() -> list[dict[str, Any]]:
    """The results that are kept, by file name."""
    return [json.loads(file.read_text()) for file in sorted((HERE / "results").glob("*.json"))]


PAGES = {HERE / "README.md": readme, HERE.parent / "README.md": front}
"""Page -> what writes the results into its text."""


if __name__ == "__main__":
    for page, written in PAGES.items():
        page.write_text(written(page.read_text(), stored()))
