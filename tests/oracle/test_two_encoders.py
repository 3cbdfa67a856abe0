"""Two text encoders of one pipeline, whose tensors have the same names in their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt

Q = "text_model.encoder.layers.0.self_attn.q_proj"
SIZES = {"text_encoder": 8, "text_encoder_2": 24}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``base``, a pipeline; ``a.safetensors``, which changes both encoders."""
    monkeypatch.chdir(tmp_path)
    rng, factors = np.random.default_rng(3), {}
    for n, (part, size) in enumerate(SIZES.items(), 1):
        Path("base", part).mkdir(parents=True)
        weight = rng.normal(size=(size, size)).astype(np.float16)
        beside = rng.normal(size=size).astype(np.float16)
        save_file({f"{Q}.weight": weight, f"{Q}.bias": beside}, f"base/{part}/model.safetensors")
        Path("base", part, "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
        module = f"lora_te{n}_{Q.replace('.', '_')}"
        factors |= {f"{module}.lora_down.weight": rng.normal(size=(2, size)).astype(np.float32),
                    f"{module}.lora_up.weight": rng.normal(size=(size, 2)).astype(np.float32),
                    f"{module}.alpha": np.array(2 * n, np.float32)}  # fmt: skip
    index = {part: ["transformers", "CLIPTextModel"] for part in SIZES}
    index = {"_class_name": "StableDiffusionXLPipeline", **index}  # type: ignore[dict-item]
    Path("base/model_index.json").write_text(json.dumps(index))
    save_file(factors, "a.safetensors")
    return tmp_path


def squares(place: Path) -> dict[str, tuple[float, float]]:
    """Module -> squares of its change and of its weight, in float64."""
    factors, found = load_file("a.safetensors"), {}
    for n, part in enumerate(SIZES, 1):
        module = f"lora_te{n}_{Q.replace('.', '_')}"
        up, down = (factors[f"{module}.lora_{k}.weight"].astype(np.float64) for k in ("up", "down"))
        weight = load_file(f"base/{part}/model.safetensors")[f"{Q}.weight"].astype(np.float64)
        change = (up @ down) * n  # alpha / rank
        found[f"{part}.{Q}.weight"] = float((change**2).sum()), float((weight**2).sum())
    return found


@pytest.mark.parametrize("dry_run", [False, True])
def test_each_has_its_name_and_its_share(dry_run: bool, place: Path) -> None:
    report = lt.merge(["a.safetensors"], base="base", output="out", dry_run=dry_run)
    want = squares(place)
    assert {m.name for m in report.modules} == set(want)
    for module in report.modules:
        change, weight = want[module.name]
        assert module.rho == pytest.approx((change / weight) ** 0.5, rel=1e-3)
    changes, weights = (sum(pair) for pair in zip(*want.values(), strict=True))
    assert report.total.rho == pytest.approx((changes / weights) ** 0.5, rel=1e-3)


def test_what_differs_is_named(place: Path) -> None:
    lt.merge(["a.safetensors"], base="base", output="out")
    path = "out/text_encoder_2/model.safetensors"
    tensors = {k: v.copy() for k, v in load_file(path).items()}
    tensors[f"{Q}.weight"][0, 0] += 1
    save_file(tensors, path)
    report = lt.verify("out", base="base", adapters=["a.safetensors"])
    assert [t.name for t in report.differing] == [f"text_encoder_2.{Q}.weight"]


def test_all_of_it_is_counted_when_it_is_taken_out(place: Path) -> None:
    lt.merge(["a.safetensors"], base="base", output="out", save_undo="u.safetensors")
    report = lt.subtract(["a.safetensors"], merged="out", output="back", undo="u.safetensors")
    assert (report.restored, report.changed, report.copied, report.kept) == (2, 2, 2, 2)
    for part in SIZES:
        made, base = (
            {k: v.tobytes() for k, v in load_file(f"{top}/{part}/model.safetensors").items()}
            for top in ("back", "base")
        )
        assert made == base
