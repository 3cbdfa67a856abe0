"""Adapters written for llama.cpp: the bytes of gguf, ΔW in closed form, what it cannot hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.store.gguf import GgufFile, read_gguf
from tests.oracle.test_gguf import DATA, ORIGIN, SAMPLE, VALUES, factors, gguf

HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
UNPAIRED = ("qwen3moe",)
LEAVES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def written(name: str, folder: Path, **options: Any) -> Path:
    out = folder / f"{name}.gguf"
    options = {"to": "gguf", "base": DATA / name / "base"} | options
    lt.convert([DATA / name], output=out, **options)
    return out


def arrays(file: GgufFile) -> dict[str, np.ndarray]:
    kinds, raw = {"F32": "<f4", "F16": "<f2"}, file.path.read_bytes()
    return {t.name: np.frombuffer(raw, kinds[t.kind], t.nbytes // int(kinds[t.kind][2]), t.start)
            .reshape(t.shape) for t in file.tensors}  # fmt: skip


def deltas(path: Path, base: Path) -> dict[str, np.ndarray]:
    """ΔW of a file by the rules of llama.cpp, in float64; rows of heads in transformers' order."""
    file, config = read_gguf(path), json.loads((base / "config.json").read_text())
    tensors = arrays(file)
    alpha, found = file.metadata["adapter.lora.alpha"], {}
    for key in tensors:
        if not key.endswith(".lora_a"):
            continue
        name = key.removesuffix(".weight.lora_a")
        a = tensors[key].astype("f8")
        b = tensors[f"{name}.weight.lora_b"].astype("f8")
        leaf, number = name.rpartition(".")[2], name.split(".")[1]
        if leaf in HEADS and file.metadata["general.architecture"] not in UNPAIRED:
            turned = b.reshape(config[HEADS[leaf]], -1, 2, b.shape[-1])
            b = turned.swapaxes(1, 2).reshape(b.shape)
        delta = (alpha / b.shape[-1] if alpha else 1.0) * (b @ a)
        if leaf in LEAVES:
            found[f"model.layers.{number}.{LEAVES[leaf]}.weight"] = delta
        for expert in range(len(delta) if leaf.endswith("_exps") else 0):
            found[f"{number} {expert} {leaf}"] = delta[expert]
    return found


def test_the_bytes_are_those_of_gguf(tmp_path: Path) -> None:
    """The sample was written by that package, of this adapter."""
    out = written("lora_linear", tmp_path, provenance=False)
    assert out.read_bytes() == SAMPLE.read_bytes()
    again = tmp_path / "again.gguf"
    lt.convert([SAMPLE], to="gguf", output=again, provenance=False)
    assert again.read_bytes() == SAMPLE.read_bytes()


@pytest.mark.parametrize("name", ["lora_linear", "lora_rslora", "lora_rank_alpha_pattern"])
def test_delta_in_closed_form_and_round_trip(name: str, tmp_path: Path) -> None:
    """PEFT → mlx → GGUF → PEFT; what PEFT itself merged is the truth."""
    base = DATA / name / "base"
    lt.convert([DATA / name], to="mlx", base=base, output=tmp_path / "mlx")
    lt.convert([tmp_path / "mlx"], to="gguf", base=base, output=tmp_path / "far.gguf")
    lt.convert([tmp_path / "far.gguf"], to="peft", base=base, output=tmp_path / "peft")
    lt.merge([tmp_path / "peft"], base=base, output=tmp_path / "out")
    plain = load_file(str(base / "model.safetensors"))
    theirs = load_file(str(DATA / name / "merged.safetensors"))
    got = load_file(str(tmp_path / "out" / "model.safetensors"))
    assert all(np.abs(got[k] - theirs[k]).max() <= 1e-6 for k in theirs)
    for path in (written(name, tmp_path), tmp_path / "far.gguf"):
        found = deltas(path, base)
        want = {k: theirs[k].astype("f8") - plain[k] for k in theirs}
        assert found.keys() == {k for k in want if np.abs(want[k]).max() > 1e-9}
        assert all(np.abs(found[k] - want[k]).max() <= 1e-6 for k in found)


@pytest.mark.parametrize("name", ["lora_mixtral_v4style", "lora_qwen3moe_v4style"])
def test_experts_are_stacked(name: str, tmp_path: Path) -> None:
    base, out = DATA / name / "base", written(name, tmp_path)
    letters = {"ffn_gate_exps": ("w1", "gate_proj"), "ffn_up_exps": ("w3", "up_proj"),
               "ffn_down_exps": ("w2", "down_proj")}  # fmt: skip
    plain = load_file(str(base / "model.safetensors"))
    theirs = load_file(str(DATA / name / "merged.safetensors"))
    found = deltas(out, base)
    experts = [key.split() for key in found if " " in key]
    assert len(experts) == 2 * 4 * 3
    for number, expert, leaf in experts:
        (key,) = (k for k in theirs if f"layers.{number}." in k and f"experts.{expert}." in k
                  and k.split(".")[-2] in letters[leaf])  # fmt: skip
        want = theirs[key].astype("f8") - plain[key]
        assert np.abs(found[f"{number} {expert} {leaf}"] - want).max() <= 1e-6
    lt.merge([out], base=base, output=tmp_path / "out")
    got = load_file(str(tmp_path / "out" / "model.safetensors"))
    assert all(np.abs(got[k] - theirs[k]).max() <= 2e-7 for k in got)


def test_what_depends_on_the_base_becomes_lora(tmp_path: Path) -> None:
    name = "lora_dora"
    plain = load_file(str(DATA / name / "base" / "model.safetensors"))
    theirs = load_file(str(DATA / name / "merged.safetensors"))
    found = deltas(written(name, tmp_path), DATA / name / "base")
    assert len(found) == 14
    assert all(np.abs(found[k] - (theirs[k].astype("f8") - plain[k])).max() <= 1e-6 for k in found)


def test_scalings_of_one_keep_every_byte(tmp_path: Path) -> None:
    """Mixed ranks without a common alpha: llama.cpp takes no alpha for a factor of 1."""
    tensors = factors() | {"blk.1.attn_v.weight.lora_a": np.ones((3, 16), "f4"),
                           "blk.1.attn_v.weight.lora_b": np.ones((16, 3), "f2")}  # fmt: skip
    path = gguf(tmp_path / "a.gguf", VALUES | {"adapter.lora.alpha": 0.0}, tensors)
    lt.convert([path], to="peft", output=tmp_path / "peft")
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.norm.weight": np.ones(4, "f4")}, str(base / "model.safetensors"))
    (base / "config.json").write_text('{"model_type": "qwen2"}')
    report = lt.convert([tmp_path / "peft"], to="gguf", base=base, output=tmp_path / "b.gguf")
    assert report.adapters[0].copied == 4
    file = read_gguf(tmp_path / "b.gguf")
    assert file.metadata["adapter.lora.alpha"] == 0
    assert all(np.array_equal(arrays(file)[k], v) for k, v in tensors.items())


def test_embeddings_and_the_name_of_the_base(tmp_path: Path) -> None:
    table = {"token_embd.weight.lora_a": np.arange(20, dtype="f4").reshape(10, 2),
             "token_embd.weight.lora_b": np.ones((8, 2), "f4")}  # fmt: skip
    path = gguf(tmp_path / "a.gguf", VALUES, table)
    lt.convert([path], to="peft", output=tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    said = json.loads(config.read_text()) | {"base_model_name_or_path": "me/base"}
    config.write_text(json.dumps(said))
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.norm.weight": np.ones(4, "f4")}, str(base / "model.safetensors"))
    (base / "config.json").write_text('{"text_config": {"model_type": "gemma3_text"}}')
    lt.convert([tmp_path / "peft"], to="gguf", base=base, output=tmp_path / "b.gguf")
    file = read_gguf(tmp_path / "b.gguf")
    assert {k: v.tolist() for k, v in arrays(file).items()} == {
        k: v.tolist() for k, v in table.items()}  # fmt: skip
    assert file.metadata["general.base_model.count"] == 1
    assert file.metadata["general.architecture"] == "gemma3"
    found = lt.inspect(tmp_path / "b.gguf").adapter
    assert found is not None and found.base_model == "me/base"


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("lora_modules_to_save", "LT-494", "replaced tensor"),
     ("lora_target_params_mixtral", "LT-494", "experts in one tensor"),
     ("lora_gpt2_conv1d", "LT-494", "transposed"), ("lora_neox_fused", "LT-411", "gpt_neox")],
)  # fmt: skip
def test_what_it_cannot_hold(name: str, code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(lt.LoratoolError) as caught:
        written(name, tmp_path)
    assert caught.value.code == code and words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_model_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(lt.LoratoolError) as caught:
        written("lora_linear", tmp_path, base=None)
    assert caught.value.code == "LT-460" and "--base BASE" in str(caught.value.hint)
    config = json.loads((ORIGIN / "base" / "config.json").read_text())
    for change, word in (({"num_attention_heads": None}, "number the base says"),
                         ({"num_attention_heads": 3}, "number the base says")):  # fmt: skip
        base = tmp_path / "base"
        base.mkdir(exist_ok=True)
        save_file(load_file(str(ORIGIN / "base" / "model.safetensors")),
                  str(base / "model.safetensors"))  # fmt: skip
        (base / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(lt.LoratoolError) as caught:
            written("lora_linear", tmp_path, base=base)
        assert caught.value.code == "LT-411" and word in str(caught.value)


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    """llama.cpp has no tensor for it."""
    head = {"output.weight.lora_a": np.ones((2, 16), "f4"),
            "output.weight.lora_b": np.ones((10, 2), "f4")}  # fmt: skip
    lt.convert([gguf(tmp_path / "a.gguf", VALUES, head)], to="peft", output=tmp_path / "peft")
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.norm.weight": np.ones(4, "f4")}, str(base / "model.safetensors"))
    (base / "config.json").write_text('{"model_type": "qwen2", "tie_word_embeddings": true}')
    with pytest.raises(lt.LoratoolError) as caught:
        lt.convert([tmp_path / "peft"], to="gguf", base=base, output=tmp_path / "b.gguf")
    assert caught.value.code == "LT-411" and "--skip '^lm_head$'" in str(caught.value.hint)


def test_replaced_and_made_anew(tmp_path: Path) -> None:
    """The same bytes twice; --force knows its own file, and no other."""
    out = written("lora_rslora", tmp_path)
    first = out.read_bytes()
    with pytest.raises(lt.LoratoolError):
        written("lora_rslora", tmp_path, provenance=False)
    written("lora_rslora", tmp_path, force=True)
    assert out.read_bytes() == first
    out.write_bytes(first[:-1] + b"\1")
    with pytest.raises(lt.LoratoolError) as caught:
        written("lora_rslora", tmp_path, force=True)
    assert caught.value.code.startswith("LT-5")


def test_for_llama_cpp(tmp_path: Path) -> None:
    """What ``-o`` is called decides: its own form, or a folder that its converter takes."""
    name = "lora_rank_alpha_pattern"
    written(name, tmp_path, to=None, program="llama.cpp")
    lt.convert([DATA / name], program="llama.cpp", output=tmp_path / "folder")
    assert (tmp_path / "folder" / "adapter_config.json").exists()
    assert lt.check(tmp_path / f"{name}.gguf", program="llama.cpp").ok


@pytest.mark.parametrize(
    ("name", "left"),
    [("lora_rank_alpha_pattern", 0), ("lora_dora", 0), ("lora_modules_to_save", 2), ("ia3", 4)],
)
def test_check_fixes_it_as_a_file_of_its_own(name: str, left: int, tmp_path: Path) -> None:
    """``-o x.gguf --base``: one alpha, LoRA of what depends on the base, no tensors whole."""
    source, out = DATA / name, tmp_path / "x.gguf"
    how = {"program": "llama.cpp", "fix": True, "base": source / "base", "output": out}
    assert not lt.check(source, dry_run=True, **how).ok and not out.exists()
    report = lt.check(source, **how)
    assert report.output == str(out) and lt.check(out, program="llama.cpp").verdict == "yes"
    assert len(report.warnings) == bool(left) and all("left out" in w for w in report.warnings)
    assert name != "ia3" or "4 biases" in " ".join(report.fixed)
    base = load_file(str(source / "base" / "model.safetensors"))
    merged = load_file(str(source / "merged.safetensors"))
    made = deltas(out, source / "base")
    for key, new in merged.items():
        change = new.astype("f8") - base.get(key, new)
        if key in made:  # PEFT rounded W', we two factors
            assert np.abs(made[key] - change).max() <= 2**-21 * np.abs(new).max(), key
        else:
            assert not change.any() or change.ndim < 2 or name == "lora_modules_to_save", key


def test_check_asks_for_the_base_where_the_file_needs_it(tmp_path: Path) -> None:
    for asked, code, word in (
        ({"fix": True, "output": tmp_path / "x.gguf"}, "LT-460", "--base BASE"),
        ({"base": ORIGIN / "base"}, "LT-276", "--fix"),
    ):
        with pytest.raises(lt.LoratoolError) as caught:
            lt.check(DATA / "lora_rslora", program="llama.cpp", **asked)
        assert caught.value.code == code and word in str(caught.value)
    values, tensors = VALUES, factors() | {"blk.0.attn_norm.weight": np.ones(16, "f4")}
    path, out = gguf(tmp_path / "a.gguf", values, tensors), tmp_path / "b.gguf"
    assert not lt.check(path, program="llama.cpp").ok
    lt.check(path, program="llama.cpp", fix=True, output=out)
    assert set(arrays(read_gguf(out))) == set(factors())
    assert lt.check(out, program="llama.cpp").ok


def test_rescale_and_compress(tmp_path: Path) -> None:
    lt.rescale([SAMPLE], 0.5, output=tmp_path / "half.gguf")
    half, whole = (deltas(p, ORIGIN / "base") for p in (tmp_path / "half.gguf", SAMPLE))
    assert all(np.abs(2 * half[k] - whole[k]).max() <= 1e-7 for k in whole)
    path = gguf(tmp_path / "a.gguf", VALUES, factors())
    lt.compress([path], rank=2, output=tmp_path / "small.gguf")
    (before,), (after,) = (list(lt.open(p)) for p in (path, tmp_path / "small.gguf"))
    assert np.abs(before.delta().numpy() - after.delta().numpy()).max() <= 1e-5


@pytest.mark.parametrize("with_base", [False, True])
def test_rows_of_heads_stay_as_the_file_has_them(tmp_path: Path, with_base: bool) -> None:
    """What is cut, scaled and added needs no base: all of it is the same in any order of rows."""
    base = ORIGIN / "base"
    how, whole = ({"base": base} if with_base else {}), deltas(SAMPLE, base)
    both = how | {"into": "adapter"} if with_base else how
    out = {name: tmp_path / f"{name}.gguf" for name in ("cut", "some", "sum", "less", "ties")}
    lt.compress([SAMPLE], rank=2, output=out["cut"], **how)
    lt.rescale([SAMPLE], 0.5, only=["q_proj=-0.25"], program="llama.cpp", output=out["some"], **how)
    lt.merge([SAMPLE, f"{out['some']}:2"], output=out["sum"], **both)
    lt.subtract([SAMPLE, f"{out['cut']}:0.5"], output=out["less"])
    lt.merge([SAMPLE, out["some"]], method="ties", params={"density": 1}, output=out["ties"])
    found = {name: deltas(path, base) for name, path in out.items()}
    for name, delta in whole.items():
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        best, factor = (U[:, :2] * S[:2]) @ Vh[:2], -0.25 if "q_proj" in name else 0.5
        # factors are stored in float32: two of them, and 2 r sums
        for word, want in (("cut", best), ("some", factor * delta), ("less", delta - best / 2),
                           ("sum", (1 + 2 * factor) * delta)):  # fmt: skip
            assert np.abs(found[word][name] - want).max() <= 2**-20 * S[0], (word, name)
        assert np.linalg.matrix_rank(found["cut"][name], 1e-5 * S[0]) == 2
        kept = delta * max(1, factor)  # where signs differ the larger one stays alone
        want = kept if factor < 0 else delta * (1 + factor) / 2
        assert np.abs(found["ties"][name] - want).max() <= 2**-20 * S[0], name
    assert lt.check(out["cut"], program="llama.cpp").ok


def test_rows_in_another_order_need_the_base(tmp_path: Path) -> None:
    for to, out in (("peft", "peft"), ("mlx", "mlx")):
        with pytest.raises(lt.LoratoolError) as caught:
            lt.compress([SAMPLE], rank=2, to=to, output=tmp_path / out)
        assert caught.value.code == "LT-460" and "--base" in str(caught.value.hint)
    lt.compress([SAMPLE], rank=2, to="peft", base=ORIGIN / "base", output=tmp_path / "peft")
    lt.compress([ORIGIN], rank=2, output=tmp_path / "origin")
    lt.rescale([SAMPLE], 0.5, only=["q_proj=-0.25"], to="peft", base=ORIGIN / "base",
               output=tmp_path / "scaled")  # fmt: skip
    lt.rescale([ORIGIN], 0.5, only=["q_proj=-0.25"], output=tmp_path / "too")
    found = {name: {m.name: m.delta().numpy() for m in lt.open(tmp_path / name)}
             for name in ("peft", "origin", "scaled", "too")}  # fmt: skip
    for ours, theirs in (("peft", "origin"), ("scaled", "too")):
        for name, delta in found[theirs].items():
            assert np.abs(found[ours][name] - delta).max() <= 2**-20 * np.linalg.norm(delta, 2)


@pytest.mark.parametrize("name", ["lora_rank_alpha_pattern", "lora_mixtral_v4style"])
def test_gguf_itself_reads_it(name: str, tmp_path: Path) -> None:
    """Names are those of its own map; run where the package is."""
    library = pytest.importorskip("gguf")
    out = written(name, tmp_path)
    ours, theirs = arrays(read_gguf(out)), library.GGUFReader(str(out))
    assert {t.name for t in theirs.tensors} == set(ours)
    assert all(np.array_equal(t.data, ours[t.name]) for t in theirs.tensors)
    assert theirs.get_field("general.type").contents() == "adapter"


def test_names_are_those_of_gguf() -> None:
    """Every architecture; run where the package is."""
    library = pytest.importorskip("gguf")
    from loratool.quant.gguf_names import ARCHITECTURES

    numbers = {name: arch for arch, name in library.MODEL_ARCH_NAMES.items()}
    for name, one in ARCHITECTURES.items():
        known = library.get_tensor_name_map(numbers[name], 1)
        for leaf, living in one.leaves.items():
            for word in living:
                found = known.get_name(f"model.layers.0.{word.replace('.*.', '.')}")
                assert found == f"blk.0.{leaf}", (name, word)
        assert one.has_head == (known.get_name("lm_head") is not None), name


@pytest.mark.parametrize(("command", "factor"), [
    (lambda a, out, **how: lt.rescale([a], 2, output=out, **how), 2.0),
    (lambda a, out, **how: lt.compress([a], rank=64, output=out, **how), 1.0),
    (lambda a, out, **how: lt.subtract([str(a), f"{a}:0.25"], output=out, **how), 0.75),
])  # fmt: skip
def test_other_commands_ask_the_base_too(command: Any, factor: float, tmp_path: Path) -> None:
    """`--to gguf --base`: heads are those of the base, which the output names."""
    folder, base = DATA / "lora_rslora", DATA / "lora_rslora" / "base"
    plain, out = written("lora_rslora", tmp_path), tmp_path / "out.gguf"
    with pytest.raises(lt.LoratoolError) as caught:
        command(folder, out, to="gguf")
    assert caught.value.code == "LT-460"
    command(folder, out, to="gguf", base=base)
    made = deltas(out, base)
    for name, delta in deltas(plain, base).items():
        assert np.allclose(made[name], factor * delta, rtol=2**-20, atol=2**-20), name
    assert "base" in read_gguf(out).metadata["loratool"]


def test_a_base_is_named_or_it_is_said(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(DATA / "lora_linear", source)
    config = json.loads((source / "adapter_config.json").read_text())
    for base, is_named in (("me/base", True), ("/somewhere/base", False)):
        config["base_model_name_or_path"] = base
        (source / "adapter_config.json").write_text(json.dumps(config))
        out = tmp_path / f"{is_named}.gguf"
        (row,) = lt.convert([source], to="gguf", base=source / "base", output=out).adapters
        assert any("does not name its base" in note for note in row.notes) != is_named
        assert (lt.inspect(out).adapter.base_model == base) == is_named


def test_weights_of_a_base_are_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([SAMPLE], base=DATA / "lora_linear" / "base", output=tmp_path / "merged.gguf")
    assert caught.value.code == "LT-225"
