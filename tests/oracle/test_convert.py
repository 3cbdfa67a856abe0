"""`convert`: another dialect, the same ΔW, the bytes of the factors where they are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.oracle.in_peft import changes
from tests.oracle.kohya_files import SAMPLES, adapter_of, deltas
from tests.oracle.test_kohya import BASES, FAMILIES, lora, merge, targets

LLM = Path(__file__).parents[1] / "data" / "llm"
PLAIN = [name for name in BASES if name != "lycoris_locon_norm"]


def base_of(sample: str) -> Path:
    return SAMPLES / "base" / f"{BASES[sample]}.safetensors"


class Names(torch.nn.Module):
    """A module tree with the weights of a checkpoint; nothing in it can run."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name in tensors:
            module, _, parameter = name.rpartition(".")
            if parameter == "weight":
                parent, _, leaf = module.rpartition(".")
                self.place(parent).add_module(leaf, self.leaf(tensors, module))

    def place(self, path: str) -> torch.nn.Module:
        found: torch.nn.Module = self
        for part in filter(None, path.split(".")):
            if not hasattr(found, part):
                found.add_module(part, torch.nn.Module())
            found = getattr(found, part)
        return found

    @staticmethod
    def leaf(tensors: dict[str, np.ndarray], module: str) -> torch.nn.Module:
        weight = torch.from_numpy(tensors[f"{module}.weight"])
        bias = tensors.get(f"{module}.bias")
        made: torch.nn.Module
        if weight.dim() == 4:
            made = torch.nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]),
                                   bias=bias is not None)  # fmt: skip
        elif weight.dim() == 2:
            made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        else:
            made = torch.nn.LayerNorm(weight.shape[0])
        made.weight.data = weight.clone()
        if bias is not None:
            made.bias.data = torch.from_numpy(bias).clone()
        return made


@pytest.mark.parametrize("sample", PLAIN)
def test_a_sample_loads_in_peft_and_changes_the_same(tmp_path: Path, sample: str) -> None:
    folder, base = tmp_path / "peft", base_of(sample)
    report = lt.convert([str(adapter_of(sample))], to="peft", base=str(base), output=str(folder))
    (row,) = report.adapters
    tensors = load_file(str(base))
    found = changes(Names(tensors), folder)
    places, wanted = targets(sample, list(tensors)), deltas(adapter_of(sample))
    assert {places[key] for key in wanted} == {n for n, d in found.items() if bool(d.any())}
    for key, (delta, _) in wanted.items():
        got = found[places[key]].numpy()
        assert np.linalg.norm(got - delta) <= 1e-6 * np.linalg.norm(delta), key
    assert row.modules == len(wanted) and row.left_out == ()
    assert (row.computed == ()) == ("tucker" not in sample) == (row.relative_error == 0)
    assert row.copied == 2 * len(wanted) - len(row.computed)


def test_what_peft_cannot_hold_is_named_and_left_out_on_request(tmp_path: Path) -> None:
    sample = "lycoris_locon_norm"
    words: dict[str, Any] = {"to": "peft", "base": str(base_of(sample)), "output": tmp_path / "p"}
    with pytest.raises(lt.LoratoolError, match="norm") as caught:
        lt.convert([str(adapter_of(sample))], **words)
    assert caught.value.code == "LT-494" and not (tmp_path / "p").exists()
    skipped = [w.strip("'") for w in str(caught.value.hint).split("--skip ")[1:]]
    skipped = [w.split("'")[0] for w in skipped]
    (row,) = lt.convert([str(adapter_of(sample))], skip=skipped, **words).adapters
    assert set(row.left_out) == {"gn.weight", "gn.bias", "ln.weight", "ln.bias"}
    assert row.modules == 4


def test_bundled_embeddings_are_no_part_of_peft(tmp_path: Path) -> None:
    sample, out = str(adapter_of("kohya_bundle_emb")), str(tmp_path / "p")
    with pytest.raises(lt.LoratoolError, match="no part of a change") as caught:
        lt.convert([sample], to="peft", output=out)
    assert caught.value.code == "LT-494" and "bundle_emb" in str(caught.value.hint)
    (row,) = lt.convert([sample], to="peft", output=out, skip=["^bundle_emb"]).adapters
    assert len(row.left_out) == 3 and row.modules == 3
    kept = lt.convert([sample], to="lycoris", output=str(tmp_path / "l.safetensors"))
    assert kept.adapters[0].left_out == ()
    assert sum(k.startswith("bundle_emb") for k in load_file(str(tmp_path / "l.safetensors"))) == 3


def test_what_is_left_behind_is_said(tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    lt.rescale([str(LLM / "lora_linear")], 1, output=str(source))
    (source / "tokenizer_config.json").write_text("{}")
    path = source / "adapter_config.json"
    named = {**json.loads(path.read_text()), "base_model_name_or_path": "me/base"}
    path.write_text(json.dumps(named))
    (row,) = lt.convert([str(source)], to="kohya", output=str(tmp_path / "k.safetensors")).adapters
    said = " ".join(row.notes)
    assert "tokenizer_config.json" in said and "me/base" in said


WAYS = [
    (sample, via)
    for sample in FAMILIES
    for via in ("", "comfyui", "diffusers")
    if (sample, via) != ("z_image_musubi", "comfyui")
]  # joins q with k and v, not in this base


@pytest.mark.parametrize(("sample", "via"), WAYS)
def test_rows_of_fused_modules_go_where_the_base_has_them(
    tmp_path: Path, sample: str, via: str
) -> None:
    """Against diffusers' own converter: the same products, the same names."""
    source = adapter_of(sample)
    if via:
        lt.convert([source], to=via, output=(source := tmp_path / "source.safetensors"))
    expected = load_file(str(SAMPLES / sample / "expected_diffusers.safetensors"))
    products = {}
    for key, right in expected.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            left = expected[f"{module}.lora_B.weight"]
            products[module] = left.astype(np.float64) @ right.astype(np.float64)
    base = tmp_path / "base.safetensors"
    save_file({f"{m}.weight": np.zeros(p.shape, np.float32) for m, p in products.items()},
              str(base))  # fmt: skip
    (row,) = lt.convert([str(source)], to="peft", base=str(base),
                        output=str(tmp_path / "p")).adapters  # fmt: skip
    assert row.computed == () and not any("not needed" in note for note in row.notes)
    stored = load_file(str(tmp_path / "p" / "adapter_model.safetensors"))
    specs = {s.module: s for s in open_adapter(tmp_path / "p").specs}
    assert set(specs) == set(products)
    for module, product in products.items():
        left, right = (stored[f"base_model.model.{module}.lora_{x}.weight"].astype(np.float64)
                       for x in "BA")  # fmt: skip
        got = specs[module].scaling * (left @ right)
        assert np.linalg.norm(got - product) <= 1e-6 * np.linalg.norm(product), module


def test_a_linear_layer_and_a_1x1_convolution_are_one(tmp_path: Path) -> None:
    """Trainers store either as either; PEFT wants the dimensions of the weight."""
    adapter, base = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = lora("lora_unet_conv", 6, 4, 2, 1) | lora("lora_unet_lin", 6, 4, 2, 2)
    tensors = {k: v[:, :, None, None] if "lin" in k else v for k, v in tensors.items()}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, str(adapter))
    weights = {"conv.weight": np.ones((6, 4, 1, 1), np.float32),
               "lin.weight": np.ones((6, 4), np.float32)}  # fmt: skip
    save_file(weights, str(base))
    (row,) = lt.convert([str(adapter)], to="peft", base=str(base),
                        output=str(tmp_path / "p")).adapters  # fmt: skip
    assert row.copied == 4
    found = changes(Names(weights), tmp_path / "p")
    for (stem, _), (delta, _) in deltas(adapter).items():
        name = stem.removeprefix("lora_unet_") + ".weight"
        assert np.allclose(found[name].numpy(), delta.reshape(weights[name].shape), rtol=1e-6)


def test_a_base_that_stores_its_weights_turned_round(tmp_path: Path) -> None:
    sample = LLM / "lora_gpt2_conv1d"
    adapter, base = tmp_path / "a.safetensors", sample / "base"
    shape = load_file(str(base / "model.safetensors"))["transformer.h.0.attn.c_attn.weight"].shape
    assert shape[0] != shape[1]
    save_file(lora("lora_unet_transformer_h_0_attn_c_attn", shape[1], shape[0], 2, 1), str(adapter))
    lt.convert([str(adapter)], to="peft", base=str(base), output=str(tmp_path / "p"))
    lt.merge([str(tmp_path / "p")], base=str(base), output=str(tmp_path / "one"))
    lt.merge([str(adapter)], base=str(base), output=str(tmp_path / "two"))
    one, two = (load_file(str(tmp_path / n / "model.safetensors")) for n in ("one", "two"))
    assert all(one[n].tobytes() == two[n].tobytes() for n in one)
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["fan_in_fan_out"]


def test_swapped_halves_are_swapped(tmp_path: Path) -> None:
    adapter, base = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(lora("lora_unet_final_layer_adaLN_modulation_1", 8, 4, 2, 2), str(adapter))
    save_file({"norm_out.linear.weight": np.ones((8, 4), np.float32)}, str(base))
    lt.convert([str(adapter)], to="peft", base=str(base), output=str(tmp_path / "p"))
    once = merge(tmp_path / "p", base, tmp_path / "one.safetensors")
    twice = merge(adapter, base, tmp_path / "two.safetensors")
    assert all(once[n].tobytes() == twice[n].tobytes() for n in twice)


@pytest.mark.parametrize(
    ("sample", "base"), [("kohya_sd15_locon", "kohya_sd15"), ("kohya_sd15_locon", ""),
                         ("flux1_kohya_dense", "")]
)  # fmt: skip
def test_there_and_back_again(tmp_path: Path, sample: str, base: str) -> None:
    """Known names make the modules whole; flattened they are the file's own tensors again."""
    path = str(SAMPLES / "base" / f"{base}.safetensors") if base else None
    lt.convert([str(adapter_of(sample))], to="peft", base=path, output=str(tmp_path / "p"))
    back = tmp_path / "back.safetensors"
    (row,) = lt.convert([str(tmp_path / "p")], to="kohya", output=str(back)).adapters
    assert row.relative_error == 0 and row.computed == ()
    before, after = load_file(str(adapter_of(sample))), load_file(str(back))
    # transformers 5 leaves text_model out of the names, and the files of others need it.
    names = {n.replace("lora_te_encoder", "lora_te_text_model_encoder"): n for n in before}
    assert set(after) == set(names)
    for new, old in names.items():
        assert after[new].dtype == before[old].dtype
        assert after[new].tobytes() == before[old].tobytes(), new
    kept = open_adapter(adapter_of(sample)).metadata
    assert open_adapter(back).metadata.get("ss_network_args") == kept.get("ss_network_args")


def test_a_peft_adapter_becomes_kohya_and_stays_what_it_is(tmp_path: Path) -> None:
    source, out = LLM / "lora_linear", tmp_path / "a.safetensors"
    (row,) = lt.convert([str(source)], to="kohya", output=str(out)).adapters
    assert row.computed == () and row.copied == 2 * row.modules
    base = source / "base"
    before, after = tmp_path / "before", tmp_path / "after"
    lt.merge([str(source)], base=str(base), output=str(before))
    lt.merge([str(out)], base=str(base), output=str(after))
    one, two = (load_file(str(p / "model.safetensors")) for p in (before, after))
    assert all(one[n].tobytes() == two[n].tobytes() for n in one)


@pytest.mark.parametrize("name", ["lora_rank_alpha_pattern", "lora_rslora", "lora_lora_bias",
                                  "lora_linear_bf16", "lora_dora"])  # fmt: skip
def test_ranks_and_alphas_of_every_kind_come_along(tmp_path: Path, name: str) -> None:
    source, out = LLM / name, tmp_path / "a.safetensors"
    old = {s.name: (s.rank, s.scaling) for s in open_adapter(source).specs}
    if name == "lora_lora_bias":
        with pytest.raises(lt.LoratoolError, match="a scaled bias"):
            lt.convert([str(source)], to="kohya", output=str(out))
        return
    lt.convert([str(source)], to="kohya", output=str(out))
    new = {s.name: (s.rank, s.scaling) for s in open_adapter(out).specs}
    flat = {n.rpartition(".")[0].replace(".", "_"): v for n, v in old.items()}
    assert {n.split(".")[1]: v for n, v in new.items()} == flat  # to the last bit


@pytest.mark.parametrize(
    ("name", "word"),
    [("lora_modules_to_save", "a replaced tensor"),
     ("lora_embed_untied", "embedding"), ("lora_target_params_mixtral", "experts"),
     ("lora_pissa", "pissa"), ("lora_gpt2_conv1d", "in, out"),
     ("lora_bias_all", "a replaced tensor"), ("lora_alora", "aLoRA"),
     ("lora_mha", "in_proj_weight")],
)  # fmt: skip
def test_what_kohya_cannot_hold_is_named(tmp_path: Path, name: str, word: str) -> None:
    with pytest.raises(lt.LoratoolError, match=word) as caught:
        lt.convert([str(LLM / name)], to="kohya", output=str(tmp_path / "a.safetensors"))
    assert caught.value.code == "LT-494"


def test_a_negative_alpha_goes_into_a_factor(tmp_path: Path) -> None:
    source, out = tmp_path / "negative", tmp_path / "a.safetensors"
    lt.rescale([str(LLM / "lora_linear")], 1, output=str(source))
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": -6}))
    lt.convert([str(source)], to="kohya", output=str(out))
    before = open_adapter(source).specs[0]
    after = open_adapter(out).specs[0]
    assert before.scaling < 0 < after.scaling == -before.scaling
    wanted = load_file(str(source / "adapter_model.safetensors"))
    got = load_file(str(out))
    for name, tensor in wanted.items():
        module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        stem = "lora_unet_" + module.replace(".", "_")
        if factor.startswith("B"):
            assert np.array_equal(got[f"{stem}.lora_up.weight"], -tensor)
        else:
            assert np.array_equal(got[f"{stem}.lora_down.weight"], tensor)


def test_names_that_nothing_makes_whole(tmp_path: Path) -> None:
    with pytest.raises(lt.LoratoolError, match="no whole name is known") as caught:
        lt.convert([str(adapter_of("lycoris_locon"))], to="peft", output=str(tmp_path / "p"))
    assert caught.value.code == "LT-404" and "--base" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("to", "output", "code"),
    [("nothing", "out", "LT-282"), ("peft-file", "out", "LT-282"), ("gguf", "out", "LT-227"),
     ("peft", "out.safetensors", "LT-227"), ("kohya", "out", "LT-227")],
)  # fmt: skip
def test_a_dialect_or_a_place_that_does_not_fit(
    tmp_path: Path, to: str, output: str, code: str
) -> None:
    with pytest.raises(lt.LoratoolError) as caught:
        lt.convert([str(LLM / "lora_linear")], to=to, output=str(tmp_path / output))
    assert caught.value.code == code


def test_other_commands_say_what_to_convert(tmp_path: Path) -> None:
    kohya, peft = str(adapter_of("kohya_sd15_locon")), str(LLM / "lora_linear")
    out = str(tmp_path / "out.safetensors")
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([kohya, peft], output=out)
    assert caught.value.code == "LT-496" and f"convert {peft} --to kohya" in str(caught.value.hint)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.rescale([kohya], 0.5, program="peft", output=out)
    assert caught.value.code == "LT-227" and str(caught.value.hint) == f"-o {tmp_path / 'out'}"


def test_many_keep_their_names(tmp_path: Path) -> None:
    sources = [str(LLM / "lora_linear"), str(LLM / "lora_linear_bf16")]
    report = lt.convert(sources, to="kohya", output=str(tmp_path / "all"))
    assert [Path(r.output).name for r in report.adapters] == [
        "lora_linear.safetensors", "lora_linear_bf16.safetensors"
    ]  # fmt: skip
    assert all(Path(r.output).is_file() for r in report.adapters)


def test_a_dry_run_says_what_will_be_written(tmp_path: Path) -> None:
    sample, folder = adapter_of("lycoris_locon_tucker"), tmp_path / "p"
    words: dict[str, Any] = {"to": "peft", "base": str(base_of("lycoris_locon_tucker"))}
    (planned,) = lt.convert([str(sample)], output=str(folder), dry_run=True, **words).adapters
    assert not folder.exists() and planned.computed == ("conv3.weight",)
    (done,) = lt.convert([str(sample)], output=str(folder), **words).adapters
    assert (planned.copied, planned.computed) == (done.copied, done.computed)
    assert planned.output_bytes == done.output_bytes
    assert done.output_bytes == (folder / "adapter_model.safetensors").stat().st_size


def test_torch_is_imported_only_where_a_factor_is_computed(tmp_path: Path) -> None:
    code = (
        "import sys, loratool as lt\n"
        "source, to, output, base = sys.argv[1:]\n"
        "row, = lt.convert([source], to=to, output=output, base=base or None).adapters\n"
        "print(len(row.computed), 'torch' in sys.modules)"
    )
    tucker = "lycoris_locon_tucker"
    for source, to, out, base, said in (
        (adapter_of("kohya_sd15_locon"), "peft", "a", "", "0 False"),
        (adapter_of("kohya_sd15_locon"), "peft", "b", base_of("kohya_sd15_locon"), "0 False"),
        (tmp_path / "a", "kohya", "c.safetensors", "", "0 False"),
        (adapter_of(tucker), "kohya", "d.safetensors", "", "0 False"),
        (adapter_of(tucker), "peft", "e", base_of(tucker), "1 True"),
    ):
        found = subprocess.run(
            [sys.executable, "-c", code, str(source), to, str(tmp_path / out), str(base)],
            text=True, capture_output=True, check=True, timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        assert found.stdout.strip() == said, (source, to)


def test_the_record_names_inputs_and_options(tmp_path: Path) -> None:
    folder, out = tmp_path / "p", tmp_path / "k.safetensors"
    base = base_of("lycoris_locon")
    lt.convert([str(adapter_of("lycoris_locon"))], to="peft", base=str(base), output=str(folder))
    record = json.loads((folder / "loratool.json").read_text())
    assert record["operation"] == "convert" and record["options"] == {"to": "peft"}
    assert list(record["inputs"]) == ["adapter.safetensors", base.name]
    lt.convert([str(folder)], to="kohya", output=str(out))
    assert json.loads(open_adapter(out).metadata["loratool"])["operation"] == "convert"
    with pytest.raises(lt.LoratoolError) as caught:
        lt.convert([str(folder)], to="kohya", output=str(out))
    assert caught.value.code == "LT-501"
    lt.convert([str(folder)], to="kohya", output=str(out), skip=["lin_a"], force=True)
    assert len(open_adapter(out).specs) == 3


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_blocks_of_factors_are_written_out(tmp_path: Path, to: str) -> None:
    """BD-LoRA: the same numbers, and zeros between the blocks."""
    source = LLM / "lora_bdlora"
    (made,) = lt.convert([str(source)], to=to, output=str(tmp_path / "out")).adapters
    assert made.relative_error == 0 and len(made.computed) == 4
    lt.merge([tmp_path / "out"], base=source / "base", output=tmp_path / "merged")
    got = load_file(str(tmp_path / "merged" / "model.safetensors"))
    theirs = load_file(str(source / "merged.safetensors"))
    assert all(abs(got[key] - theirs[key]).max() <= 1e-6 for key in theirs)
