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
        head += text(name) + struct.pack("<I", tensor.ndim)
        head += struct.pack(f"<{tensor.ndim}Q", *tensor.shape[::-1])
        head += struct.pack("<IQ", {"f4": 0, "f2": 1, "u1": 2}[tensor.dtype.str[1:]], len(body))
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
