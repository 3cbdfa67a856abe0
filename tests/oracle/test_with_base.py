"""What depends on the base, with the base at hand: closed forms of every sample, and PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import LoratoolError
from tests.make import randn, save_checkpoint
from tests.oracle import closed_form
from tests.oracle.adapter_algebra import (
    EPS,
    LLM,
    Tensors,
    base_of,
    load_in_peft,
    merged,
    non_additive_samples,
    same,
    twin,
    weights_of,
)

CHANGED = non_additive_samples()
REPLACED = ["lora_modules_to_save", "lora_modules_to_save_tied", "lora_bias_all",
            "lora_embed_untied", "lora_trainable_tokens", "lora_trainable_tokens_tied"]  # fmt: skip
DORA = [name for name in CHANGED if "dora" in name]
IN_PEFT = ["lora_dora", "lora_gpt2_dora", "lora_embed_dora", "lora_pissa", "lora_olora",
           "lora_kasa", "lora_modules_to_save", "lora_trainable_tokens"]  # fmt: skip


def mixture(name: str, parts: list[tuple[float, Path]]) -> tuple[Tensors, dict[str, float]]:
    """W + Σ w·(W' - W) in float64, and what float32 files and sums may be off by.

    Factors, magnitudes and products of r ≤ 8 terms are rounded a dozen times at most, each by
    half a step of the largest term; the oracle of PiSSA and OLoRA rests on a float32 base of its
    own (16 steps, as for merges).
    """
    base = base_of(name)
    if name == "lora_modules_to_save_tied":
        base["lm_head.weight"] = base["model.embed_tokens.weight"]
    total = {k: v.clone() for k, v in base.items()}
    size = {k: float(v.abs().max()) if v.is_floating_point() else 0.0 for k, v in base.items()}
    for weight, adapter in parts:
        for key, value in weights_of(name, adapter).items():
            if value.is_floating_point():
                change = value.double() - base[key].double()
                total[key] = total[key].double() + weight * change
                size[key] += abs(weight) * float(change.abs().max())
    steps = 32 if name in ("lora_pissa", "lora_olora") else 8
    return total, {key: steps * EPS * value for key, value in size.items()}


@pytest.mark.parametrize("factor", [0.5, -0.7])
@pytest.mark.parametrize("name", CHANGED + REPLACED)
def test_rescale(name: str, factor: float, tmp_path: Path) -> None:
    base = LLM / name / "base"
    report = lt.rescale([str(LLM / name)], factor, output=tmp_path / "out", base=base,
                        dtype="float32")  # fmt: skip
    assert report.adapters[0].how == "base" and not report.adapters[0].kept
    same(merged(name, tmp_path / "out", tmp_path / "m"), *mixture(name, [(factor, LLM / name)]))


@pytest.mark.parametrize("name", CHANGED + REPLACED)
def test_sums_of_two(name: str, tmp_path: Path) -> None:
    """The twin has random factors, magnitudes and tokens, so the changes are large."""
    other = twin(name, tmp_path / "b", 1, replaced=name in REPLACED)
    lt.merge([f"{LLM / name}:0.7", f"{other}:-0.2"], base=LLM / name / "base", into="adapter",
             output=tmp_path / "out", dtype="float32")  # fmt: skip
    parts = [(0.7, LLM / name), (-0.2, other)]
    same(merged(name, tmp_path / "out", tmp_path / "m"), *mixture(name, parts))


@pytest.mark.parametrize("name", CHANGED + REPLACED)
def test_one_less_the_other(name: str, tmp_path: Path) -> None:
    other = twin(name, tmp_path / "b", 2, replaced=name in REPLACED)
    lt.subtract([str(LLM / name), f"{other}:0.3"], base=LLM / name / "base",
                output=tmp_path / "out", dtype="float32")  # fmt: skip
    parts = [(1.0, LLM / name), (-0.3, other)]
    same(merged(name, tmp_path / "out", tmp_path / "m"), *mixture(name, parts))


@pytest.mark.parametrize("name", ["lora_dora", "lora_pissa"])
def test_mixed_with_a_plain_lora(name: str, tmp_path: Path) -> None:
    """A sum with DoRA is a DoRA in every module, also in those that only the LoRA has."""
    lt.merge([f"{LLM / name}:0.7", f"{LLM / 'lora_linear'}:0.5"], base=LLM / name / "base",
             into="adapter", output=tmp_path / "out", dtype="float32")  # fmt: skip
    total, bound = mixture(name, [(0.7, LLM / name)])
    base = base_of(name)
    for key, value in weights_of("lora_linear", LLM / "lora_linear").items():
        total[key] = total[key] + 0.5 * (value - base_of("lora_linear")[key])
        bound[key] += 8 * EPS * float(value.abs().max())
    assert set(base) == set(total)
    same(merged(name, tmp_path / "out", tmp_path / "m"), total, bound)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_dora"] == (name == "lora_dora") and config["init_lora_weights"] is True


@pytest.mark.parametrize("name", [name for name in CHANGED if name not in DORA])
@pytest.mark.parametrize("rank", [1, 3])
def test_compress_is_the_best_of_its_rank(name: str, rank: int, tmp_path: Path) -> None:
    """Eckart-Young for ΔW itself, which PiSSA and its kin hold in twice their rank."""
    report = lt.compress(str(LLM / name), rank=rank, base=LLM / name / "base",
                         output=tmp_path / "out")  # fmt: skip
    got = merged(name, tmp_path / "out", tmp_path / "m")
    want, bound = mixture(name, [(1.0, LLM / name)])
    base = base_of(name)
    for module in report.adapters[0].modules:
        change = want[module.name].double() - base[module.name].double()
        sigma = torch.linalg.svdvals(change)
        tail = float(sigma[rank:].norm())
        slack = bound[module.name] * change.numel() ** 0.5
        assert module.rank == rank and tail > 0
        assert abs(module.norm - float(sigma.norm())) <= slack
        assert abs(module.relative_error * module.norm - tail) <= slack
        assert abs(float((got[module.name].double() - want[module.name]).norm()) - tail) <= slack


@pytest.mark.parametrize("name", DORA)
@pytest.mark.parametrize("rank", [1, 3])
def test_compress_keeps_what_dora_does_to_rows(name: str, rank: int, tmp_path: Path) -> None:
    """diag(m/‖V‖) (W + best rank of s·B·A): only the product inside of the norm is cut."""
    report = lt.compress(str(LLM / name), rank=rank, base=LLM / name / "base",
                         output=tmp_path / "out")  # fmt: skip
    got = merged(name, tmp_path / "out", tmp_path / "m")
    want, bound = mixture(name, [(1.0, LLM / name)])
    base = base_of(name)
    for module, weight, product, gain in dora_parts(name):
        U, S, Vh = torch.linalg.svd(product, full_matrices=False)
        cut = gain[:, None] * (weight + (U[:, :rank] * S[:rank]) @ Vh[:rank])
        is_turned = name in ("lora_gpt2_dora", "lora_embed_dora")
        want[module] = (cut.T if is_turned else cut).reshape(base[module].shape)
        (found,) = [m for m in report.adapters[0].modules if m.name == module]
        assert found.rank == rank
        assert found.norm == pytest.approx(float(S.norm()), rel=1e-6)
        error = float(S[rank:].norm() / S.norm())
        assert found.relative_error == pytest.approx(error, rel=1e-4)
    same(got, want, bound)


@pytest.mark.parametrize("name", ["lora_pissa", "lora_olora"])
def test_dora_takes_the_lengths_of_what_training_began_with(name: str, tmp_path: Path) -> None:
    """W' = diag(m/‖V‖) V, where V = W less what loading takes away + s·B·A; in every command."""
    source, base = tmp_path / "in", LLM / name / "base"
    shutil.copytree(LLM / name, source)
    (inside, bound), first = mixture(name, [(1.0, source)]), base_of(name)
    tensors = load_file(str(source / "adapter_model.safetensors"))
    want = dict(first)
    for number, key in enumerate([k for k in tensors if ".lora_A." in k]):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        V = inside[f"{module}.weight"].double()
        lengths = randn(len(V), seed=number).abs() + 0.5
        tensors[key.replace("lora_A.weight", "lora_magnitude_vector")] = lengths
        want[f"{module}.weight"] = V * (lengths.double() / V.norm(dim=1))[:, None]
        bound[f"{module}.weight"] += 64 * EPS * float(want[f"{module}.weight"].abs().max())
    save_file(tensors, str(source / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text()) | {"use_dora": True}
    (source / "adapter_config.json").write_text(json.dumps(config))
    same(merged(name, source, tmp_path / "m"), want, bound)
    half = {k: v + 0.5 * (want[k].double() - v.double()) for k, v in first.items()}
    lt.merge([source], base=base, into="adapter", weights=[0.5], output=tmp_path / "half")
    same(merged(name, tmp_path / "half", tmp_path / "h"), half, bound)


def test_a_row_that_dora_takes_away_stays_away(tmp_path: Path) -> None:
    """Alone and at weight 1 nothing is divided by what is left of it: 2⁻³⁰ of a row, or none."""
    source, base = tmp_path / "in", LLM / "lora_dora" / "base"
    shutil.copytree(LLM / "lora_dora", source)
    file = source / "adapter_model.safetensors"
    tensors = load_file(str(file))
    key = next(k for k in tensors if k.endswith("lora_magnitude_vector"))
    tensors[key][:2] *= torch.tensor([2.0**-30, 0.0])
    save_file(tensors, str(file), metadata={"format": "pt"})
    lt.compress(str(source), rank=1, base=base, output=tmp_path / "out")
    lt.merge([tmp_path / "out"], base=base, output=tmp_path / "m")
    got = load_file(str(tmp_path / "m" / "model.safetensors"))
    name = key.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")
    tensor, weight, product, gain = next(p for p in dora_parts("lora_dora") if p[0] == name)
    U, S, Vh = torch.linalg.svd(product)
    gain[:2] *= torch.tensor([2.0**-30, 0.0])
    want = gain[:, None] * (weight + S[0] * U[:, :1] @ Vh[:1])
    assert (got[tensor][1] == 0).all() and got[tensor][0].abs().max() > 0
    assert ((got[tensor].double() - want).abs() <= 8 * EPS * want.abs().amax(1)[:, None]).all()
    both = [str(source), str(source)]
    refused(lambda: lt.merge(both, base=base, into="adapter", weights=[0.5, 0.5],
                             output=tmp_path / "sum"), "LT-806", "the sum")  # fmt: skip


def dora_parts(name: str) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(tensor, W (out, in), s·B·A, m/‖W + s·B·A‖) of every module, float64."""
    tensors = closed_form.read(LLM / name / "adapter_model.safetensors")
    config = json.loads((LLM / name / "adapter_config.json").read_text())
    base, found = base_of(name), []
    for key, magnitude in tensors.items():
        if not key.endswith(".lora_magnitude_vector"):
            continue
        stem = key.removesuffix(".lora_magnitude_vector")
        module = stem.removeprefix("base_model.model.")
        lora_A, lora_B = (
            next(tensors[f"{stem}.{k}"] for k in (f"lora_{side}.weight", f"lora_embedding_{side}")
                 if f"{stem}.{k}" in tensors).double().flatten(1)
            for side in "AB"
        )  # fmt: skip
        weight = base[f"{module}.weight"].double()
        weight = weight.T if name in ("lora_gpt2_dora", "lora_embed_dora") else weight.flatten(1)
        product = closed_form.scaling_of(config, module) * lora_B @ lora_A
        gain = magnitude.double().flatten() / (weight + product).norm(dim=1)
        found.append((f"{module}.weight", weight, product, gain))
    assert found
    return found


def test_compress_to_a_size_counts_the_lengths(tmp_path: Path) -> None:
    source, base = LLM / "lora_dora", LLM / "lora_dora" / "base"
    lt.compress(str(source), size=9000, base=base, output=tmp_path / "out")
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    lt.compress(str(source), rank=1, base=base, output=tmp_path / "least")
    least = (tmp_path / "least" / "adapter_model.safetensors").stat().st_size
    assert least < size <= 9000


def test_where_nothing_gets_smaller_the_file_stays(tmp_path: Path) -> None:
    for name in ("lora_dora", "lora_pissa"):
        source, out = LLM / name, tmp_path / name
        report = lt.compress(str(source), rank=64, base=source / "base", output=out)
        assert report.adapters[0].is_unchanged
        file = "adapter_model.safetensors"
        assert load_file(str(out / file)).keys() == load_file(str(source / file)).keys()
        for key, value in load_file(str(source / file)).items():
            assert torch.equal(load_file(str(out / file))[key], value)


@pytest.mark.parametrize("name", CHANGED + REPLACED)
@pytest.mark.parametrize("weight", [1, 0.6])
def test_out_of_merged_weights_and_another_one_in(name: str, weight: float, tmp_path: Path) -> None:
    """W comes back up to the roundings of the merge and of the subtraction, half a step each."""
    source, base = f"{LLM / name}:{weight}", LLM / name / "base"
    options: dict[str, Any] = {"untie": True} if name == "lora_modules_to_save_tied" else {}
    lt.merge([source], base=base, output=tmp_path / "m", dtype="float32", **options)
    lt.subtract([source], merged=tmp_path / "m", base=base, output=tmp_path / "back")
    before = base_of(name)
    if options:
        before["lm_head.weight"] = before["model.embed_tokens.weight"]
    sums = closed_form.in_memory(LLM / name, load_file(str(tmp_path / "m" / "model.safetensors")))
    got = closed_form.in_memory(LLM / name, load_file(str(tmp_path / "back" / "model.safetensors")))
    rounding = {k: EPS * float(v.abs().max()) for k, v in sums.items() if v.is_floating_point()}
    same(got, before, rounding)
    lt.swap(source, f"{LLM / name}:0.3", merged=tmp_path / "m", base=base, output=tmp_path / "s")
    new = closed_form.in_memory(LLM / name, load_file(str(tmp_path / "s" / "model.safetensors")))
    want, bound = mixture(name, [(0.3, LLM / name)])
    same(new, want, {key: bound[key] + rounding.get(key, 0) for key in bound})


@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_loads_it_and_computes_the_same(name: str, tmp_path: Path) -> None:
    """PEFT's own merge of the rescaled file, in float32: r products and sums, a norm of in."""
    import peft
    import transformers

    lt.rescale([str(LLM / name)], 0.5, base=LLM / name / "base", output=tmp_path / "out")
    load_in_peft(name, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(LLM / name / "base"))
    merged_by_peft = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).merge_and_unload()
    state = merged_by_peft.state_dict()
    want, bound = mixture(name, [(0.5, LLM / name)])
    for key, value in want.items():
        if value.is_floating_point() and key in state:
            error = float((state[key].double() - value).abs().max())
            assert error <= 4 * bound[key], (key, error)


# ------------------------------------------------------------------------- what is refused


def refused(call: Callable[[], object], code: str, *words: str) -> None:
    with pytest.raises(LoratoolError) as caught:
        call()
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)


def test_without_the_base_the_message_names_the_option(tmp_path: Path) -> None:
    dora, head, out = LLM / "lora_dora", LLM / "lora_modules_to_save", tmp_path / "out"
    other = twin(head.name, tmp_path / "b", 1, replaced=True)
    refused(lambda: lt.rescale([str(dora)], 0.5, output=out), "LT-460", "--base BASE")
    refused(lambda: lt.compress(str(dora), rank=1, output=out), "LT-449", "--base BASE")
    refused(lambda: lt.compress(str(LLM / "lora_pissa"), rank=1, output=out), "LT-497",
            "--base BASE")  # fmt: skip
    refused(lambda: lt.merge([str(dora), str(dora)], output=out), "LT-460",
            "--base BASE --into adapter")  # fmt: skip
    refused(lambda: lt.merge([str(head), str(other)], output=out), "LT-464",
            "--base BASE --into adapter")  # fmt: skip
    refused(lambda: lt.subtract([str(head), str(other)], output=out), "LT-464", "--base BASE")
    lt.merge([str(head)], base=head / "base", output=tmp_path / "m")
    refused(lambda: lt.subtract([str(head)], merged=tmp_path / "m", output=out), "LT-456",
            "--base BASE")  # fmt: skip
    lt.merge([str(dora)], base=dora / "base", output=tmp_path / "d")
    refused(lambda: lt.subtract([str(dora)], merged=tmp_path / "d", output=out), "LT-455",
            "--base BASE")  # fmt: skip
    kept = lt.rescale([str(head)], 0.5, output=out).adapters[0]
    assert kept.kept and any("--base BASE" in note for note in kept.notes)


def test_what_the_base_cannot_settle(tmp_path: Path) -> None:
    dora, out = LLM / "lora_dora", tmp_path / "out"
    base = dora / "base"
    both = [str(dora), str(LLM / "lora_linear")]
    refused(lambda: lt.merge(both, base=base, into="adapter", method="ties", output=out), "LT-418")
    refused(lambda: lt.merge(both, into="base", output=out), "LT-286", "--base BASE")
    refused(lambda: lt.merge(both, base=base, into="model", output=out), "LT-206")
    head = LLM / "lora_modules_to_save"
    for adapter, code in ((dora, "LT-477"), (head, "LT-251")):
        refused(lambda a=adapter: lt.subtract([str(a)], merged=a / "base", base=a / "base",
                                              exact=True, output=out), code)  # fmt: skip
    small = save_checkpoint(tmp_path / "small", {"a.weight": randn(4, 4, seed=1)})
    refused(lambda: lt.rescale([str(dora)], 0.5, base=small, output=out), "LT-430")
    # at -1/(c - 1) the row is gone: nothing that DoRA could scale
    gain = next(g for _, _, _, g in dora_parts("lora_dora"))
    weight = -1 / float(gain[0] - 1)
    refused(
        lambda: lt.rescale([str(dora)], weight, base=base, output=out),
        "LT-806",
        "the change at weight",
    )
    assert not out.exists()


def test_a_base_that_nothing_depends_on_changes_nothing(tmp_path: Path) -> None:
    plain, base = LLM / "lora_linear", LLM / "lora_linear" / "base"
    both = [f"{plain}:0.7", str(LLM / "lora_rslora")]
    lt.merge(both, output=tmp_path / "a")
    lt.merge(both, base=base, into="adapter", output=tmp_path / "b")
    lt.rescale([str(plain)], 0.3, output=tmp_path / "c")
    lt.rescale([str(plain)], 0.3, base=base, output=tmp_path / "d")
    for one, other in (("a", "b"), ("c", "d")):
        files = [load_file(str(tmp_path / f / "adapter_model.safetensors")) for f in (one, other)]
        same(files[0], {k: v.double() for k, v in files[1].items()}, {})


def test_the_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    for name in ("lora_dora", "lora_pissa"):
        made = []
        for threads in (1, 3):
            out = tmp_path / f"{name}{threads}"
            lt.merge([f"{LLM / name}:0.7", f"{LLM / name}:0.1"], base=LLM / name / "base",
                     into="adapter", output=out, threads=threads)  # fmt: skip
            made.append((out / "adapter_model.safetensors").read_bytes())
        assert made[0] == made[1]


def test_a_swap_drops_what_the_new_one_overwrites(tmp_path: Path) -> None:
    """A LoRA on the head goes with the head that the new adapter replaces."""
    head = LLM / "lora_modules_to_save"
    base = head / "base"
    weight = base_of(head.name)["lm_head.weight"]
    folder = tmp_path / "on-head"
    folder.mkdir()
    key = "base_model.model.lm_head.lora_{}.weight"
    save_file({key.format("A"): randn(2, weight.shape[1], seed=1),
               key.format("B"): randn(len(weight), 2, seed=2)},
              str(folder / "adapter_model.safetensors"), {"format": "pt"})  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    lt.merge([str(folder)], base=base, output=tmp_path / "m")
    lt.swap(str(folder), str(head), merged=tmp_path / "m", output=tmp_path / "out")
    new = load_file(str(tmp_path / "out" / "model.safetensors"))["lm_head.weight"]
    lt.merge([str(head)], base=base, output=tmp_path / "want")
    assert torch.equal(
        new, load_file(str(tmp_path / "want" / "model.safetensors"))["lm_head.weight"]
    )


@pytest.mark.parametrize("weight", [1, 0.5])
def test_rows_over_what_the_old_one_changed_take_the_base(weight: float, tmp_path: Path) -> None:
    """Without it the old change would be taken out of the new rows, which never had it."""
    rows = LLM / "lora_trainable_tokens"
    first = base_of(rows.name)["model.embed_tokens.weight"]
    key, folder = "base_model.model.model.embed_tokens.lora_embedding_{}", tmp_path / "on-table"
    folder.mkdir()
    save_file({key.format("A"): randn(2, len(first), seed=1),
               key.format("B"): randn(first.shape[1], 2, seed=2)},
              str(folder / "adapter_model.safetensors"), {"format": "pt"})  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base, new = rows / "base", f"{rows}:{weight}"
    lt.merge([str(folder)], base=base, output=tmp_path / "m")
    with pytest.raises(lt.LoratoolError) as caught:
        lt.swap(str(folder), new, merged=tmp_path / "m", output=tmp_path / "out")
    assert caught.value.code == "LT-456" and "--base" in str(caught.value.hint)
    lt.swap(str(folder), new, merged=tmp_path / "m", base=base, output=tmp_path / "out")
    lt.merge([new], base=base, output=tmp_path / "want")
    found, want = (load_file(str(tmp_path / o / "model.safetensors"))["model.embed_tokens.weight"]
                   for o in ("out", "want"))  # fmt: skip
    assert (found - want).abs().max() <= 2.0**-21 * (found.abs() + 4).max()
    assert not torch.equal(want, first)
