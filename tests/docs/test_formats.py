"""docs/formats.md is true: files are read by its rules alone, and give the tensors back.

Nothing of loratool reads anything here: struct, json, zlib, hashlib, numpy and fractions do.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loratool as lt

BITS = {"BF16": np.dtype("<i2"), "F32": np.dtype("<i4")}


def safetensors(path: Path) -> tuple[dict[str, Any], dict[str, bytes], bytes]:
    """Header, tensor -> bytes, and the bytes of length and header."""
    raw = path.read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    header, start = json.loads(raw[8 : 8 + size]), 8 + size
    found = {k: raw[start + v["data_offsets"][0] : start + v["data_offsets"][1]]
             for k, v in header.items() if k != "__metadata__"}  # fmt: skip
    return header, found, raw[:start]


def checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    headers: dict[str, Any] = {}
    data: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, found, _ = safetensors(path)
        headers |= header
        data |= found
    return headers, data


def table_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """Record, table and patches of a patch file."""
    header, data, _ = safetensors(path)
    assert all(v["dtype"] == "U8" for k, v in header.items() if k != "__metadata__")
    table = json.loads(zlib.decompress(data.pop("loratool.patches")))
    assert table["version"] == 1
    return json.loads(header["__metadata__"]["loratool"]), table, data


def blocks(view: tuple[int, int], elements: int) -> list[slice]:
    rows, columns = view
    if columns > 65536:
        cells = range(0, columns, elements)
        return [slice(r * columns + c, r * columns + min(c + elements, columns))
                for r in range(rows) for c in cells]  # fmt: skip
    height = max(16, elements // columns)
    return [slice(r * columns, min(r + height, rows) * columns) for r in range(0, rows, height)]


def digest(bits: np.ndarray, cuts: list[slice]) -> str:
    each = [hashlib.sha256(bits[cut].tobytes()).digest() for cut in cuts]
    return hashlib.sha256(b"".join(each)).hexdigest()


def patched(bits: np.ndarray, patch: bytes, cuts: list[slice]) -> np.ndarray:
    out = bits.copy()
    (count,) = struct.unpack_from("<Q", patch)
    assert count == len(cuts)
    sizes = struct.unpack_from(f"<{count}Q", patch, 8)
    at = 8 + 8 * count
    for cut, size in zip(cuts, sizes, strict=True):
        if size:
            places, differences = page(patch[at : at + size], out[cut])
            out[cut.start + places] += differences
        at += size
    assert at == len(patch)
    return out


def page(raw: bytes, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    form, changed, gap_bytes, difference_bytes = struct.unpack_from("<cQQQ", raw)
    assert len(raw) == 25 + gap_bytes + difference_bytes
    stored = changed if form == b"S" else len(block)
    width = block.dtype.itemsize
    planes = np.frombuffer(zlib.decompress(raw[25 + gap_bytes :]), np.uint8)
    numbers = np.ascontiguousarray(planes.reshape(width, stored).T).view(f"<u{width}")[:, 0]
    half = (numbers >> 1).astype(block.dtype)
    differences = np.where(numbers & 1, -half - 1, half).astype(block.dtype)
    if form == b"D":
        assert gap_bytes == 0 and changed == np.count_nonzero(differences)
        return np.arange(stored), differences
    places, place, gap = [], -1, 0
    for byte in zlib.decompress(raw[25 : 25 + gap_bytes]):
        gap += byte
        if byte < 255:
            place, gap = place + gap + 1, 0
            places.append(place)
    assert len(places) == changed
    return np.array(places), differences


def exact_sum(bits: np.ndarray, shape: tuple[int, int], terms: list[tuple[float, Any, Any]],
              rows: range) -> np.ndarray:  # fmt: skip
    """Bit patterns of bfloat16 of W + Σ c·B·A, rounded once, in some rows."""
    own = (bits.astype(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    out = bits.reshape(shape).copy()
    for i in rows:
        for j in range(shape[1]):
            total = Fraction(float(own[i, j]))
            for c, b, a in terms:
                total += Fraction(c) * sum(Fraction(float(x)) * Fraction(float(y))
                                           for x, y in zip(b[i], a[:, j], strict=True))  # fmt: skip
            if total != Fraction(float(own[i, j])):
                out[i, j] = bfloat16(total)
    return out.reshape(-1)


def bfloat16(value: Fraction) -> int:
    """The bit pattern of the nearest bfloat16, ties to even (of numbers in its normal range)."""
    size = abs(value)
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    while Fraction(2) ** exponent > size:
        exponent -= 1
    steps = round(size / Fraction(2) ** (exponent - 7))  # Python rounds ties to even
    if steps == 256:
        steps, exponent = 128, exponent + 1
    pattern = (exponent + 127) << 7 | (steps - 128)
    return pattern - 65536 if value < 0 and (pattern := pattern | 0x8000) else pattern


def factors(folder: Path, module: str) -> tuple[Any, Any]:
    header, data, _ = safetensors(folder / "adapter_model.safetensors")
    return tuple(
        np.frombuffer(data[key], "<f4").reshape(header[key]["shape"])
        for key in (f"base_model.model.{module}.lora_{x}.weight" for x in "BA")
    )


ROWS = range(2)
MODULE = "model.layers.1.self_attn.q_proj"


def test_an_undo_file(here: Path) -> None:
    lt.merge(["style:0.8", "sql"], base="base", output="merged", save_undo="undo.safetensors")
    record, table, patches = table_of(Path("undo.safetensors"))
    assert record["operation"] == "undo"
    marker = json.loads(Path("merged/loratool.json").read_text())
    assert record["plan"] == table["plan"] == marker["plan"]
    _, base = checkpoint(Path("base"))
    _, merged = checkpoint(Path("merged"))
    assert set(table["tensors"]) == {n for n in base if base[n] != merged[n]}
    assert set(patches) <= set(table["tensors"]) and table["created"] == []
    assert {n: row["crc32"] for n, row in table["kept"].items()} == {
        n: f"{zlib.crc32(data):08x}" for n, data in base.items() if data == merged[n]}  # fmt: skip
    for one, name in zip(table["adapters"], ("style", "sql"), strict=True):
        assert one["files"] == {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
                                for p in Path(name).iterdir()}  # fmt: skip
    for name, row in table["tensors"].items():
        cuts = blocks(tuple(row["view"]), table["block_elements"])
        assert digest(np.frombuffer(base[name], "<i2"), cuts) == row["base"]
        assert digest(np.frombuffer(merged[name], "<i2"), cuts) == row["merged"]
        assert row["from"] == "sum"
    name = f"{MODULE}.weight"
    row = table["tensors"][name]
    terms = [(-w * 2.0, *factors(Path(a), MODULE)) for w, a in ((0.8, "style"), (1.0, "sql"))]
    bits = np.frombuffer(merged[name], "<i2")
    guess = exact_sum(bits, tuple(row["shape"]), terms, ROWS)
    found = patched(guess, patches[name], blocks(tuple(row["view"]), table["block_elements"]))
    own = slice(0, len(ROWS) * row["shape"][1])  # the other rows were not predicted here
    assert found[own].tolist() == np.frombuffer(base[name], "<i2")[own].tolist()
    assert guess[own].tolist() != found[own].tolist()


def test_a_residual_file(here: Path) -> None:
    lt.extract("tuned", base="base", output="lora", rank=4, save_residual="rest.safetensors")
    record, table, patches = table_of(Path("rest.safetensors"))
    assert record["operation"] == "residual"
    headers, tuned = checkpoint(Path("tuned"))
    _, base = checkpoint(Path("base"))
    assert list(table["tensors"]) and set(table["tensors"]) == set(tuned)
    files = [p for p in Path("lora").iterdir() if p.name != "loratool.json"]
    assert table["adapter"] == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    same = 0
    for name, row in table["tensors"].items():
        assert (row["dtype"], row["shape"]) == (headers[name]["dtype"], headers[name]["shape"])
        wanted = np.frombuffer(tuned[name], BITS[row["dtype"]])
        shape = row["shape"]
        view = (shape[0], shape[1]) if row["from"] == "sum" else (1, len(wanted))
        cuts = blocks(view, 524288)
        assert digest(wanted, cuts) == row["digest"]
        if row["from"] == "same":
            bits = np.frombuffer(base[name], BITS[row["dtype"]])
            bits = patched(bits, patches[name], cuts) if name in patches else bits
            assert bits.tobytes() == tuned[name]
            same += 1
    assert same == 7
    name = f"{MODULE}.weight"
    shape = tuple(table["tensors"][name]["shape"])
    terms = [(1.0, *factors(Path("lora"), MODULE))]
    guess = exact_sum(np.frombuffer(base[name], "<i2"), shape, terms, ROWS)
    own = slice(0, len(ROWS) * shape[1])
    found = patched(guess, patches[name], blocks(shape, 524288))[own]
    assert found.tolist() == np.frombuffer(tuned[name], "<i2")[own].tolist()


def test_pages_of_blocks_and_of_both_forms(tmp_path: Path) -> None:
    """Both forms, in several blocks, of rows longer and shorter than 65,536."""
    from loratool.linalg.patch import encode_patch, find_differences, pack_index

    rng = np.random.default_rng(0)
    for view in ((70, 900), (3, 70_000)):
        size = view[0] * view[1]
        wanted = rng.integers(-(2**15), 2**15, size).astype("<i2")
        predicted = wanted.copy()
        predicted[rng.integers(0, size, 40)] += 3
        predicted[: size // 3] -= rng.integers(-2, 3, size // 3).astype("<i2")
        cuts = blocks(view, 1 << 16)
        pages = []
        for cut in cuts:
            at, diff = find_differences(predicted[cut], wanted[cut])
            pages.append(encode_patch(at, diff, cut.stop - cut.start) if len(at) else b"")
        forms = {p[:1] for p in pages}
        patch = pack_index(pages) + b"".join(pages)
        assert patched(predicted, patch, cuts).tobytes() == wanted.tobytes()
        assert b"D" in forms or len(cuts) == 1
    assert b"S" in forms


def test_the_grid_is_the_programs() -> None:
    from loratool.engine import grid

    assert grid.CPU_ELEMENTS == 524288
    for view in (
        (1, 5),
        (40, 700),
        (3, 200_000),
        (2, 65_536),
        (40, 60_000),
        (100_000, 7),
        (1, 1_300_000),
    ):
        for elements in (1 << 16, grid.CPU_ELEMENTS):
            mine = [(b.start, b.start + b.numel) for b in grid.blocks(view, elements)]
            assert mine == [(c.start, c.stop) for c in blocks(view, elements)]


def sealed(record: dict[str, Any]) -> bool:
    plain = {k: v for k, v in record.items() if k != "seal"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest() == record["seal"]


def test_provenance(here: Path) -> None:
    lt.merge(["style:0.1"], base="base", output="merged", checksum=True)
    record = json.loads(Path("merged/loratool.json").read_text())
    assert sealed(record) and not sealed({**record, "operation": "other"})
    assert record["loratool"] == lt.__version__ and record["operation"] == "merge"
    files = {p.name for p in Path("merged").iterdir()} - {"loratool.json"}
    assert set(record["files"]) == files
    for name, said in record["files"].items():
        raw = (Path("merged") / name).read_bytes()
        assert said == {"bytes": len(raw), "crc32": f"{zlib.crc32(raw):08x}"}
    assert record["inputs"]["style"]["weight"] == 0.1
    for name, said in record["inputs"]["base"]["files"].items():
        path = Path("base") / name
        _, _, head = safetensors(path)
        assert said == {
            "header_sha256": hashlib.sha256(head).hexdigest(), "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }  # fmt: skip


def test_provenance_of_one_file(here: Path, data: Path) -> None:
    source = data / "diffusion" / "kohya_sgm_naming" / "adapter.safetensors"
    lt.rescale([source], factor=0.5, output="half.safetensors")
    header, _, head = safetensors(Path("half.safetensors"))
    record = json.loads(header["__metadata__"]["loratool"])
    rest = Path("half.safetensors").read_bytes()[len(head) :]
    assert sealed(record)
    assert record["data"] == {"bytes": len(rest), "crc32": f"{zlib.crc32(rest):08x}"}


def test_the_journal(here: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lt.merge(["style"], base="base", output="merged", progress=stop, threads=1)
    folder = Path("merged.loratool-partial")
    raw = (folder / ".journal").read_bytes()
    assert raw.endswith(b"\n")
    lines = []
    for text in raw[:-1].split(b"\n"):
        assert text[8:9] == b" " and text[:8] == f"{zlib.crc32(text[9:]):08x}".encode()
        lines.append(json.loads(text[9:]))
        assert json.dumps(lines[-1], sort_keys=True).encode() == text[9:]
    head, names, *finished = lines
    assert set(head) == {"loratool", "plan", "inputs"} and len(head["plan"]) == 64
    stamp = Path("base/model-00001-of-00002.safetensors").stat()
    assert head["inputs"]["base/model-00001-of-00002.safetensors"] == [
        stamp.st_dev, stamp.st_ino, stamp.st_size, stamp.st_mtime_ns, stamp.st_ctime_ns,
    ]  # fmt: skip
    assert {p.name for p in folder.iterdir()} - {".journal"} <= set(names["names"])
    assert finished
    for line in finished:
        data = (folder / line["file"]).read_bytes()
        assert line["size"] == len(data)
        assert [c for _, _, c in line["crc32"]] == [zlib.crc32(data[o : o + n])
                                                   for o, n, _ in line["crc32"]]  # fmt: skip
        assert sum(n for _, n, _ in line["crc32"]) == len(data)
