"""PEFT's methods that depend on W, or name places in it: against numpy, PEFT's merges and PEFT."""

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
from tests.oracle.turned_files import peft as formula

LLM = Path(__file__).parents[1] / "data" / "llm"
DEPENDENT = ["ia3", "ia3_gpt2", "oft", "oft_share", "oft_conv", "boft", "hra", "hira", "miss_bat"]
ADDITIVE = ["fourierft", "c3a", "randlora", "shira"]
Arrays = dict[str, np.ndarray]
SUFFIXES = ("ia3_l", "oft_R.weight", "boft_R", "boft_s", "hra_u", "hira_A", "hira_B", "miss_block",
            "fourierft_spectrum", "c3a_kernel", "randlora_lambda", "randlora_gamma", "randlora_A",
            "randlora_B", "shira_weight", "shira_indices")  # fmt: skip


def sample(name: str, folder: Path) -> tuple[Path, Path]:
    """(adapter alone, base)."""
    here, adapter = LLM / name, folder / "adapter"
    adapter.mkdir(exist_ok=True)
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(here / part, adapter)
    return adapter, here / "base"


def stored(path: Path) -> Arrays:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {k: v for f in files for k, v in load_file(str(f)).items()}


def modules(adapter: Path) -> dict[str, Arrays]:
    found: dict[str, Arrays] = {}
    for key, tensor in load_file(str(adapter / "adapter_model.safetensors")).items():
        suffix = next(s for s in SUFFIXES if key.endswith(f".{s}"))
        module = key.removeprefix("base_model.").removesuffix(suffix).strip(".")
        if module:  # RandLoRA's matrices are there once more for the whole model
            found.setdefault(module.removeprefix("model."), {})[suffix] = tensor
    return found


def wanted(adapter: Path, base: Arrays) -> Arrays:
    config = json.loads((adapter / "adapter_config.json").read_text())
    made: Arrays = {}
    for module, fields in modules(adapter).items():
        key = next(k for k in base if k == f"{module}.weight" or (k == f"{module[12:]}.weight"
                   and module.startswith("transformer.")))  # fmt: skip
        made[key] = formula(config["peft_type"], fields, base[key], config)
        bias = key.replace(".weight", ".bias")
        if "ia3_l" in fields and fields["ia3_l"].shape[1] == 1 and bias in base:
            made[bias] = base[bias] * fields["ia3_l"].astype(np.float64).ravel()
    return made


@pytest.mark.parametrize("name", [*DEPENDENT, *ADDITIVE])
def test_a_sample_merges_to_the_formula_and_to_what_peft_made(tmp_path: Path, name: str) -> None:
    adapter, base = sample(name, tmp_path)
    lt.merge([adapter], base=base, output=tmp_path / "out")
    before, got, theirs = (
        stored(base),
        stored(tmp_path / "out"),
        stored(LLM / name / "merged.safetensors"),
    )
    changes = wanted(adapter, before)
    for key, exact in changes.items():
        assert np.abs(exact - before[key]).max() > 1e-3, key
        half = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) / 2
        assert (np.abs(got[key] - exact) <= half + 2.0**-40).all(), key
    assert all(got[k].tobytes() == v.tobytes() for k, v in before.items() if k not in changes)
    spelled = {k.removeprefix("transformer."): v for k, v in theirs.items()} | theirs
    for key in changes:  # PEFT sums in float32
        assert np.abs(got[key] - spelled[key]).max() <= 1e-6, key


@pytest.mark.parametrize("name", [*DEPENDENT, *ADDITIVE, "ln_tuning"])
def test_a_sample_is_read_whole_and_written_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    adapter, _ = sample(name, tmp_path)
    lt.rescale([adapter], 1, output=tmp_path / "again", provenance=False)
    one, other = (p / "adapter_model.safetensors" for p in (tmp_path / "again", adapter))
    assert one.read_bytes() == other.read_bytes()
    one, other = (p / "adapter_config.json" for p in (tmp_path / "again", adapter))
    assert json.loads(one.read_text()) == json.loads(other.read_text())
    found = open_adapter(adapter)
    assert not found.warnings, found.warnings


def test_ln_tuning_replaces_parameters_of_norms(tmp_path: Path) -> None:
    adapter, base = sample("ln_tuning", tmp_path)
    lt.merge([adapter], base=base, output=tmp_path / "out")
    got, theirs = stored(tmp_path / "out"), stored(LLM / "ln_tuning" / "merged.safetensors")
    assert all(got[k].tobytes() == v.tobytes() for k, v in theirs.items())
    assert any(got[k].tobytes() != v.tobytes() for k, v in stored(base).items())


@pytest.mark.parametrize("name", ADDITIVE)
def test_a_change_that_is_fixed_becomes_a_lora_at_the_error_that_it_states(
    tmp_path: Path, name: str
) -> None:
    """Of full rank: the whole of it is kept where the rank allows, else as the SVD says."""
    adapter, base = sample(name, tmp_path)
    lt.convert([adapter], to="peft", base=base, output=tmp_path / "lora")
    before = stored(base)
    exact = {k: v - before[k] for k, v in wanted(adapter, before).items()}
    assert_same_changes(tmp_path / "lora", exact, 1e-6)
    report: Any = lt.compress([tmp_path / "lora"], rank=3, output=tmp_path / "small")
    assert report.command == "compress"
    for one in lt.open(tmp_path / "small"):  # the best of rank 3; with equal values there are more
        S, made = np.linalg.svd(exact[one.name], compute_uv=False), one.delta().numpy()
        assert np.linalg.svd(made, compute_uv=False)[3:].max() <= 1e-6 * S[0]
        left = np.linalg.norm(exact[one.name] - made)
        assert abs(left - np.linalg.norm(S[3:])) <= 1e-6 * np.linalg.norm(S)


def assert_same_changes(adapter: Path, exact: Arrays, limit: float) -> None:
    found = {one.name: one.delta().numpy() for one in lt.open(adapter)}
    assert found.keys() == exact.keys()
    for key, delta in exact.items():
        assert np.abs(found[key] - delta).max() <= limit * np.abs(delta).max(), key


@pytest.mark.parametrize("factor", [0.5, -2.0])
@pytest.mark.parametrize("name", ADDITIVE)
def test_it_is_rescaled(tmp_path: Path, name: str, factor: float) -> None:
    adapter, base = sample(name, tmp_path)
    lt.rescale([adapter], factor, output=tmp_path / "scaled")
    lt.merge([tmp_path / "scaled"], base=base, output=tmp_path / "out")
    before, got = stored(base), stored(tmp_path / "out")
    for key, full in wanted(adapter, before).items():
        exact = before[key] + factor * (full - before[key])
        assert np.abs(got[key] - exact).max() <= 1e-6, key


@pytest.mark.parametrize("weight", [0.5, -0.3])
@pytest.mark.parametrize("name", [*DEPENDENT, *ADDITIVE])
def test_a_weight_goes_part_of_the_way(tmp_path: Path, name: str, weight: float) -> None:
    adapter, base = sample(name, tmp_path)
    lt.merge([f"{adapter}:{weight}"], base=base, output=tmp_path / "out")
    before, got = stored(base), stored(tmp_path / "out")
    for key, full in wanted(adapter, before).items():
        exact = before[key] + weight * (full - before[key])
        assert np.abs(got[key] - exact).max() <= 1e-6, key


@pytest.mark.parametrize("name", DEPENDENT)
def test_what_needs_the_base_is_refused_without_it(tmp_path: Path, name: str) -> None:
    adapter, _ = sample(name, tmp_path)
    out = tmp_path / "out"
    for command in (
        lambda: lt.rescale([adapter], 0.5, output=out),
        lambda: lt.merge([adapter, adapter], output=out),
        lambda: lt.compare([adapter, adapter]),
    ):
        with pytest.raises(lt.LoratoolError) as caught:
            command()
        assert caught.value.code in ("LT-460", "LT-498"), caught.value
        assert not out.exists()


FORMS: dict[str, dict[str, Any]] = {
    "road_1": {"cls": "RoadConfig", "variant": "road_1", "group_size": 4},
    "road_2": {"cls": "RoadConfig", "variant": "road_2", "group_size": 8},
    "road_4": {"cls": "RoadConfig", "variant": "road_4", "group_size": 4},
    "oft_exact": {"cls": "OFTConfig", "oft_block_size": 4, "use_cayley_neumann": False},
    "oft_bound": {"cls": "OFTConfig", "oft_block_size": 4, "coft": True, "eps": 0.2},
    "hra_gs": {"cls": "HRAConfig", "r": 4, "apply_GS": True},
    "bases": {"cls": "RandLoraConfig", "r": 3, "randlora_alpha": 6, "save_projection": False},
    "bases_sparse": {
        "cls": "RandLoraConfig",
        "r": 5,
        "randlora_alpha": 6,
        "sparse": True,
        "save_projection": False,
        "projection_prng_key": 7,
    },
    "bases_very": {
        "cls": "RandLoraConfig",
        "r": 4,
        "randlora_alpha": 6,
        "very_sparse": True,
        "save_projection": False,
    },
}


MORE = dict.fromkeys(("bases", "bases_sparse", "bases_very"), ("up_proj", "down_proj"))
"""Modules of other sizes: what they share is drawn in the largest one."""


@pytest.mark.parametrize("form", FORMS)
def test_forms_without_a_sample_merge_to_what_peft_makes(tmp_path: Path, form: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    base, options = LLM / "ia3" / "base", dict(FORMS[form])
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    kind = getattr(peft, options.pop("cls"))
    config = kind(target_modules=["q_proj", "v_proj", *MORE.get(form, ())], init_weights=False,
                  **options)  # fmt: skip
    model = peft.get_peft_model(model, config)
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    theirs = model.merge_and_unload().state_dict()
    lt.merge([tmp_path / "adapter"], base=base, output=tmp_path / "out")
    got, before = stored(tmp_path / "out"), stored(base)
    changed = [k for k in before if got[k].tobytes() != before[k].tobytes()]
    assert any(k.endswith("q_proj.weight") for k in changed)
    assert any(k.endswith("q_proj.bias") for k in changed) == form.startswith("road")
    for key in before:
        assert np.abs(got[key] - theirs[key].numpy()).max() <= 2e-6, key


DAMAGE = {
    "oft": ("oft_R.weight", (2, 27), "LT-363"), "boft": ("boft_R", (4, 4, 4, 4), "LT-363"),
    "hra": ("hra_u", (16,), "LT-363"), "hira": ("hira_A", (3, 16), "LT-363"),
    "shira": ("shira_indices", (2, 3), "LT-363"), "c3a": ("c3a_kernel", (4, 4), "LT-363"),
    "fourierft": ("fourierft_spectrum", (2, 10), "LT-363"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_tensors_that_do_not_fit_each_other_are_refused(tmp_path: Path, name: str) -> None:
    adapter, _ = sample(name, tmp_path)
    suffix, shape, code = DAMAGE[name]
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(str(file))
    key = next(k for k in tensors if k.endswith(f"layers.0.self_attn.q_proj.{suffix}"))
    tensors[key] = np.ones(shape, tensors[key].dtype)
    file.unlink()
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(adapter)
    assert caught.value.code == code and "q_proj" in str(caught.value.key)


@pytest.mark.parametrize(("name", "suffix", "shape"), [
    ("oft", "oft_R.weight", (3, 28)), ("hra", "hra_u", (15, 4)), ("ia3", "ia3_l", (7, 1)),
    ("miss_bat", "miss_block", (5, 4, 4)), ("randlora", "randlora_gamma", (4, 15)),
])  # fmt: skip
def test_sizes_of_another_model_are_refused_when_merged(
    tmp_path: Path, name: str, suffix: str, shape: tuple[int, ...]
) -> None:
    adapter, base = sample(name, tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(str(file))
    key = next(k for k in tensors if k.endswith(f".{suffix}"))
    tensors[key] = np.ones(shape, tensors[key].dtype)
    file.unlink()
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([adapter], base=base, output=tmp_path / "out")
    assert caught.value.code == "LT-432", caught.value


def test_an_element_outside_of_the_matrix_is_named(tmp_path: Path) -> None:
    adapter, base = sample("shira", tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(str(file))
    key = next(k for k in tensors if k.endswith(".shira_indices"))
    tensors[key][0, 5] = 99
    file.unlink()
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([adapter], base=base, output=tmp_path / "out")
    assert caught.value.code == "LT-363" and "row 99" in str(caught.value)


def test_indices_that_windows_wrote_as_floats_are_the_same(tmp_path: Path) -> None:
    adapter, base = sample("shira", tmp_path)
    lt.merge([adapter], base=base, output=tmp_path / "out")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(str(file))
    file.unlink()
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, str(file),
              metadata={"format": "pt"})  # fmt: skip
    lt.merge([adapter], base=base, output=tmp_path / "again")
    one, other = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert all(one[k].tobytes() == other[k].tobytes() for k in one)


ONE_MATRIX = ["oft", "oft_share", "boft", "hra", "hira", "miss_bat"]


@pytest.mark.parametrize("name", ONE_MATRIX)
def test_with_the_base_it_becomes_a_lora_that_can_be_scaled_and_added(
    tmp_path: Path, name: str
) -> None:
    """W' - W, of the rank that it has."""
    adapter, base = sample(name, tmp_path)
    before = stored(base)
    exact = {k: v - before[k] for k, v in wanted(adapter, before).items()}
    lt.rescale([adapter], 0.5, base=base, output=tmp_path / "half")
    assert_same_changes(tmp_path / "half", {k: 0.5 * v for k, v in exact.items()}, 1e-6)
    rank = {one.rank for one in lt.open(tmp_path / "half")}
    assert rank == ({4} if name == "hra" else {16} if name == "miss_bat" else {8, 16})
    lt.merge([adapter, tmp_path / "half"], base=base, into="adapter", output=tmp_path / "sum")
    assert_same_changes(tmp_path / "sum", {k: 1.5 * v for k, v in exact.items()}, 1e-6)


@pytest.mark.parametrize("name", ADDITIVE)
def test_a_merge_is_undone(tmp_path: Path, name: str) -> None:
    adapter, base = sample(name, tmp_path)
    out, undo = tmp_path / "out", tmp_path / "undo.safetensors"
    lt.merge([adapter], base=base, output=out, save_undo=undo)
    lt.subtract([adapter], merged=out, undo=undo, output=tmp_path / "back")
    back, before = stored(tmp_path / "back"), stored(base)
    assert all(back[k].tobytes() == before[k].tobytes() for k in before)


@pytest.mark.parametrize("name", ["c3a", "shira"])
def test_exact_sums(tmp_path: Path, name: str) -> None:
    """One product for each element: rounded to nearest."""
    adapter, base = sample(name, tmp_path)
    lt.merge([adapter], base=base, output=tmp_path / "out", exact=True)
    before, got = stored(base), stored(tmp_path / "out")
    for key, exact in wanted(adapter, before).items():
        half = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) / 2
        assert (np.abs(got[key] - exact) <= half + 2.0**-50).all(), key


@pytest.mark.parametrize("stages", [2, 3])
def test_boft_of_several_stages(
    tmp_path: Path, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT itself, with torch in the place of its CUDA code for blocks along a diagonal."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft.tuners.boft import layer

    def along(blocks: Any) -> Any:
        return torch.stack([torch.block_diag(*stage) for stage in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", object)
    monkeypatch.setattr(layer.FastBlockDiag, "apply", along)
    torch.manual_seed(stages)
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(32, 6)})
    save_file({"one.weight": model["one"].weight.detach().numpy().copy()},
              str(tmp_path / "model.safetensors"))  # fmt: skip
    config = peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=stages, target_modules=["one"],
        init_weights=False,
    )  # fmt: skip
    found = peft.get_peft_model(model, config)
    found.save_pretrained(str(tmp_path / "adapter"))
    lt.merge([tmp_path / "adapter"], base=tmp_path / "model.safetensors",
             output=tmp_path / "out.safetensors", dtype="float32")  # fmt: skip
    theirs = found.merge_and_unload()["one"].weight.detach().numpy()
    got = load_file(str(tmp_path / "out.safetensors"))["one.weight"]
    assert load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))[
        "base_model.model.one.boft_R"].shape == (stages, 8, 4, 4)  # fmt: skip
    assert np.abs(got - theirs).max() <= 32 * 2.0**-22 * np.abs(theirs).max()
