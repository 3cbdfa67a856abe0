"""`merge` goes into a base, `combine` makes one adapter of several; `merge` still does both."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import loratool as lt
from loratool.errors import LoratoolError


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lt.demo(tmp_path / "toy")
    monkeypatch.chdir(tmp_path / "toy")
    return tmp_path / "toy"


def test_merge_without_a_base_combines_and_says_so(toy: Path) -> None:
    combined = lt.combine(["style:0.5", "sql"], output="one")
    merged = lt.merge(["style:0.5", "sql"], output="two")
    assert type(merged) is type(combined)
    assert [n for n in merged.notes if n not in combined.notes] == [
        "no base to merge into: the result is an adapter, as of loratool.combine"
    ]
    for name in ("adapter_model.safetensors", "adapter_config.json", "loratool.json"):
        assert (toy / "one" / name).read_bytes() == (toy / "two" / name).read_bytes()


def test_combine_has_no_options_of_a_base(toy: Path) -> None:
    assert (
        not {"save_undo", "untie", "shard_size"} & inspect.signature(lt.combine).parameters.keys()
    )
    with pytest.raises(TypeError, match="has no option 'untie'"):
        lt.combine(["style", "sql"], output="one", untie=True)  # type: ignore[call-arg]
    with pytest.raises(LoratoolError, match=r"LT-286.*--untie, --save-undo|--save-undo, --untie"):
        lt.merge(["style", "sql"], output="one", untie=True, save_undo="undo.safetensors")
