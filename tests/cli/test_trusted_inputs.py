"""``--max-header`` and ``--allow-pickle`` where adapters are read alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.errors import LoratoolError
from tests.oracle.adapter_algebra import LLM

from .conftest import Run

PLAIN = str(LLM / "lora_linear")


@pytest.fixture
def pickle(tmp_path: Path) -> str:
    """An adapter folder whose weights are a pickle, nothing else in it."""
    (tmp_path / "old").mkdir()
    for name in ("adapter_config.json", "adapter_model.bin"):
        shutil.copy(LLM / "lora_linear_bin" / name, tmp_path / "old" / name)
    return str(tmp_path / "old")


@pytest.mark.parametrize(
    "call",
    [
        lambda tmp, **o: lt.rescale([PLAIN], 2, output=tmp / "o", **o),
        lambda tmp, **o: lt.compare([PLAIN, PLAIN], **o),
        lambda tmp, **o: lt.open(PLAIN, **o),
        lambda tmp, **o: lt.inspect(PLAIN, risk=True, **o),
    ],
    ids=["rescale", "compare", "open", "inspect --risk"],
)
def test_max_header(call: Callable[..., object], tmp_path: Path) -> None:
    call(tmp_path, max_header="1MB")
    with pytest.raises(LoratoolError) as caught:
        call(tmp_path / "no", max_header=64)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "no").exists()


def test_pickles_are_opened_only_by_name(pickle: str, tmp_path: Path) -> None:
    """The same ΔW as from a plain file of the same tensors."""
    for call in (lambda: lt.open(pickle), lambda: lt.compare([pickle, PLAIN]),
                 lambda: lt.rescale([pickle], 2, output=tmp_path / "x")):  # fmt: skip
        with pytest.raises(LoratoolError) as caught:
            call()
        assert caught.value.exit_code == 9
    with lt.open(pickle, allow_pickle=True) as adapter:
        want = {m.name: m.delta() for m in adapter}
    assert want and all(bool(d.any()) for d in want.values())
    lt.rescale([pickle], -3, output=tmp_path / "minus", allow_pickle=True)
    with lt.open(tmp_path / "minus") as adapter:
        got = {m.name: m.delta() for m in adapter}
    for name, D in want.items():
        assert float((got[name] + 3 * D).abs().max()) <= 2.0**-23 * float(3 * D.abs().max())
    found = lt.compare([pickle, str(tmp_path / "minus")], allow_pickle=True)
    assert found.matrix[0][1] == pytest.approx(-1, abs=1e-12)
    assert not torch.isnan(torch.tensor(found.norms)).any()


def test_command_line_has_them(run: Run, pickle: str, tmp_path: Path) -> None:
    done = run("rescale", pickle, "0.5", "--allow-pickle", "-o", tmp_path / "half")
    assert done.code == 0, done.err
    found = run("compare", pickle, tmp_path / "half", "--allow-pickle", "--max-header", "1MB")
    assert found.code == 0, found.err
    assert run("compare", PLAIN, PLAIN, "--max-header", "64").code == 3
    assert run("rescale", pickle, "0.5", "-o", tmp_path / "no").code == 9
