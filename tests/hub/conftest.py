"""The test Hub, also for a client in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import TestHub
from tests.make import randn, random_factors, save_adapter, save_checkpoint

TOKEN = "hf_tokenofmetokenofmetokenofme"


@pytest.fixture(autouse=True)
def no_token_in_files(tmp_path: Path) -> Iterator[None]:
    """After every test the token is in no file, but in ``style``, where some tests plant it."""
    yield
    for path in tmp_path.rglob("*"):
        if "style" not in path.parts and path.is_file() and path.stat().st_size < 20_000_000:
            assert TOKEN.encode() not in path.read_bytes(), path


SHAPES = {"model.layers.0.q_proj": (64, 48), "model.layers.1.q_proj": (64, 48)}
OTHER: dict[str, bytes] = {
    "pytorch_model.bin": b"\x80\x02" + b"x" * 2000, "model.gguf": b"GGUF" + b"x" * 2000,
    "onnx/model.onnx": b"x" * 2000, "original/consolidated.safetensors": b"x" * 2000,
    "optimizer.pt": b"x" * 2000, "README.md": b"# base\n", "run.py": b"import os\n",
    "model.fp16.safetensors": b"x" * 2000,
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


@pytest.fixture
def served() -> Iterator[TestHub]:
    with TestHub() as hub:
        yield hub


@pytest.fixture
def near(served: TestHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestHub]:
    """The same, with what the client read from the environment at import put right."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield served
    close_session()
    assert served.state.tokens_on_cdn == 0


@pytest.fixture
def models(near: TestHub, tmp_path: Path) -> TestHub:
    tensors = {f"{n}.weight": randn(*s, seed=3).bfloat16() for n, s in SHAPES.items()}
    tensors["model.norm.weight"] = randn(48, seed=5).bfloat16()
    factors = random_factors(SHAPES, rank=4, seed=9)
    moved = {
        k: (v.float() + factors[k[:-7]][1] @ factors[k[:-7]][0]).bfloat16()
        if k[:-7] in factors else v
        for k, v in tensors.items()
    }  # fmt: skip
    for name, part in (("base", tensors), ("tuned", moved)):
        folder = save_checkpoint(tmp_path / name, part, shards=2)
        (folder / "tokenizer.json").write_text("{}")
        near.state.add_repo(f"me/{name}", {**contents(folder), **OTHER})
    style = save_adapter(tmp_path / "style", factors, base_model_name_or_path="me/base")
    near.state.add_repo("me/style", {**contents(style), "optimizer.pt": b"x", "run.py": b"x"})
    return near


@pytest.fixture
def several(models: TestHub, tmp_path: Path) -> dict[str, bytes]:
    """Two adapters in folders, one of them deep, and what is none."""
    style = contents(tmp_path / "style")
    tree = {f"{place}/{n}": d for place in ("sql", "art/ink") for n, d in style.items()}
    tree |= {"README.md": b"# all\n", "sql/optimizer.pt": b"x", "notes/x.txt": b"x",
             "half/adapter_config.json": b"{}"}  # fmt: skip
    models.state.add_repo("me/loras", dict(tree))
    return tree
