"""What planning does not do, however large the model; on small ones of benchmarks/scale.py."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.engine import grid, reads
from loratool.store.reader import FileReader

SCALE = Path(__file__).parents[2] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale() -> Any:
    spec = spec_from_file_location("scale", SCALE)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes read of each tensor."""
    found: dict[str, int] = {}
    read = FileReader.read_into

    def note(self: FileReader, ref: Any, start: int, buffer: memoryview) -> None:
        found[ref.name] = found.get(ref.name, 0) + len(buffer)
        read(self, ref, start, buffer)

    monkeypatch.setattr(FileReader, "read_into", note)
    return found


def plan(top: Path, adapters: list[str]) -> Any:
    return lt.merge([top / a for a in adapters], base=top / "base", output=top / "out",
                    dry_run=True, threads=1)  # fmt: skip


def test_a_huge_dense_model(scale: Any, tmp_path: Path, looked: dict[str, int]) -> None:
    """Three layers of the 405B: of each changed tensor three blocks are read, of others nothing."""
    found = plan(tmp_path, scale.make_405b(tmp_path, 3))
    assert (found.changed, found.copied) == (21, 9)
    weights = {name: size for name, size in looked.items() if not name.startswith("base_model")}
    assert len(weights) == 21
    assert max(weights.values()) <= 3 * 2 * max(grid.CPU_ELEMENTS, 16 * 53248)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 10


def test_a_mixture_of_many_experts(
    scale: Any, tmp_path: Path, looked: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers with 384 experts; a dry run looks into so many tensors, and says what it is."""
    monkeypatch.setattr(reads, "MOST_SAMPLED", 10)
    found = plan(tmp_path, scale.make_1t_experts(tmp_path, 2))
    assert found.changed == 8 + 5 + 3 + 3 * 384
    assert len([name for name in looked if not name.startswith("base_model")]) == 10
    assert "predicted from 10 of 1,168 tensors" in " ".join(found.notes)
    assert len(found.modules) <= 10 and len(found.plan["steps"]) == found.changed + found.copied
    json.dumps(found.to_json())


def test_many_adapters(
    scale: Any, tmp_path: Path, looked: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many adapters the factors of a few modules are loaded, not those of all."""
    monkeypatch.setattr(reads, "MOST_CHANGES", 4)
    monkeypatch.setattr(reads, "FEWEST_SAMPLED", 2)
    linears = scale.llama(tmp_path / "base", 2, 64, 128, 64, 2)
    for name in ("a", "b", "c"):
        scale.write_adapter(tmp_path / name, linears, 4, {n.rpartition(".")[2] for n in linears})
    found = plan(tmp_path, ["a", "b", "c"])
    assert found.changed == 14
    loaded = {n.rpartition(".lora")[0] for n in looked if n.startswith("base_model")}
    # the first module's lora_B says that the adapter is not all zeros
    assert len(loaded) <= 3
    assert len([name for name in looked if not name.startswith("base_model")]) == 2
