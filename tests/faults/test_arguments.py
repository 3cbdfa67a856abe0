"""Numbers and places on the command line that cannot be meant: exit 2 or 5, with a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.world import Q, World, factors

NUMBER = ("nan", "inf", "-inf", "9" * 400, "9" * 5000, "", " ", "0x10", "1e400", "²")
WORDS = {
    "compress --rank": ("compress {adapter} --rank {n} -o {out}", (*NUMBER, "0", "-1", "1.5")),
    "compress --max-rank": ("compress {adapter} --rank 1 --max-rank {n} -o {out}", NUMBER),
    "compress --energy": ("compress {adapter} --energy {n} -o {out}", NUMBER),
    "compress --sv-ratio": ("compress {adapter} --sv-ratio {n} -o {out}", NUMBER[:3]),
    "compress --size": ("compress {adapter} --size {n} -o {out}", NUMBER),
    "--max-memory": ("merge {adapter} --base {base} --max-memory {n} -o {out}", NUMBER),
    "--shard-size": ("merge {adapter} --base {base} --shard-size {n} -o {out}", NUMBER),
    "--max-header": ("merge {adapter} --base {base} --max-header {n} -o {out}", (*NUMBER, "0")),
    "--threads": ("merge {adapter} --base {base} --threads {n} -o {out}",
                  (*NUMBER, "0", "9223372036854775807")),
    "--alpha": ("merge {adapter} --base {base} --alpha {n} -o {out}", NUMBER),
    "--weights": ("merge {adapter} --base {base} --weights {n} -o {out}", NUMBER),
    "--seed": ("merge {adapter} --base {base} --rounding stochastic --seed {n} -o {out}",
               NUMBER[:6]),
    "ADAPTER:W": ("merge {adapter}:{n} --base {base} -o {out}", ("9" * 300,)),
    "rescale": ("rescale {adapter} {n} -o {out}", NUMBER),
    "--only": ("rescale {adapter} 1 --only q_proj={n} -o {out}", NUMBER),
    "--blocks": ("rescale {adapter} 1 --blocks {n},1 -o {out}", NUMBER[:4]),
    "--param": ("merge {adapter} {adapter} --method ties --param density={n} -o {out}", NUMBER),
    "--intruders": ("rescale {adapter} 1 --intruders {n} --base {base} -o {out}", NUMBER),
}  # fmt: skip


def words_of(world: World, line: str, **more: str) -> list[str]:
    where = {"adapter": str(world.adapter), "base": str(world.base), "out": str(world.out)} | more
    return [word.format(**where) for word in line.split()]


@pytest.mark.parametrize("name", WORDS)
def test_numbers(tmp_path: Path, name: str) -> None:
    line, numbers = WORDS[name]
    world = World(tmp_path)
    for number in numbers:
        found = world.run(*words_of(world, line, n=number))
        assert found.code == 2 and "LT-2" in found.err, (number[:40], found)
        assert world.leftovers() == []


@pytest.mark.parametrize("command", ["rescale {adapter} 2", "merge {adapter} --base {base}",
                                     "compress {adapter} --rank 1"])  # fmt: skip
@pytest.mark.parametrize("place", [".", "..", "/", "", "./", "../", "/.", "//"])
def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str) -> None:
    world = World(tmp_path)
    monkeypatch.chdir(world.out.parent)
    for force in ([], ["--force"]):
        if force and os.path.realpath(place or ".") == "/":
            continue  # where it is a bug, it would be one only once
        found = world.run(*words_of(world, command), "-o", place, *force)
        assert found.code in (2, 5) and "error[LT-" in found.err, found
        assert world.leftovers() == []


@pytest.mark.parametrize("name", ["x" * 245, "x" * 256, "x" * 5000])
def test_a_name_that_is_too_long_is_told_in_a_line(tmp_path: Path, name: str) -> None:
    world = World(tmp_path)
    found = world.run(*words_of(world, "rescale {adapter} 2"), "-o", str(world.out.parent / name))
    assert found.code == 6 and "error[LT-615]" in found.err and len(found.err) < 400


def test_no_command_writes_an_alpha_that_the_reader_refuses(tmp_path: Path) -> None:
    """Baked into the factors where that helps, refused where it does not."""
    world = World(tmp_path)
    world.write_adapter(lora_alpha=10**30)
    assert world.run(*words_of(world, "rescale {adapter} 2 -o {out}")).code == 0
    assert world.run("inspect", world.out).code == 0
    other = tmp_path / "in" / "other"
    world.adapter.rename(other)
    world.adapter.mkdir()
    world.write_adapter(factors(Q.format(0)))
    line = "merge {other}:3 {adapter} -o {second} --threads 1"
    second = str(world.out.parent / "second")
    found = world.run(*words_of(world, line, other=str(other), second=second))
    assert found.code == 4 and "LT-413" in found.err, found
    assert not Path(second).exists()
