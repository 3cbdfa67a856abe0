"""mlx-lm's adapters: against numpy, PEFT, and mlx-lm itself where it is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.make import randn, save_adapter

DATA = Path(__file__).parents[1] / "data" / "llm"
Arrays = dict[str, np.ndarray]
SAMPLES = {"mlx_lora": "lora_linear", "mlx_dora": "lora_dora"}  # -> whose base and merge it has
PEFT = ["lora_linear", "lora_rslora", "lora_rank_alpha_pattern", "lora_dora",
        "lora_mixtral_v4style", "lora_qwen3moe_v4style"]  # fmt: skip


def stored(folder: Path) -> Arrays:
    return {k: v for f in sorted(folder.glob("*.safetensors"))
            for k, v in load_file(str(f)).items()}  # fmt: skip


def changes(folder: Path) -> Arrays:
    """Parameter -> ΔW."""
    return {module.name: module.delta().numpy() for module in lt.open(folder)}


def copied(name: str, folder: Path) -> Path:
    """A PEFT sample by itself."""
    folder.mkdir()
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(DATA / name / part, folder)
    return folder


def closed_form(before: Arrays, tensors: Arrays, scale: float) -> Arrays:
    """W' of every module in float64, from the tensors as mlx-lm has them."""
    found = {}
    for module in {key.rpartition(".")[0] for key in tensors}:
        a, b = (tensors[f"{module}.lora_{s}"].astype(np.float64) for s in "ab")
        weight = before[f"{module}.weight"].astype(np.float64) + scale * (a @ b).T
        lengths = tensors.get(f"{module}.m")
        if lengths is not None:
            weight *= (lengths / np.linalg.norm(weight, axis=1))[:, None]
        found[f"{module}.weight"] = weight
    return found


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_merges_to_the_formula_and_to_what_peft_merged(tmp_path: Path, name: str) -> None:
    base = DATA / SAMPLES[name] / "base"
    lt.merge([DATA / name], base=base, output=tmp_path / "out")
    before, got = stored(base), stored(tmp_path / "out")
    theirs = load_file(str(DATA / SAMPLES[name] / "merged.safetensors"))
    want = closed_form(before, stored(DATA / name), 2.0)
    for key, tensor in got.items():
        exact = want.get(key, before[key].astype(np.float64))
        assert np.abs(tensor - exact).max() <= 2.0**-22 * np.abs(exact).max(), key
        assert np.abs(tensor - theirs[key]).max() <= 2e-7, key


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_written_back_and_goes_to_peft_and_back(tmp_path: Path, name: str) -> None:
    """Bytes are copied, none is computed; mlx-lm itself writes tensors in any order."""
    (report,) = lt.rescale([DATA / name], 1, output=tmp_path / "again").adapters
    assert [x.verdict for x in report.loads_in if x.program == "mlx-lm"] == ["yes"]
    there = lt.convert([DATA / name], to="peft", output=tmp_path / "peft").adapters[0]
    lt.convert([tmp_path / "peft"], to="mlx", output=tmp_path / "back")
    old = stored(DATA / name)
    assert there.copied == len(old) and there.relative_error == 0
    for folder in ("again", "back"):
        new = stored(tmp_path / folder)
        assert new.keys() == old.keys()
        assert all(new[k].tobytes() == old[k].tobytes() for k in old)
    again, first = (json.loads((f / "adapter_config.json").read_text())
                    for f in (tmp_path / "again", DATA / name))  # fmt: skip
    assert again == first


@pytest.mark.parametrize("name", PEFT)
def test_peft_to_mlx_and_back_keeps_every_change(tmp_path: Path, name: str) -> None:
    adapter, base = copied(name, tmp_path / "adapter"), DATA / name / "base"
    lt.convert([adapter], to="mlx", output=tmp_path / "mlx", base=base)
    lt.convert([tmp_path / "mlx"], to="peft", output=tmp_path / "back")
    merged = []
    for number, one in enumerate((adapter, tmp_path / "mlx", tmp_path / "back")):
        lt.merge([one], base=base, output=tmp_path / f"out{number}")
        merged.append(stored(tmp_path / f"out{number}"))
    for other in merged[1:]:
        assert all(np.abs(other[k] - merged[0][k]).max() <= 1e-6 for k in merged[0])
    assert any(not np.array_equal(merged[0][k], t) for k, t in stored(base).items())


@pytest.mark.parametrize("table", ["model.embed_tokens", "transformer.wte", "transformer.wpe",
                                   "bert.embeddings.word_embeddings"])  # fmt: skip
def test_an_embedding_stays_one(table: str, tmp_path: Path) -> None:
    """mlx-lm's LoRAEmbedding has the factors of any layer: what it is the name tells."""
    A, B = randn(2, 9, seed=1), randn(5, 2, seed=2)
    tensors = {f"{table}.lora_embedding_A": A, f"{table}.lora_embedding_B": B}
    save_adapter(tmp_path / "a", {}, alpha=3, r=2, extra=tensors, target_modules=[table])
    lt.convert([tmp_path / "a"], to="mlx", output=tmp_path / "mlx")
    lt.convert([tmp_path / "mlx"], to="peft", output=tmp_path / "back")
    got = load_file(str(tmp_path / "back" / "adapter_model.safetensors"))
    scale = open_adapter(tmp_path / "back").specs[0].scaling
    change = scale * got[f"base_model.model.{table}.lora_embedding_B"] @ got[
        f"base_model.model.{table}.lora_embedding_A"]  # fmt: skip
    assert np.abs(change - 1.5 * (B @ A).numpy()).max() <= 1e-6


def test_ranks_and_scalings_become_one(tmp_path: Path) -> None:
    factors = {
        f"model.layers.{n}.self_attn.q_proj": (randn(r, 12, seed=n), randn(8, r, seed=9 + n))
        for n, r in ((0, 2), (1, 5))
    }
    adapter = save_adapter(
        tmp_path / "a", factors, r=2, alpha=3, rank_pattern={r"layers\.1\..*": 5},
        alpha_pattern={r"layers\.1\..*": 4},
    )  # fmt: skip
    lt.convert([adapter], to="mlx", output=tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    parameters = config["lora_parameters"]
    assert parameters["rank"] == 5 and parameters["keys"] == ["self_attn.q_proj"]
    for module in lt.open(tmp_path / "mlx"):
        A, B = factors[module.name.removesuffix(".weight")]
        want = (3 / 2 if len(A) == 2 else 4 / 5) * B.double() @ A.double()
        assert float((module.delta() - want).abs().max()) <= 1e-6
    plan = lt.convert([adapter], to="mlx", output=tmp_path / "dry", dry_run=True)
    assert plan.adapters[0].output_bytes == sum(
        f.stat().st_size for f in (tmp_path / "mlx").glob("*.safetensors"))  # fmt: skip


def test_experts_lie_in_one_module(tmp_path: Path) -> None:
    adapter = copied("lora_mixtral_v4style", tmp_path / "adapter")
    lt.convert([adapter], to="mlx", output=tmp_path / "mlx")
    tensors, old = stored(tmp_path / "mlx"), stored(adapter)
    (name,) = [k for k in tensors if "layers.0" in k and k.endswith("switch_mlp.up_proj.lora_b")]
    count = tensors[name].shape[0]
    for number in range(count):
        (key,) = [k for k in old if f"layers.0.block_sparse_moe.experts.{number}.w3.lora_B" in k]
        assert np.array_equal(tensors[name][number], old[key])
    assert not any("experts" in k for k in tensors)


@pytest.mark.parametrize("factor", [0.3, -2.0])
@pytest.mark.parametrize("name", SAMPLES)
def test_it_is_rescaled_in_its_scale_or_its_factors(
    tmp_path: Path, name: str, factor: float
) -> None:
    if name == "mlx_dora":
        with pytest.raises(lt.LoratoolError) as caught:
            lt.rescale([DATA / name], factor, output=tmp_path / "out")
        assert caught.value.code == "LT-460"
        return
    lt.rescale([DATA / name], factor, output=tmp_path / "out")
    lt.rescale([DATA / name], 1, only=["q_proj=3"], output=tmp_path / "part")
    old, new, part = (changes(f) for f in (DATA / name, tmp_path / "out", tmp_path / "part"))
    for key, delta in old.items():
        assert np.abs(new[key] - factor * delta).max() <= 1e-6
        assert np.abs(part[key] - (3 if "q_proj" in key else 1) * delta).max() <= 1e-6


def test_it_is_compressed_and_added_in_its_own_form(tmp_path: Path) -> None:
    sample = DATA / "mlx_lora"
    lt.compress([sample], energy=0.5, output=tmp_path / "small")
    lt.merge([sample, sample], output=tmp_path / "twice")
    twice = changes(tmp_path / "twice")
    assert all(np.abs(twice[k] - 2 * d).max() <= 1e-6 for k, d in changes(sample).items())
    for folder in ("small", "twice"):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert "peft_type" not in config and len(changes(tmp_path / folder)) == 14


def test_the_file_takes_the_configuration_beside_it() -> None:
    folder = DATA / "mlx_lora"
    alone, whole = changes(folder / "adapters.safetensors"), changes(folder)
    assert alone.keys() == whole.keys()
    assert all(np.array_equal(alone[name], whole[name]) for name in whole)


def test_without_a_configuration_the_scale_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "adapters.safetensors"
    shutil.copy(DATA / "mlx_lora" / "adapters.safetensors", path)
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(path)
    assert caught.value.code == "LT-280"
    assert open_adapter(path, lt_read(alpha=8.0)).specs[0].scaling == 2.0


def lt_read(**values: Any) -> Any:
    from loratool.options.groups import Read

    return Read(**values)


@pytest.mark.parametrize(
    ("change", "code"),
    [({"fine_tune_type": "full"}, "LT-401"), ({"lora_parameters": {"rank": 4}}, "LT-361"),
     ({"lora_parameters": {"scale": "x"}}, "LT-361"), ({"fine_tune_type": 3}, "LT-361"),
     ({"lora_parameters": {"scale": 2, "keys": [{"q_proj": 1}]}}, "LT-361")],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(tmp_path: Path, change: Any, code: str) -> None:
    shutil.copytree(DATA / "mlx_lora", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(tmp_path / "a")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [("q_proj.lora_b", None, "LT-362"), ("other.m", np.ones(4, "f4"), "LT-362"),
     ("q_proj.lora_b", np.zeros((3, 16), "f4"), "LT-363"),
     ("q_proj.lora_a", np.zeros(4, "f4"), "LT-366"),
     ("q_proj.lora_x", np.zeros(4, "f4"), "LT-415")],
)  # fmt: skip
def test_damaged_tensors_are_refused(
    tmp_path: Path, key: str, value: np.ndarray | None, code: str
) -> None:
    shutil.copytree(DATA / "mlx_lora", tmp_path / "a")
    path, name = tmp_path / "a" / "adapters.safetensors", f"model.layers.0.self_attn.{key}"
    tensors = {k: v for k, v in load_file(str(path)).items() if k != name}
    save_file(tensors if value is None else {**tensors, name: value}, str(path))
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(tmp_path / "a")
    assert caught.value.code == code


@pytest.mark.parametrize(
    "name", ["lora_conv", "lora_modules_to_save", "lora_target_params_mixtral"]
)
def test_what_mlx_has_no_place_for_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(lt.LoratoolError) as caught:
        lt.convert([copied(name, tmp_path / "a")], to="mlx", output=tmp_path / "out")
    assert caught.value.code == "LT-494" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lora_linear", "lora_rank_alpha_pattern", "lora_dora"])
def test_mlx_itself_fuses_our_file_to_our_merge(tmp_path: Path, name: str) -> None:
    pytest.importorskip("mlx_lm")
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    base, adapter = DATA / name / "base", copied(name, tmp_path / "adapter")
    lt.convert([adapter], to="mlx", output=tmp_path / "mlx")
    lt.merge([adapter], base=base, output=tmp_path / "merged")
    model = load_adapters(load_model(base)[0], str(tmp_path / "mlx"))
    fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    got = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    for key, tensor in stored(tmp_path / "merged").items():
        assert np.abs(got[key] - tensor).max() <= 2e-7, key


def test_the_text_of_a_model_of_images_has_names_that_mlx_finds(tmp_path: Path) -> None:
    """``model.language_model`` of transformers 5 is ``language_model.model`` there."""
    module = "layers.0.self_attn.q_proj"
    a = save_adapter(tmp_path / "a", {
        f"model.language_model.{module}": (randn(2, 16, seed=1), randn(16, 2, seed=2)),
        "lm_head": (randn(2, 16, seed=3), randn(40, 2, seed=4)),
    })  # fmt: skip
    lt.convert([a], to="mlx", output=tmp_path / "mlx")
    names = {name.rpartition(".")[0] for name in load_file(tmp_path / "mlx/adapters.safetensors")}
    assert names == {f"language_model.model.{module}", "language_model.lm_head"}
    pytest.importorskip("mlx_lm")
    from mlx.utils import tree_flatten
    from mlx_lm.models import mistral3
    from mlx_lm.tuner.utils import load_adapters

    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "vocab_size": 40,
            "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False}  # fmt: skip
    args = mistral3.ModelArgs.from_dict({"model_type": "mistral3", "text_config": text})
    model = load_adapters(mistral3.Model(args), str(tmp_path / "mlx"))
    found = dict(tree_flatten(model.parameters()))
    for key, value in load_file(tmp_path / "mlx/adapters.safetensors").items():
        assert np.array_equal(np.array(found[key]), value), key


Q = "model.layers.1.self_attn.q_proj"
FAULTS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...] | None], str]] = {
    "incomplete": ({"num_layers": None}, {}, "no"),
    "odd-names": ({}, {f"{Q}.scales": (4,)}, "no"),
    "outside-keys": ({"keys": ["mlp.down_proj"]}, {}, "no"),
    "early-layers": ({"num_layers": 1}, {}, "no"),
    "ranks": ({}, {f"{Q}.lora_a": (16, 3), f"{Q}.lora_b": (3, 16)}, "no"),
    "lengths": ({}, {f"{Q}.m": (16,)}, "no"),
    "no-lengths": ({"fine_tune_type": "dora"}, {}, "wrong"),
    "halves": ({}, {f"{Q}.lora_a": None}, "wrong"),
}


@pytest.mark.parametrize("rule", FAULTS)
def test_what_mlx_makes_of_its_own_folder(tmp_path: Path, rule: str) -> None:
    """A folder with a fault and one without; mlx-lm itself agrees, where it is."""
    changes, tensors, verdict = FAULTS[rule]
    folder = tmp_path / "a"
    folder.mkdir()
    for name in ("adapter_config.json", "adapters.safetensors"):
        shutil.copy(DATA / "mlx_lora" / name, folder)
    assert lt.check(folder, program="mlx").verdict == "yes"
    config = json.loads((folder / "adapter_config.json").read_text())
    inner = {"lora_parameters": config["lora_parameters"] | {
        key: value for key, value in changes.items() if key == "keys"}}  # fmt: skip
    config |= inner | {key: value for key, value in changes.items() if key != "keys"}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = folder / "adapters.safetensors"
    found = load_file(str(file))
    found |= {k: np.ones(shape, "f4") for k, shape in tensors.items() if shape is not None}
    found = {k: v for k, v in found.items() if tensors.get(k, ()) is not None}
    file.unlink()
    save_file(found, str(file))
    report = lt.check(folder, program="mlx")
    assert report.verdict == verdict and {f.rule for f in report.findings} == {rule}
    pytest.importorskip("mlx_lm")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model = load_model(DATA / "lora_linear" / "base")[0]
    if verdict == "no":
        with pytest.raises((ValueError, AttributeError, KeyError)):
            load_adapters(model, str(folder))
    else:
        load_adapters(model, str(folder))
