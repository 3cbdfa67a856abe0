"""extract --save-residual and merge --residual: TUNED again, bit for bit."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.linalg.patch import pack_index
from loratool.ops.residual import read_residual
from loratool.store.header import MAX_METADATA, read_header
from loratool.store.patch_file import TABLE, PatchWriter
from loratool.store.staging import Making
from loratool.store.writer import StagedOutput
from tests.make import randn, save_checkpoint
from tests.oracle.test_extract import MODELS, pair
from tests.oracle.test_extract_ranks import halve

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        out |= load_file(str(shard))
    return out


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def restore(tmp_path: Path, base: Path, tuned: Path, **options: Any) -> Any:
    """Extract with a residual, merge with it, compare every tensor's bits with TUNED's."""
    report = lt.extract(
        tuned, base=base, output=tmp_path / "lora",
        save_residual=tmp_path / "rest.safetensors", **options,
    )  # fmt: skip
    lt.merge(
        [str(tmp_path / "lora")], base=base, output=tmp_path / "again",
        residual=tmp_path / "rest.safetensors",
    )  # fmt: skip
    want, got = tensors_of(tuned), tensors_of(tmp_path / "again")
    assert set(want) == set(got)
    for name, tensor in want.items():
        assert same_bits(tensor, got[name]), name
    return report


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_rank_and_type(name: str, dtype: str, rank: int, tmp_path: Path) -> None:
    """Everything changes: linears, experts, embeddings, biases, norms, routers."""
    pair(MODELS[name], tmp_path, only_matrices=False)
    for folder in ("base", "tuned"):
        halve(tmp_path / folder, DTYPES[dtype])
    restore(tmp_path, tmp_path / "base", tmp_path / "tuned", rank=rank)


@pytest.mark.parametrize("keep", ["none", "embeddings", "all"])
def test_whatever_is_kept(keep: str, tmp_path: Path) -> None:
    pair(MODELS["llama"], tmp_path, only_matrices=False)
    restore(tmp_path, tmp_path / "base", tmp_path / "tuned", keep=[keep])


def test_mixed_types_and_shards(tmp_path: Path) -> None:
    """A float32 base in one file; TUNED in two types and three files."""
    base = {f"layers.{i}.q_proj.weight": randn(70, 50, seed=i) for i in range(4)}
    base["norm.weight"] = randn(70, seed=9)
    base["steps"] = torch.arange(5)
    tuned = {k: v + randn(*v.shape, seed=20, scale=0.01) if v.is_floating_point() else v * 7
             for k, v in base.items()}  # fmt: skip
    tuned["layers.0.q_proj.weight"] = tuned["layers.0.q_proj.weight"].bfloat16()
    tuned["layers.1.q_proj.weight"] = tuned["layers.1.q_proj.weight"].half()
    save_checkpoint(tmp_path / "base", base)
    save_checkpoint(tmp_path / "tuned", tuned, shards=3)
    restore(tmp_path, tmp_path / "base", tmp_path / "tuned", rank=2)


def test_special_values_come_back(tmp_path: Path) -> None:
    """NaN payloads, infinities, -0 and subnormals in tensors that the adapter does not touch."""
    weight = randn(40, 30, seed=1)
    odd = torch.tensor([0x7FC00123, -0x80000000, 0x7F800000, 1, -1], dtype=torch.int32)
    base = {"layers.0.q_proj.weight": weight, "table": torch.zeros(5)}
    tuned = {"layers.0.q_proj.weight": weight + randn(40, 1, seed=2) @ randn(1, 30, seed=3),
             "table": torch.zeros(5)}  # fmt: skip
    save_checkpoint(tmp_path / "base", base)
    save_checkpoint(tmp_path / "tuned", tuned)
    base["table"] = tuned["table"] = odd.view(torch.float32)
    save_checkpoint(tmp_path / "base2", base)
    save_checkpoint(tmp_path / "tuned2", tuned)
    restore(tmp_path, tmp_path / "base2", tmp_path / "tuned2", rank=1)


@pytest.mark.parametrize("keep", ["none", "embeddings"])
def test_a_grown_vocabulary(keep: str, tmp_path: Path) -> None:
    """New tokens: rows more than the base has, tied head, config.json follows."""
    config = {"model_type": "llama", "vocab_size": 50, "tie_word_embeddings": True}
    base = {"model.embed_tokens.weight": randn(50, 24, seed=1),
            "model.layers.0.self_attn.q_proj.weight": randn(24, 24, seed=2)}  # fmt: skip
    tuned = {k: v + randn(*v.shape, seed=5, scale=0.01) for k, v in base.items()}
    rows = [tuned["model.embed_tokens.weight"], randn(3, 24, seed=3)]
    tuned["model.embed_tokens.weight"] = torch.cat(rows)
    save_checkpoint(tmp_path / "base", base, config=config)
    save_checkpoint(tmp_path / "tuned", tuned, config=config | {"vocab_size": 53})
    report = restore(tmp_path, tmp_path / "base", tmp_path / "tuned", rank=4, keep=[keep])
    assert any("+3 rows" in note for note in report.notes)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["vocab_size"] == 53


def test_a_tune_that_unties_its_head(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 50, "tie_word_embeddings": True}
    base = {"model.embed_tokens.weight": randn(50, 24, seed=1),
            "model.layers.0.self_attn.q_proj.weight": randn(24, 24, seed=2)}  # fmt: skip
    tuned = {k: v + randn(*v.shape, seed=5, scale=0.01) for k, v in base.items()}
    tuned["lm_head.weight"] = base["model.embed_tokens.weight"] + randn(50, 24, seed=7)
    save_checkpoint(tmp_path / "base", base, config=config)
    save_checkpoint(tmp_path / "tuned", tuned, config=config | {"tie_word_embeddings": False})
    restore(tmp_path, tmp_path / "base", tmp_path / "tuned", rank=4)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


def small_pair(tmp_path: Path) -> tuple[Path, Path]:
    base = {f"layers.{i}.q_proj.weight": randn(600, 1000, seed=i).bfloat16() for i in range(2)}
    tuned = {k: (v.float() + randn(*v.shape, seed=5, scale=0.01)).bfloat16()
             for k, v in base.items()}  # fmt: skip
    return save_checkpoint(tmp_path / "base", base), save_checkpoint(tmp_path / "tuned", tuned)


def test_another_sharding_of_the_base_will_do(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    restore(tmp_path, base, tuned, rank=4)
    cut = save_checkpoint(tmp_path / "cut", tensors_of(base), shards=2)
    lt.merge([str(tmp_path / "lora")], base=cut, output=tmp_path / "third",
             residual=tmp_path / "rest.safetensors", threads=3, chunk_bytes=1 << 20)  # fmt: skip
    want, got = tensors_of(tuned), tensors_of(tmp_path / "third")
    assert all(same_bits(want[name], got[name]) for name in want)


def test_same_bytes_for_any_threads(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    for threads in (1, 4):
        lt.extract(tuned, base=base, output=tmp_path / f"l{threads}", rank=4, threads=threads,
                   save_residual=tmp_path / f"r{threads}.safetensors")  # fmt: skip
    files = [(tmp_path / f"r{t}.safetensors").read_bytes() for t in (1, 4)]
    assert files[0] == files[1]


def test_the_residual_shrinks_with_the_rank(tmp_path: Path) -> None:
    weight = randn(300, 200, seed=1, scale=0.02).bfloat16()
    change = randn(300, 8, seed=2) @ randn(8, 200, seed=3) * 1e-3
    base = save_checkpoint(tmp_path / "base", {"layers.0.q_proj.weight": weight})
    tuned = save_checkpoint(
        tmp_path / "tuned", {"layers.0.q_proj.weight": (weight.float() + change).bfloat16()}
    )
    elements = []
    for rank in (1, 4, 8, 200):
        report = lt.extract(tuned, base=base, output=tmp_path / f"l{rank}", rank=rank,
                            save_residual=tmp_path / f"r{rank}.safetensors")  # fmt: skip
        assert report.residual is not None
        elements.append(report.residual.elements)
    assert elements == sorted(elements, reverse=True)
    assert elements[-1] == 0  # full rank is exact by itself
    assert elements[2] < elements[0] / 4


def refused(code: str, *args: Any, **options: Any) -> None:
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge(*args, **options)
    assert caught.value.code == code


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    restore(tmp_path, base, tuned, rank=4)
    rest, out = tmp_path / "rest.safetensors", tmp_path / "out"
    lt.extract(tuned, base=base, output=tmp_path / "other", rank=3)
    lora = str(tmp_path / "lora")
    refused("LT-486", [str(tmp_path / "other")], base=base, output=out, residual=rest)
    refused("LT-236", [f"{lora}:0.5"], base=base, output=out, residual=rest)
    refused("LT-236", [lora, lora], base=base, output=out, residual=rest)
    refused("LT-237", [lora], base=base, output=out, residual=rest, dtype="float32")
    refused("LT-398", [lora], base=base, output=out, residual=base / "model.safetensors")
    wrong = tensors_of(base)
    wrong["layers.1.q_proj.weight"][599, 999] *= 2
    save_checkpoint(tmp_path / "wrong", wrong)
    refused("LT-805", [lora], base=tmp_path / "wrong", output=out, residual=rest)
    assert not out.exists()


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9, 0.999])
def test_a_flipped_bit_in_the_residual_shows(where: float, tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    restore(tmp_path, base, tuned, rank=4)
    rest = tmp_path / "rest.safetensors"
    data = bytearray(rest.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int(where * (len(data) - start))] ^= 0x10
    rest.write_bytes(data)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([str(tmp_path / "lora")], base=base, output=tmp_path / "out", residual=rest)
    assert caught.value.code in ("LT-399", "LT-805") and not (tmp_path / "out").exists()


def test_a_dry_run_says_so_and_a_bad_path_is_refused_first(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.extract(tuned, base=base, output=tmp_path / "lora", save_residual=tmp_path / "rest")
    assert caught.value.code == "LT-235" and not (tmp_path / "lora").exists()
    taken = tmp_path / "taken.safetensors"
    save_file({"x": torch.zeros(1)}, str(taken))
    with pytest.raises(lt.LoratoolError) as caught:
        lt.extract(tuned, base=base, output=tmp_path / "lora", save_residual=taken)
    assert caught.value.code == "LT-501" and not (tmp_path / "lora").exists()


def rewritten(path: Path, change: Any) -> Path:
    """A patch file with another table."""
    tensors = load_file(str(path))
    table = json.loads(zlib.decompress(tensors[TABLE].numpy().tobytes()))
    change(table)
    packed = bytearray(zlib.compress(json.dumps(table).encode()))
    tensors[TABLE] = torch.frombuffer(packed, dtype=torch.uint8)
    save_file(tensors, str(path), read_header(path).metadata)
    return path


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, tuned = small_pair(tmp_path)
    lora = str(tmp_path / "lora")
    changes = {
        "LT-397": lambda t: t.update(version=2),
        "LT-328": lambda t: t["tensors"].popitem(),
        "LT-486": lambda t: t["tensors"].update(x={**t["tensors"].popitem()[1], "from": "same"}),
        "LT-805": lambda t: t["tensors"]["layers.0.q_proj.weight"].update(digest="0" * 64),
    }
    restore(tmp_path, base, tuned, rank=4)
    whole = (tmp_path / "rest.safetensors").read_bytes()
    for number, change in enumerate((
        lambda row: row.update(shape=[row["shape"][0]]), lambda row: row.update(dtype="F4"),
        lambda row: row.update(shape=[3, *row["shape"][1:]]), lambda row: row.update(dtype="I64"),
    )):  # fmt: skip
        rest = tmp_path / f"form-{number}.safetensors"
        rest.write_bytes(whole)
        rewritten(rest, lambda t, f=change: f(t["tensors"]["layers.0.q_proj.weight"]))
        code = "LT-328" if number == 1 else "LT-486"
        refused(code, [lora], base=base, output=tmp_path / "out", residual=rest)
    for code, change in changes.items():
        rest = tmp_path / f"{code}.safetensors"
        rest.write_bytes(whole)
        rewritten(rest, change)
        if code == "LT-486":
            tensors = load_file(str(rest))
            tensors["x"] = tensors.pop("layers.1.q_proj.weight")
            save_file(tensors, str(rest), read_header(rest).metadata)
        refused(code, [lora], base=base, output=tmp_path / "out", residual=rest)
    undo = tmp_path / "undo.safetensors"
    lt.merge([lora], base=base, output=tmp_path / "m", save_undo=undo)
    refused("LT-398", [lora], base=base, output=tmp_path / "out", residual=undo)
    rewritten(undo, lambda t: t.pop("created"))
    with pytest.raises(lt.LoratoolError) as caught:
        lt.subtract([lora], merged=tmp_path / "m", output=tmp_path / "out", undo=undo)
    assert caught.value.code == "LT-328" and not (tmp_path / "out").exists()


def many(count: int) -> dict[str, torch.Tensor]:
    """One matrix, and many expert biases with names as long as they come."""
    tensors = {f"model.layers.{i // 512}.block_sparse_moe.experts.{i % 512}.w1.bias":
               torch.full((2,), float(i)) for i in range(count)}  # fmt: skip
    return tensors | {"model.layers.0.self_attn.q_proj.weight": randn(16, 16, seed=1)}


def test_a_table_of_more_tensors_than_metadata_hold(tmp_path: Path) -> None:
    """60,000 of them: 13 MB of JSON, of which 1 MB is all that metadata may have."""
    names = list(many(60_000))
    row = {"from": "same", "dtype": "BF16", "shape": [2], "digest": ""}
    table = {"adapter": {}, "bind": {}, "config": {}, "tensors": {
        name: row | {"digest": hashlib.sha256(name.encode()).hexdigest()} for name in names
    }}  # fmt: skip
    path = tmp_path / "rest.safetensors"
    output = StagedOutput(path, Making(is_folder=False, plan_id=None))
    with output, PatchWriter(output) as writer:
        for name in names[::2]:
            writer.add(name, (pack_index([b"page"]), b"page"))
        writer.write(table, {"operation": "residual"})
        output.commit()
    assert len(json.dumps(table)) > 10 * MAX_METADATA
    found = read_residual(path)
    assert list(found.tensors) == names
    for number, (name, entry) in enumerate(found.tensors.items()):
        assert entry.digest == table["tensors"][name]["digest"]
        assert (entry.patch is not None) == (number % 2 == 0)


@pytest.mark.slow
def test_thousands_of_tensors_come_back(tmp_path: Path) -> None:
    base = many(6000)
    tuned = {k: v + (0.01 if i % 3 != 1 else 0.0) for i, (k, v) in enumerate(base.items())}
    save_checkpoint(tmp_path / "base", base)
    save_checkpoint(tmp_path / "tuned", tuned)
    restore(tmp_path, tmp_path / "base", tmp_path / "tuned", rank=2, keep=["none"])
    undo = tmp_path / "undo.safetensors"
    lora = str(tmp_path / "lora")
    lt.merge([lora], base=tmp_path / "base", output=tmp_path / "m", save_undo=undo)
    lt.subtract([lora], merged=tmp_path / "m", output=tmp_path / "back", undo=undo)
    back = tensors_of(tmp_path / "back")
    assert all(same_bits(back[name], tensor) for name, tensor in base.items())


@pytest.fixture
def completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge with a residual that puts in all there is: another type, new tensors, one less."""
    base = {"layers.0.q_proj.weight": randn(70, 50, seed=1), "same": randn(9, seed=2),
            "layers.0.norm.weight": randn(50, seed=3), "steps": torch.arange(5),
            "cast": randn(40, seed=4).bfloat16().float(),
            "score.weight": randn(3, 50, seed=6)}  # fmt: skip
    tuned = {k: v.clone() for k, v in base.items() if k != "score.weight"}
    tuned["layers.0.q_proj.weight"] += randn(70, 50, seed=5, scale=0.01)
    tuned["layers.0.norm.weight"] += 1
    tuned["steps"] *= 7
    tuned["cast"] = tuned["cast"].bfloat16()
    tuned["new"] = randn(6, 7, seed=7).half()
    save_checkpoint(tmp_path / "base", base, shards=2)
    save_checkpoint(tmp_path / "tuned", tuned)
    restore(tmp_path, tmp_path / "base", tmp_path / "tuned", rank=2, keep=["none"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_a_plan_counts_what_the_residual_makes_of_it(completed: Path) -> None:
    """q, norm and steps change, ``same`` stays, ``cast`` is of another type, ``new`` is new."""
    report = lt.merge([str(completed / "lora")], base=completed / "base", output=completed / "x",
                      residual=completed / "rest.safetensors", dry_run=True)  # fmt: skip
    found = (report.changed, report.copied, report.cast, report.created)
    assert found == (3, 1, 1, 1)


def test_taking_the_adapter_out_leaves_the_residual_in(completed: Path) -> None:
    report = lt.subtract([str(completed / "lora")], merged=completed / "again",
                         output=completed / "x", dry_run=True)  # fmt: skip
    assert "rest.safetensors was put in too, and stays in" in report.notes


def test_verify_repeats_it(completed: Path) -> None:
    """By the record, with the inputs named, and of weights that say nothing of themselves."""
    named: dict[str, Any] = {"base": completed / "base", "adapters": [str(completed / "lora")]}
    rest = completed / "rest.safetensors"
    for found in (
        lt.verify(completed / "again"), lt.verify(completed / "again", **named),
        lt.verify(completed / "tuned", residual=rest, **named),
    ):  # fmt: skip
        assert (found.verdict, found.identical, found.missing, found.unexpected) == (
            "identical", 6, (), ()
        )  # fmt: skip
    (completed / "again" / "loratool.json").unlink()
    assert lt.verify(completed / "again", **named).verdict == "differs"


def test_verify_sees_every_bit(completed: Path) -> None:
    """One bit of any tensor, whatever becomes of it, is one element of that tensor."""
    files = sorted((completed / "again").glob("*.safetensors"))
    names = [(file, ref) for file in files for ref in read_header(file).tensors]
    assert len(names) == 6
    for path, ref in names:
        before = path.read_bytes()
        spoiled = bytearray(before)
        spoiled[ref.start + ref.nbytes - ref.nbytes // ref.numel] ^= 1
        path.write_bytes(spoiled)
        found = lt.verify(completed / "again")
        assert [(d.name, d.elements) for d in found.differing] == [(ref.name, 1)]
        path.write_bytes(before)


def test_the_residual_of_a_record_is_checked_by_its_content(completed: Path) -> None:
    rest = completed / "rest.safetensors"
    kept = rest.read_bytes()
    rest.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(lt.LoratoolError) as caught:
        lt.verify(completed / "again")
    assert (caught.value.code, caught.value.hint) == ("LT-459", "--residual PATH names another")
    rest.unlink()
    with pytest.raises(lt.LoratoolError) as caught:
        lt.verify(completed / "again")
    assert (caught.value.code, caught.value.hint) == ("LT-254", "--residual PATH")
    (completed / "moved.safetensors").write_bytes(kept)
    found = lt.verify(completed / "again", residual=completed / "moved.safetensors")
    assert found.verdict == "identical"
