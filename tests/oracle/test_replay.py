"""`verify OUT`: an output is checked by what its own provenance says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from tests.make import randn, random_factors, save_adapter, save_checkpoint

SHAPES = {"a.q": (300, 200), "a.up": (64, 300)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base, style and sql; the working folder is another one."""
    tensors = {f"{n}.weight": randn(*s, seed=i, scale=0.02).bfloat16()
               for i, (n, s) in enumerate(SHAPES.items())}  # fmt: skip
    save_checkpoint(tmp_path / "base", tensors, shards=2)
    for k, name in enumerate(("style", "sql")):
        save_adapter(tmp_path / name, random_factors(SHAPES, rank=4, seed=k, scale=0.05))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def merge(place: Path, **options: object) -> Path:
    texts = [f"{place / 'style'}:0.8", str(place / "sql")]
    lt.merge(texts, base=place / "base", output=place / "m", **options)  # type: ignore[arg-type]
    return place / "m"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exact": True},
        {"rounding": "stochastic", "seed": 11},
        {"dtype": "float16"},
        {"mean": True},
        {"skip": ["q"]},
        {"shard_size": "50KB"},
        {"checksum": True},
    ],
    ids=str,
)
def test_everything_that_changed_bytes_is_repeated(options: dict, place: Path) -> None:  # type: ignore[type-arg]
    report = lt.verify(merge(place, **options))
    assert report.verdict == "identical" and report.tensors == 2


@pytest.mark.parametrize(
    ("inside", "base", "style"), [("base", ".", "../style"), ("base/in", "..", "../../style"),
                                  ("style", "../base", ".")],
)  # fmt: skip
def test_inputs_named_by_dots_are_found(
    inside: str, base: str, style: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were recorded as ``input`` and ``..``; an extracted adapter named no base."""
    (place / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(place / inside)
    lt.merge([style], base=base, output=place / "m")
    monkeypatch.chdir(place)
    assert set(json.loads(Path("m/loratool.json").read_text())["inputs"]) == {"base", "style"}
    assert lt.verify("m").verdict == "identical"
    monkeypatch.chdir(place / inside)
    lt.extract(place / "m", base=base, rank=4, output=place / "x")
    config = json.loads((place / "x" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"


def test_rounding_is_taken_from_the_record_when_inputs_are_named(place: Path) -> None:
    out = merge(place, rounding="stochastic", seed=3)
    texts = [f"{place / 'style'}:0.8", str(place / "sql")]
    assert lt.verify(out, base=place / "base", adapters=texts).verdict == "identical"
    (out / "loratool.json").write_text("{}")
    assert lt.verify(out, base=place / "base", adapters=texts).verdict != "identical"


def test_subtractions_and_swaps_too(place: Path) -> None:
    out = merge(place)
    lt.subtract([f"{place / 'style'}:0.8"], merged=out, output=place / "s")
    lt.swap(f"{place / 'style'}:0.8", str(place / "sql"), merged=out, output=place / "w")
    assert lt.verify(place / "s").verdict == lt.verify(place / "w").verdict == "identical"


SAMPLES = Path(__file__).parents[1] / "data" / "llm"


def spoil(folder: Path) -> None:
    """One bit of one weight."""
    name, file = next((n, f) for f in folder.glob("*.safetensors") for n in load_file(f)
                      if n.endswith("q_proj.weight"))  # fmt: skip
    tensors = load_file(file)
    tensors[name].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, str(file), metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["lora_dora", "lora_modules_to_save", "oft"])
@pytest.mark.parametrize("command", ["subtract", "swap"])
def test_what_was_taken_out_with_the_base_is_put_back_with_it(
    command: str, name: str, place: Path
) -> None:
    """The base that the changes refer to is an input too, and is checked as the others are."""
    source, base = SAMPLES / name, shutil.copytree(SAMPLES / name / "base", place / "first")
    merged, out = place / "merged", place / "out"
    shutil.copytree(source, place / name)
    lt.merge([place / name], base=base, output=merged)
    if command == "subtract":
        lt.subtract([place / name], merged=merged, base=base, output=out)
    else:
        lt.swap(place / name, f"{place / name}:0.5", merged=merged, base=base, output=out)
    assert lt.verify(out).verdict == "identical"
    spoil(out)
    assert lt.verify(out).verdict != "identical"
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes() + b" ")
    assert refused(4, out).code == "LT-459"


def test_the_base_of_a_split_is_repeated(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(SAMPLES / "lora_modules_to_save", place / "head")
    monkeypatch.chdir(place)
    lt.split("head", base=source / "base", output="served", skip=["embed_tokens"])
    given = {"base": source / "base"}  # the name of the base is that of the output
    assert lt.verify("served/base", **given).verdict == "identical"
    assert (
        lt.verify("served/base", **given, adapters=["head"], skip=["embed"]).verdict == "identical"
    )
    assert lt.verify("served/base", **given, adapters=["head"]).verdict == "differs"
    spoil(place / "served" / "base")
    assert lt.verify("served/base", **given).verdict != "identical"


def refused(code: int, call: Path, **options: object) -> lt.LoratoolError:
    with pytest.raises(lt.LoratoolError) as caught:
        lt.verify(call, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == code, caught.value
    return caught.value


def test_inputs_are_checked_by_content(place: Path) -> None:
    out = merge(place, checksum=True)
    shutil.move(place / "sql", place / "kept")
    assert "sql" in refused(2, out).what
    shutil.copytree(place / "style", place / "sql")
    assert "adapter_model.safetensors" in str(refused(4, out).got)
    shutil.rmtree(place / "sql")
    shutil.move(place / "kept", place / "sql")
    shard = min((place / "base").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert shard.name in str(refused(4, out).got)


def test_no_record_nothing_to_replay(place: Path) -> None:
    out = merge(place, provenance=False)
    assert "--base" in str(refused(2, out).hint)
    assert "--base" in str(refused(2, place / "base").hint)


@pytest.mark.parametrize(
    "text",
    [
        '{"operation": "merge"}',
        '{"operation": "merge", "inputs": [], "options": {}}',
        '{"operation": "merge", "inputs": {"../x": {"weight": 1, "files": {}}}, "options": {}}',
        '{"operation": "merge", "inputs": {"style": 3}, "options": {}}',
    ],
)
def test_a_damaged_record_is_named(text: str, place: Path) -> None:
    out = merge(place)
    (out / "loratool.json").write_text(text)
    refused(4, out)


def test_names_in_a_record_are_no_paths(place: Path) -> None:
    out = merge(place)
    path = out / "loratool.json"
    record = json.loads(path.read_text())
    record["inputs"]["../" + place.name + "/style"] = record["inputs"].pop("style")
    path.write_text(json.dumps(record))
    refused(4, out)


def test_records_hold_no_paths_dates_or_threads(place: Path) -> None:
    out = merge(place, threads=3)
    text = (out / "loratool.json").read_text()
    assert str(place) not in text and "threads" not in text and "202" not in json.dumps(
        {k: v for k, v in json.loads(text).items() if k != "inputs"}
    )  # fmt: skip


def test_restored_weights_are_not_replayed(place: Path) -> None:
    style = f"{place / 'style'}:0.8"
    lt.merge([style], base=place / "base", output=place / "m",
             save_undo=place / "u.safetensors")  # fmt: skip
    lt.subtract([style], merged=place / "m", output=place / "b", undo=place / "u.safetensors")
    assert "undo" in refused(4, place / "b").what
