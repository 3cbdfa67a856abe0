"""Adapter algebra from the command line on sample files: the numbers in float64, and its docs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import DATA

from .conftest import Run

LLM = DATA / "llm"
STYLE, CHAT, WIDE = (LLM / n for n in ("lora_linear", "lora_rslora", "lora_rank_alpha_pattern"))
BASE = STYLE / "base"
OVERVIEW = (Path(__file__).parents[2] / "docs" / "overview.md").read_text()
EPS = 2.0**-24
WEIGHTS = """\
# the first expression that is found counts
'layers\\.0\\.self_attn': [0.5, -1.5]
'mlp': 0
q_proj: 2
"""
Arrays = dict[str, np.ndarray]


def scaling_of(config: Mapping[str, object], module: str) -> float:
    def first(key: str, default: object) -> float:
        patterns: dict[str, float] = config.get(key) or {}  # type: ignore[assignment]
        hits = [v for k, v in patterns.items() if re.search(rf"(.*\.)?({k})$", module)]
        return float([*hits, default][0])  # type: ignore[arg-type]

    rank = first("rank_pattern", config["r"])
    return first("alpha_pattern", config["lora_alpha"]) / (
        rank**0.5 if config["use_rslora"] else rank
    )


def deltas(folder: Path) -> Arrays:
    """ΔW of a plain LoRA folder, from the bytes of its files."""
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for key, A in tensors.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = tensors[key.replace("lora_A", "lora_B")].astype(float)
            found[module] = scaling_of(config, module) * B @ A.astype(float)
    return found


def module_weight(module: str, position: int) -> float:
    """What `WEIGHTS` says."""
    if "layers.0.self_attn" in module:
        return (0.5, -1.5)[position]
    return 0.0 if "mlp" in module else 2.0 if "q_proj" in module else 1.0


def mixed(own: tuple[float, float]) -> tuple[Arrays, dict[str, float]]:
    """Σ weight · module weight · ΔW of `STYLE` and `CHAT`, and the size of the terms."""
    total: Arrays = {}
    size: dict[str, float] = {}
    for position, folder in enumerate((STYLE, CHAT)):
        for module, delta in deltas(folder).items():
            term = own[position] * module_weight(module, position) * delta
            total[module] = total.get(module, 0) + term
            size[module] = size.get(module, 0) + float(np.linalg.norm(term))
    return total, size


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.yaml"
    path.write_text(WEIGHTS)
    return path


def test_module_weights_without_a_base(run: Run, weights: Path, tmp_path: Path) -> None:
    found = run("merge", f"{STYLE}:0.8", CHAT, "--module-weights", weights, "-o", tmp_path / "out")
    assert found.code == 0, found.err
    got, (want, size) = deltas(tmp_path / "out"), mixed((0.8, 1))
    assert {k for k, v in want.items() if v.any()} <= set(got) <= set(want)
    for module, value in want.items():
        error = np.linalg.norm(got.get(module, 0 * value) - value)
        assert error <= 2 * EPS * size[module], module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_module_weights_into_a_base(run: Run, weights: Path, tmp_path: Path, dtype: str) -> None:
    """W + Σ weight · module weight · ΔW in float64, rounded once; the rest copied; verified."""
    out = tmp_path / "out"
    found = run("merge", f"{STYLE}:0.8", CHAT, "--module-weights", weights, "--base", BASE,
                "--dtype", dtype, "-o", out)  # fmt: skip
    assert found.code == 0, found.err
    base, (want, _) = load_file(str(BASE / "model.safetensors")), mixed((0.8, 1))
    got = _read(out / "model.safetensors")
    assert got.keys() == base.keys()
    changed = 0
    for name, W in base.items():
        delta = want.get(name.removesuffix(".weight"), np.zeros(1))
        exact = W.astype(float) + delta
        changed += bool(delta.any())
        if dtype == "float32" and not delta.any():
            assert np.array_equal(got[name], W), name
        # to nearest: half a spacing of the result; sums in float64 (float32 for bfloat16)
        half = (EPS + 2.0**-45) * np.abs(exact)
        if dtype == "bfloat16":
            half = 2.0**-8 * np.abs(exact) + 2.0**-22 * np.abs(exact).max()
        assert (np.abs(got[name] - exact) <= half).all(), name
    assert changed == 8  # attention of two layers
    checked = run("verify", out, "--base", BASE, "--adapter", f"{STYLE}:0.8", "--adapter", CHAT,
                  "--json")  # fmt: skip
    assert checked.code == 0 and checked.json["verdict"] == "identical"


def _read(path: Path) -> Arrays:
    import torch
    from safetensors.torch import load_file as load

    return {k: v.to(torch.float64).numpy() for k, v in load(str(path)).items()}


def test_element_wise_with_module_weights_into_a_base(
    run: Run, weights: Path, tmp_path: Path
) -> None:
    """TIES at density 1 of two adapters: the mean of those that agree with the weighted sum."""
    out = tmp_path / "out"
    found = run("merge", STYLE, f"{CHAT}:0.75", "--module-weights", weights, "--base", BASE,
                "--method", "ties", "--param", "density=1", "-o", out)  # fmt: skip
    assert found.code == 0, found.err
    base, got = _read(BASE / "model.safetensors"), _read(out / "model.safetensors")
    one, two = deltas(STYLE), deltas(CHAT)
    for module in one:
        terms = [one[module] * module_weight(module, 0)]
        if module in two:
            terms.append(0.75 * two[module] * module_weight(module, 1))
        stack = np.stack(terms)
        agree = (np.sign(stack) == np.sign(stack.sum(0))) & (stack != 0)
        mean = (stack * agree).sum(0) / np.maximum(agree.sum(0), 1)
        exact = base[f"{module}.weight"] + mean
        assert np.abs(got[f"{module}.weight"] - exact).max() <= 2 * EPS * np.abs(exact).max()


def test_a_recipe_gives_the_numbers(run: Run, weights: Path, tmp_path: Path) -> None:
    """0.5·(A with module weights + B), then into the base, in two steps of one file."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""\
steps:
  - merge:
      adapters: ["{STYLE}:0.8", "{CHAT}"]
      module-weights: "{weights}"
      output: mixed
  - rescale: {{adapters: [mixed], factor: 0.5, output: softer}}
  - merge: {{adapters: [softer], base: "{BASE}", output: merged}}
""")
    found = run("run", recipe, "--json")
    assert found.code == 0, found.err
    assert [s["report"]["command"] for s in found.json["steps"]] == ["merge", "rescale", "merge"]
    want, _ = mixed((0.8, 1))
    base, got = _read(BASE / "model.safetensors"), _read(tmp_path / "merged/model.safetensors")
    for module, delta in want.items():
        exact = base[f"{module}.weight"] + 0.5 * delta
        assert np.abs(got[f"{module}.weight"] - exact).max() <= 4 * EPS * np.abs(exact).max()


@pytest.mark.parametrize("command", ["rescale", "compress"])
def test_many_results_in_one_folder(run: Run, tmp_path: Path, command: str) -> None:
    """``-o DIR/``: every adapter under its own name, with its own numbers."""
    words = {"rescale": ["-0.3"], "compress": ["--rank", "2"]}[command]
    folder = tmp_path / "all"
    found = run(command, STYLE, CHAT, WIDE, *words, "-o", f"{folder}/")
    assert found.code == 0, found.err
    assert {p.name for p in folder.iterdir()} == {p.name for p in (STYLE, CHAT, WIDE)}
    for source in (STYLE, CHAT, WIDE):
        before, after = deltas(source), deltas(folder / source.name)
        assert before.keys() == after.keys()
        for module, D in before.items():
            norm = float(np.linalg.norm(D))
            if command == "rescale":
                assert np.linalg.norm(after[module] + 0.3 * D) <= 2 * EPS * 0.3 * norm
            else:
                tail = float(np.linalg.norm(np.linalg.svd(D, compute_uv=False)[2:]))
                lost = float(np.linalg.norm(after[module] - D))
                assert abs(lost - tail) <= 8 * EPS * norm
                assert np.linalg.matrix_rank(after[module], 1e-5) <= 2


def test_the_matrix_of_many(run: Run) -> None:
    """Cosines over the union of modules; one that an adapter lacks counts as zero."""
    found = run("compare", STYLE, CHAT, WIDE, "--json")
    assert found.code == 0, found.err
    parts = [deltas(f) for f in (STYLE, CHAT, WIDE)]
    inner = [[sum(float((a[m] * b[m]).sum()) for m in a.keys() & b.keys()) for b in parts]
             for a in parts]  # fmt: skip
    norms = [inner[i][i] ** 0.5 for i in range(3)]
    assert found.json["norms"] == pytest.approx(norms, rel=1e-10)
    for i in range(3):
        for j in range(3):
            want = inner[i][j] / (norms[i] * norms[j])
            assert found.json["matrix"][i][j] == pytest.approx(want, abs=1e-10)
    text = run("compare", STYLE, CHAT, WIDE).out
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert f"{inner[i][j] / (norms[i] * norms[j]):+.3f}" in text


def test_risk_and_intruders(run: Run) -> None:
    """Statistics of ΔW; of W + ΔW the leading directions that W does not have."""
    found = run("inspect", STYLE, "--risk", "--base", BASE, "--json")
    assert found.code == 0, found.err
    base, want = _read(BASE / "model.safetensors"), deltas(STYLE)
    rows = {m["name"].removesuffix(".weight"): m for m in found.json["risk"]["modules"]}
    assert rows.keys() == want.keys()
    count = 0
    for module, D in want.items():
        row, sigma = rows[module], np.linalg.svd(D, compute_uv=False)[:4]
        p = sigma**2 / (sigma**2).sum()
        centred = D - D.mean()
        assert row["norm"] == pytest.approx(float(np.linalg.norm(D)), rel=1e-10)
        assert row["sigma_1"] == pytest.approx(float(sigma[0]), rel=1e-10)
        assert row["concentration"] == pytest.approx(float(p[0]), rel=1e-10)
        assert row["entropy"] == pytest.approx(float(-(p * np.log(p)).sum() / np.log(4)), rel=1e-8)
        kurtosis = float((centred**4).mean() / (centred**2).mean() ** 2)
        assert row["kurtosis"] == pytest.approx(kurtosis, rel=1e-9)
        W = base[f"{module}.weight"]
        before = np.linalg.svd(W, full_matrices=False)[0]
        after = np.linalg.svd(W + D, full_matrices=False)[0][:, :10]
        cosines = np.abs(after.T @ before).max(1)
        assert row["cosines"] == pytest.approx(cosines.tolist(), abs=1e-9)
        assert row["intruders"] == int((cosines < 0.5).sum())
        count += row["intruders"]
    assert count > 0
    text = run("inspect", STYLE, "--risk", "--base", BASE).out
    assert re.search(rf"\b{count}\b", text)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("merge", "--module-weights FILE"), ("run", "run RECIPE.yaml"), ("rescale", "-o DIR/"),
        ("compress", "-o DIR/"), ("compare", "the matrix"), ("inspect", "--risk"),
        ("inspect", "intruder dimensions"), ("rescale", "--intruders"),
    ],
)  # fmt: skip
def test_the_overview_has_a_place_for_each(command: str, words: str) -> None:
    entries = [e for e in re.split(r"\n- ", OVERVIEW)[1:] if e.lstrip("`").startswith(command)]
    assert any(words in " ".join(e.split()) for e in entries), (command, words)
