"""LoRA adapters of llama.cpp: against PEFT, byte for byte, and damaged ones."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratool as lt
from loratool.dialects import open_adapter
from loratool.store.checkpoint import open_checkpoint

DATA = Path(__file__).parents[1] / "data" / "llm"
SAMPLE = DATA / "gguf_lora" / "adapter.gguf"  # made of this one, in Meta's order of rows:
ORIGIN = DATA / "lora_linear"


Q8_0 = np.dtype([("factor", "<f2"), ("codes", "i1", 32)])  # a block of ggml
KINDS = {"f4": 0, "f2": 1, "u1": 2, Q8_0.str[1:]: 8}


def in_codes(values: np.ndarray) -> np.ndarray:
    """Blocks of Q8_0."""
    runs = values.reshape(*values.shape[:-1], -1, 32)
    made = np.zeros(runs.shape[:-1], Q8_0)
    made["factor"] = (np.abs(runs).max(-1) / 127).astype("f2")
    made["codes"] = np.rint(runs / made["factor"].astype("f4")[..., None]).clip(-127, 127)
    return made


def numbers(blocks: np.ndarray) -> np.ndarray:
    """What they stand for: a product of two numbers, exact in float32."""
    found = blocks["codes"].astype("f4") * blocks["factor"].astype("f4")[..., None]
    return found.reshape(*found.shape[:-2], -1)


def gguf(path: Path, values: dict[str, str | float], tensors: dict[str, np.ndarray]) -> Path:
    """A GGUF file, written by its specification."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, value in values.items():
        is_text = isinstance(value, str)
        head += text(key) + struct.pack("<I", 8 if is_text else 6)
        head += text(value) if isinstance(value, str) else struct.pack("<f", value)
    body = b""
    for name, tensor in tensors.items():
        *rows, cols = tensor.shape
        shape = (*rows, cols * (1 if tensor.dtype.names is None else 32))
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", KINDS[tensor.dtype.str[1:]], len(body))
        body += tensor.tobytes() + bytes(-tensor.nbytes % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


VALUES: dict[str, str | float] = {
    "general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora",
    "adapter.lora.alpha": 6.0,
}  # fmt: skip


def factors(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"blk.0.attn_q.weight.lora_a": random.normal(size=(2, 16)).astype("f4"),
            "blk.0.attn_q.weight.lora_b": random.normal(size=(16, 2)).astype("f4")}  # fmt: skip


def test_a_sample_merges_to_what_peft_merged_of_its_origin(tmp_path: Path) -> None:
    lt.merge([SAMPLE], base=ORIGIN / "base", output=tmp_path / "out")
    got = load_file(str(tmp_path / "out" / "model.safetensors"))
    theirs = load_file(str(ORIGIN / "merged.safetensors"))
    assert all(np.abs(got[k] - theirs[k]).max() <= 2e-7 for k in got)
    lt.merge([SAMPLE], base=ORIGIN / "base", output=tmp_path / "exact", exact=True)


def test_a_sample_becomes_its_origin_again(tmp_path: Path) -> None:
    """Rows of q and k lie head by head in another order; heads are the base's."""
    lt.convert([SAMPLE], to="peft", base=ORIGIN / "base", output=tmp_path / "peft")
    got = load_file(str(tmp_path / "peft" / "adapter_model.safetensors"))
    old = load_file(str(ORIGIN / "adapter_model.safetensors"))
    assert got.keys() == old.keys() and all(np.array_equal(got[k], old[k]) for k in old)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.convert([SAMPLE], to="peft", output=tmp_path / "none")
    assert caught.value.code == "LT-460" and "--base" in str(caught.value.hint)


def test_it_goes_to_mlx(tmp_path: Path) -> None:
    lt.convert([SAMPLE], to="mlx", base=ORIGIN / "base", output=tmp_path / "mlx")
    lt.merge([tmp_path / "mlx"], base=ORIGIN / "base", output=tmp_path / "out")
    got = load_file(str(tmp_path / "out" / "model.safetensors"))
    theirs = load_file(str(ORIGIN / "merged.safetensors"))
    assert all(np.abs(got[k] - theirs[k]).max() <= 2e-7 for k in got)


@pytest.mark.parametrize(("alpha", "scaling"), [(6.0, 3.0), (0.0, 1.0)])
def test_other_architectures_keep_their_rows(tmp_path: Path, alpha: float, scaling: float) -> None:
    """Alpha over the rank of each tensor; none is a factor of 1."""
    tensors = factors()
    path = gguf(tmp_path / "a.gguf", VALUES | {"adapter.lora.alpha": alpha}, tensors)
    (spec,) = open_adapter(path).specs
    assert spec.name == "model.layers.0.self_attn.q_proj.weight" and spec.scaling == scaling
    (module,) = lt.open(path)
    want = scaling * tensors["blk.0.attn_q.weight.lora_b"] @ tensors["blk.0.attn_q.weight.lora_a"]
    assert np.abs(module.delta().numpy() - want).max() <= 1e-5


def test_experts_and_embeddings(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    tensors = {
        "blk.1.ffn_up_exps.weight.lora_a": random.normal(size=(3, 2, 8)).astype("f4"),
        "blk.1.ffn_up_exps.weight.lora_b": random.normal(size=(3, 6, 2)).astype("f4"),
        "token_embd.weight.lora_a": random.normal(size=(10, 2)).astype("f4"),
        "token_embd.weight.lora_b": random.normal(size=(8, 2)).astype("f4"),
    }
    values = VALUES | {"general.architecture": "qwen2moe"}
    adapter = open_adapter(gguf(tmp_path / "a.gguf", values, tensors))
    names = [s.module for s in adapter.specs]
    assert names == [*(f"model.layers.1.mlp.experts.{n}.up_proj" for n in range(3)),
                     "model.embed_tokens"]  # fmt: skip
    deltas = {m.name: m.delta().numpy() for m in lt.open(tmp_path / "a.gguf")}
    a, b = (tensors[f"blk.1.ffn_up_exps.weight.lora_{s}"] for s in "ab")
    delta = deltas["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert np.abs(delta - 3 * b[2] @ a[2]).max() < 1e-5
    assert adapter.specs[-1].fields["lora_A"].shape == (2, 10)


def coded_file(folder: Path, architecture: str) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter in Q8_0 with norms, as the converter of llama.cpp and mergekit write it."""
    random = np.random.default_rng(2)
    sizes = {
        "attn_q.weight.lora_a": (32, 64),
        "attn_q.weight.lora_b": (16, 32),
        "ffn_up_exps.weight.lora_a": (3, 32, 64),
        "ffn_up_exps.weight.lora_b": (3, 8, 32),
    }
    tensors = {f"blk.0.{k}": in_codes(random.normal(size=size)) for k, size in sizes.items()}
    tensors |= {
        f"token_embd.weight.lora_{k}": in_codes(random.normal(size=size))
        for k, size in (("a", (10, 32)), ("b", (64, 32)))
    }
    wide = ("attn_output", random.normal(size=(48, 64)), random.normal(size=(64, 48)))
    tensors[f"blk.0.{wide[0]}.weight.lora_a"] = in_codes(wide[1])
    tensors[f"blk.0.{wide[0]}.weight.lora_b"] = wide[2].astype("f2")  # 48 is no whole of 32
    for name in ("blk.0.attn_norm.weight", "output_norm.weight"):
        tensors[name] = random.normal(size=64).astype("f4")
    values = VALUES | {"general.architecture": architecture}
    return gguf(folder / "coded.gguf", values, tensors), {
        k: numbers(v) if v.dtype.names else v.astype("f4") for k, v in tensors.items()
    }


def test_factors_in_codes_and_norms(tmp_path: Path) -> None:
    """Q8_0 is what its blocks stand for; norms replace those of the base, and stay in the file."""
    path, plain = coded_file(tmp_path, "qwen2moe")
    adapter = open_adapter(path)
    assert [r.name for r in adapter.replacements] == [
        "model.layers.0.input_layernorm.weight", "model.norm.weight"]  # fmt: skip
    found = {m.name: m.delta().numpy() for m in lt.open(path)}

    def exact(name: str, a: np.ndarray, b: np.ndarray) -> None:
        want = 6 / b.shape[-1] * b.astype("f8") @ a.astype("f8")
        sizes = 6 / b.shape[-1] * np.abs(b.astype("f8")) @ np.abs(a.astype("f8"))
        assert (np.abs(found[name] - want) <= 2**-18 * sizes).all(), name

    for module, leaf in (("self_attn.q_proj", "attn_q"), ("self_attn.o_proj", "attn_output")):
        exact(f"model.layers.0.{module}.weight",
              *(plain[f"blk.0.{leaf}.weight.lora_{k}"] for k in "ab"))  # fmt: skip
    for number in range(3):
        exact(f"model.layers.0.mlp.experts.{number}.up_proj.weight",
              *(plain[f"blk.0.ffn_up_exps.weight.lora_{k}"][number] for k in "ab"))  # fmt: skip
    table = plain["token_embd.weight.lora_a"], plain["token_embd.weight.lora_b"]
    want = 6 / 32 * table[0].astype("f8") @ table[1].astype("f8").T
    assert np.abs(found["model.embed_tokens.weight"] - want).max() <= 1e-5 * np.abs(want).max()
    report = lt.rescale([path], -0.5, output=tmp_path / "half.gguf").adapters[0]
    assert any("2 replaced tensors do not scale without the base" in note for note in report.notes)
    half = open_adapter(tmp_path / "half.gguf")
    again = {m.name: m.delta().numpy() for m in lt.open(tmp_path / "half.gguf")}
    assert all(np.abs(2 * again[k] + found[k]).max() <= 1e-6 for k in found)
    assert [r.name for r in half.replacements] == [r.name for r in adapter.replacements]
    lt.convert([path], to="gguf", output=tmp_path / "same.gguf")
    same = {m.name: m.delta().numpy() for m in lt.open(tmp_path / "same.gguf")}
    assert all(np.array_equal(same[k], found[k]) for k in found)
    assert [r.name for r in open_adapter(tmp_path / "same.gguf").replacements] == [
        r.name for r in adapter.replacements]  # fmt: skip
    lt.convert([path], to="peft", output=tmp_path / "peft")
    tensors = load_file(str(tmp_path / "peft" / "adapter_model.safetensors"))
    stem = "base_model.model.model"
    assert np.array_equal(tensors[f"{stem}.norm.weight"], plain["output_norm.weight"])
    assert np.array_equal(tensors[f"{stem}.layers.0.self_attn.q_proj.lora_A.weight"],
                          plain["blk.0.attn_q.weight.lora_a"])  # fmt: skip


def test_gguf_itself_stands_for_the_same(tmp_path: Path) -> None:
    """To the bit; run where the package is."""
    library = pytest.importorskip("gguf")
    path, plain = coded_file(tmp_path, "llama")
    for tensor in library.GGUFReader(str(path)).tensors:
        theirs = library.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(theirs.reshape(plain[tensor.name].shape), plain[tensor.name])
    made = library.quants.quantize(np.random.default_rng(4).normal(size=(32, 64)).astype("f4"),
                                   library.GGMLQuantizationType.Q8_0)  # fmt: skip
    pair = {f"blk.0.attn_v.weight.lora_{k}": v for k, v in (
        ("a", made.view(Q8_0).reshape(32, 2)), ("b", np.eye(32, dtype="f4")))}  # fmt: skip
    file = gguf(tmp_path / "b.gguf", VALUES | {"adapter.lora.alpha": 32.0}, pair)
    (module,) = lt.open(file)
    theirs = library.dequantize(made, library.GGMLQuantizationType.Q8_0)
    assert np.array_equal(module.delta().numpy(), theirs)


def test_norms_that_have_one_added_are_refused(tmp_path: Path) -> None:
    tensors = factors() | {"output_norm.weight": np.ones(16, "f4")}
    path = gguf(tmp_path / "a.gguf", VALUES | {"general.architecture": "gemma"}, tensors)
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(path)
    assert caught.value.code == "LT-415" and caught.value.key == "output_norm.weight"


@pytest.mark.parametrize(
    ("values", "tensors", "code"),
    [({"general.architecture": "mamba"}, factors(), "LT-401"),
     ({"adapter.type": "control"}, factors(), "LT-401"),
     ({"general.type": "model"}, factors(), "LT-491"),
     ({}, {"blk.0.attn_q.weight": np.zeros((2, 2), "f4")}, "LT-415"),
     ({}, {"blk.0.ssm_in.weight.lora_a": np.zeros((2, 2), "f4"),
           "blk.0.ssm_in.weight.lora_b": np.zeros((2, 2), "f4")}, "LT-415"),
     ({}, {"blk.0.attn_q.weight.lora_a": np.zeros((2, 2), "f4")}, "LT-362"),
     ({}, {"blk.0.attn_q.weight.lora_a": np.zeros((2, 32), "u1")}, "LT-401")],
)  # fmt: skip
def test_what_is_not_read_is_refused(
    tmp_path: Path, values: dict[str, str], tensors: dict[str, np.ndarray], code: str
) -> None:
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(gguf(tmp_path / "a.gguf", VALUES | values, tensors))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("size", "code"),
    [(2, "LT-303"), (30, "LT-303"), (90, "LT-303"), (200, "LT-303"), (400, "LT-312"),
     (-8, "LT-312")],
)  # fmt: skip
def test_a_cut_file_is_refused(tmp_path: Path, size: int, code: str) -> None:
    path = gguf(tmp_path / "a.gguf", VALUES, factors())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(path)
    assert caught.value.code == code


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    os.mkfifo(path)
    for look in (lambda: open_adapter(path), lambda: open_checkpoint(path)):
        with pytest.raises(lt.LoratoolError) as caught:
            look()
        assert caught.value.code == "LT-901"


PAIR = ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b")
FAULTS: dict[str, tuple[dict[str, str], dict[str, tuple[int, ...]], str]] = {
    "kind": ({"adapter.type": "control"}, {}, "no"),
    "odd-names": ({}, {"blk.0.attn_q.bias": (4,)}, "no"),
    "halves": ({}, {"blk.0.attn_v.weight.lora_b": (16, 2)}, "no"),
    "ranks": ({}, {"blk.0.attn_v.weight.lora_a": (3, 16), "blk.0.attn_v.weight.lora_b": (16, 2)},
              "no"),
    "left-norms": ({}, {"blk.0.attn_norm.weight": (16,)}, "wrong"),
    "own-head": ({}, {"output.weight.lora_a": (2, 16), "output.weight.lora_b": (9, 2)}, "unsure"),
    "unknown-tensors": ({}, {"blk.0.ssm_in.weight.lora_a": (2, 16),
                             "blk.0.ssm_in.weight.lora_b": (9, 2)}, "unsure"),
}  # fmt: skip


@pytest.mark.parametrize("rule", FAULTS)
def test_what_llama_cpp_makes_of_its_own_file(tmp_path: Path, rule: str) -> None:
    """A file with a fault, and one without; also of what loratool does not read."""
    values, more, verdict = FAULTS[rule]
    tensors = factors() | {name: np.ones(shape, "f4") for name, shape in more.items()}
    found = lt.check(gguf(tmp_path / "a.gguf", VALUES | values, tensors), program="llama.cpp")
    assert found.verdict == verdict and [f.rule for f in found.findings] == [rule]
    assert found.ok is (verdict in ("yes", "unsure"))
    good = lt.check(gguf(tmp_path / "b.gguf", VALUES, factors()), program="llama.cpp")
    assert good.verdict == "yes" and set(good.counts) == {"loads"}


def test_check_of_what_only_llama_cpp_reads(tmp_path: Path) -> None:
    """Codes, other models; a base is no adapter."""
    coded = {name: np.zeros((2, 32), "u1") for name in PAIR}
    found = lt.check(gguf(tmp_path / "a.gguf", VALUES, coded), program="llama.cpp")
    assert found.verdict == "no"  # of ranks 2 and 32
    other = gguf(tmp_path / "b.gguf", VALUES | {"general.architecture": "mamba"}, factors())
    found = lt.check(other, program="llama.cpp")
    assert found.verdict == "yes" and "does not read it" in found.notes[0]
    with pytest.raises(lt.LoratoolError) as caught:
        lt.check(gguf(tmp_path / "c.gguf", VALUES | {"general.type": "model"}, factors()),
                 program="llama.cpp")  # fmt: skip
    assert caught.value.code == "LT-491"


def test_gguf_itself_reads_the_same(tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    found = {t.name: t.data for t in library.GGUFReader(str(SAMPLE)).tensors}
    assert set(open_adapter(SAMPLE).key_order) == set(found)
