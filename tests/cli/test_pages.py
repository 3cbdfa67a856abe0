"""Pages say what the JSON says, hold nothing that runs, and are the same bytes every time."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.pages.blocks import Page as Blocks
from loratool.pages.blocks import Section, number
from loratool.pages.blocks import Table as Rows
from loratool.pages.heat import heat_of
from loratool.pages.measured import curves
from loratool.pages.pictures import checked_picture
from loratool.pages.render import MOST_BYTES, render
from loratool.report.families import Place, place_of
from loratool.report.spectrum import AdapterSpectrum, describe
from tests.browser.scene import HOSTILE, landscape, write_lora
from tests.pages import Page, check_harmless

from .conftest import Run


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "toy"
    lt.demo(folder)
    return folder


def values(found: list[object]) -> list[object]:
    return [pytest.approx(v, rel=1e-6) if v is not None else None for v in found]


def shown(run: Run, toy: Path, tmp_path: Path, line: str) -> tuple[Page, dict]:
    """The page and the JSON of a command that is run in both ways."""
    words = line.replace("TOY", str(toy)).split()
    first, second = (
        [w.replace("OUT", str(tmp_path / out)) for w in words] for out in ("one", "two")
    )
    file = tmp_path / "page.html"
    assert run(*first, "--html", str(file)).code == 0
    done = run(*second, "--json", "--html", str(tmp_path / "again.html"))
    assert done.code == 0, done.err
    data = file.read_bytes()
    assert len(data) <= MOST_BYTES
    again = (tmp_path / "again.html").read_bytes()
    assert data == again.replace(b">two<", b">one<").replace(b"<title>two", b"<title>one")
    for place in (str(toy), str(tmp_path)):
        assert place.encode() not in data
    page = Page(data)
    check_harmless(page)
    assert [t for t, _ in page.tags if t in ("h1", "main", "header", "footer")] == [
        "header", "h1", "main", "footer"]  # fmt: skip
    return page, json.loads(done.out)


def test_a_spectrum(run: Run, toy: Path, tmp_path: Path) -> None:
    page, said = shown(run, toy, tmp_path, "inspect TOY/style --spectrum --base TOY/base --risk")
    modules = said["spectrum"]["modules"]
    spectrum, look, risk = [t for t in page.tables if t.caption == "By module"]
    assert [c.text for c in spectrum.column("module")] == [m["name"] for m in modules]
    for head, key in (("‖ΔW‖", "norm"), ("σ₁", "sigma_1"), ("99 %", "rank_99")):
        assert [c.value for c in spectrum.column(head)] == values([m[key] for m in modules])
    rho = [m["rho"] for m in said["look"]["modules"]]
    assert [c.value for c in look.column("ρ = ‖ΔW‖/‖W‖")] == values(rho)
    assert len(risk.rows) == 1 + len(said["risk"]["modules"])
    loads = page.table("Verdict of each program's own rules")
    assert [c.text for c in loads.column("loads it")] == [p["verdict"] for p in
                                                          said["adapter"]["loads"]]  # fmt: skip


def test_two_adapters(run: Run, toy: Path, tmp_path: Path) -> None:
    page, said = shown(run, toy, tmp_path, "compare TOY/style TOY/sql")
    modules = said["modules"]
    table = page.table("By module")
    for head, key in (("cosine", "cosine"), ("φ A", "similarity_A"), ("signs ≠", "sign_conflict")):
        assert [c.value for c in table.column(head)] == values([m[key] for m in modules])
    phi_A, phi_B = [t for t in page.tables if t.kind == "heat"][-2:]
    for table, key in ((phi_A, "phi_A"), (phi_B, "phi_B")):
        read = [[float(c.text) for c in row[1:]] for row in table.rows[1:]]
        assert read == [pytest.approx(row, abs=0.005) for row in said[key]]


def test_many_adapters(run: Run, toy: Path, tmp_path: Path) -> None:
    page, said = shown(run, toy, tmp_path, "compare TOY/style TOY/sql TOY/style")
    found = [[c.text for c in row[1:]] for row in page.tables[0].rows[1:]]
    assert [[float(t) for t in row] for row in found] == [
        pytest.approx(row, abs=0.005) for row in said["matrix"]
    ]


@pytest.mark.parametrize(("line", "caption", "head", "key"), [
    ("merge TOY/style:0.5 TOY/sql --base TOY/base -o OUT", "By tensor", "loss", "loss"),
    ("merge TOY/style TOY/sql -o OUT", "By module", "‖ΔW‖", "norm"),
    ("compress TOY/style --rank 2 -o OUT", "By module", "rel. error", "relative_error"),
    ("extract TOY/tuned --base TOY/base --rank 2 -o OUT", "By module", "rel. error",
     "relative_error"),
])  # fmt: skip
def test_what_was_written(
    run: Run, toy: Path, tmp_path: Path, line: str, caption: str, head: str, key: str
) -> None:
    page, said = shown(run, toy, tmp_path, line)
    modules = (said["adapters"][0] if line.startswith("compress") else said)["modules"]
    assert [c.value for c in page.table(caption).column(head)] == values([m[key] for m in modules])
    assert len(modules) > 5
    if line.startswith(("compress", "extract")):
        assert all(len(m["sigma"]) == (8 if line.startswith("compress") else 2) for m in modules)
        pictures = page.all("svg")
        assert sum(p.get("role") == "img" for p in pictures) == 1
        assert sum(p.get("class") == "spark" for p in pictures) == len(modules)


def test_curves_end_where_most_modules_do() -> None:
    """A median of 0 has no place on a logarithmic scale, and a single value is no curve."""
    sigma = {"m.0.a": (4, 2, 1), "m.1.a": (4, 2), "m.2.a": (4, 2), "m.0.b": (3,)}
    found = AdapterSpectrum(tuple(describe(name, 3, s) for name, s in sigma.items()))
    (chart,) = curves(found)
    assert [(c.name, c.heights) for c in chart.curves] == [("a", (1, 0.5))]


def test_criteria_and_columns_say_what_there_is(run: Run, toy: Path, tmp_path: Path) -> None:
    page, _ = shown(run, toy, tmp_path, "compress TOY/style --size 30KB -o OUT --dry-run")
    assert "size 30.0 kB" in page.text
    (tmp_path / "page.html").unlink()
    (tmp_path / "again.html").unlink()
    page, _ = shown(run, toy, tmp_path, "compress TOY/style --rank 2 -o OUT")
    assert "what" not in [c.text for c in page.table("By module").rows[0]]


def test_a_page_of_a_plan(run: Run, toy: Path, tmp_path: Path) -> None:
    page, said = shown(run, toy, tmp_path, "merge TOY/style --base TOY/base -o OUT --dry-run")
    assert "dry run: nothing was written" in page.text and said["dry_run"]
    assert "loss, predicted" in page.text
    assert not (tmp_path / "one").exists()


# --------------------------------------------------------------------------- hostile files


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "my loras"
    folder.mkdir()
    write_lora(folder / "<script>alert(1)<!--.safetensors", "sd1", 8, HOSTILE)
    for i in range(3):
        picture = base64.b64encode(landscape(i)).decode()
        write_lora(folder / f"a{i}.safetensors", "sd1", 4 << i, {
            "modelspec.thumbnail": f"data:image/png;base64,{picture}",
            "modelspec.trigger_phrase": f"word {i}",
        })  # fmt: skip
    (folder / "broken.safetensors").write_bytes(b"<html>")
    return folder


def test_a_gallery(run: Run, collection: Path, tmp_path: Path) -> None:
    page, said = gallery(run, collection, tmp_path)
    cards = [a for t, a in page.tags if t == "li" and a.get("class") == "card"]
    adapters = [r["adapter"] for r in said["rows"] if r["adapter"]]
    assert [int(c["data-size"]) for c in cards] == [
        a["factor_bytes"] + a["replaced_bytes"] for a in adapters
    ]
    assert [int(c["data-rank"]) for c in cards] == [8, 4, 8, 16]
    assert len(page.all("img")) == 3
    for word in ("word 0", "rank 16", "Stable Diffusion 1", "broken.safetensors", "LT-3"):
        assert word in page.text
    assert "picture is no PNG" in page.text  # an SVG


def gallery(run: Run, folder: Path, tmp_path: Path) -> tuple[Page, dict]:
    file = tmp_path / "page.html"
    assert run("inspect", str(folder), "--html", str(file)).code == 0
    done = run("inspect", str(folder), "--json")
    page = Page(file)
    check_harmless(page)
    return page, json.loads(done.out)


def test_hostile_words_are_text(run: Run, collection: Path, tmp_path: Path) -> None:
    page, _ = gallery(run, collection, tmp_path)
    assert "<script>alert(1)<!--.safetensors" in page.text
    assert "<script>document.title='owned'</script>" in page.text
    assert "\\u202eevil\\u202c \\u200b<img src=x onerror=alert(1)>" in page.text
    assert "aaaa…" in page.text and "a" * 1000 not in page.text
    assert not any(c in page.text for c in "\u202e\u202c\u200b")
    one = tmp_path / "one.html"
    name = str(collection / "<script>alert(1)<!--.safetensors")
    assert run("inspect", name, "--tensors", "--html", str(one)).code == 0
    single = Page(one)
    check_harmless(single)
    assert "javascript:alert(4) </style></script><!--" in single.text
    assert len(one.read_bytes()) < 500_000


def test_twins_are_marked(run: Run, data: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "loras", tmp_path / "page.html"
    folder.mkdir()
    source = data / "diffusion" / "kohya_sd15_locon" / "adapter.safetensors"
    for name in ("one", "two"):
        (folder / f"{name}.safetensors").write_bytes(source.read_bytes())
    assert run("inspect", str(folder), "--duplicates", "--html", str(file)).code == 0
    page = Page(file)
    cards = [a for t, a in page.tags if t == "li" and a.get("class") == "card"]
    assert ["data-same" in c for c in cards] == [False, True]
    assert "same as one.safetensors" in page.text and "Duplicates" in page.text


def test_several_sources_are_a_gallery(run: Run, collection: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    names = [str(collection / f"a{i}.safetensors") for i in (0, 1)]
    assert run("inspect", *names, "--html", str(file)).code == 0
    assert len(Page(file).all("img")) == 2
    again = run("inspect", *names, "--html", str(file))
    assert again.code == 5 and "LT-508" in again.err


# ------------------------------------------------------------------------------------ parts

PNG = landscape(1)


def jpeg(width: int, height: int) -> bytes:
    start = b"\xff\xd8\xff\xe0" + struct.pack(">H", 16) + bytes(14)
    return start + b"\xff\xc0" + struct.pack(">HBHH", 17, 8, height, width) + bytes(10)


def webp(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x00\x00\x00\x00WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides


@pytest.mark.parametrize(("data", "kind"), [
    (PNG, "png"), (jpeg(64, 4096), "jpeg"), (webp(64, 48), "webp"),
    (jpeg(64, 4097), ""), (webp(70000, 4), ""), (PNG[:16] + b"\xff" * 4 + PNG[20:], ""),
    (PNG[:10], ""), (b"\xff\xd8\xff\xe0\x00\x10", ""), (b"<svg onload=alert(1)>", ""),
    (b"GIF89a" + bytes(20), ""), (b"", ""), (PNG + bytes(300_000), ""),
])  # fmt: skip
def test_pictures(data: bytes, kind: str) -> None:
    code = base64.b64encode(data).decode()
    for text in (code, f"data:image/jpeg;base64,{code}"):
        found, why = checked_picture(text)
        assert bool(found) == bool(kind) and bool(why) != bool(kind)
        if kind:
            assert found == f"data:image/{kind};base64,{code}"


@pytest.mark.parametrize("text", ["data:text/html;base64,PHNjcmlwdD4=", "javascript:alert(1)",
                                  'data:image/png;base64,AAAA" onerror="alert(1)',
                                  "data:image/svg+xml;base64,PHN2Zz4="])  # fmt: skip
def test_what_is_no_picture(text: str) -> None:
    assert checked_picture(text)[0] == ""


@pytest.mark.parametrize(("name", "place"), [
    ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3, "up_proj")),
    ("lm_head", ("", None, "lm_head")),
    ("transformer.single_transformer_blocks.7.attn.to_out.0",
     ("transformer.single_transformer_blocks", 7, "to_out")),
    ("unet.down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.weight",
     ("unet.down_blocks", 1, "attn1_to_out")),
    ("lora_unet_mid_block_attentions_0_proj_in", ("lora_unet_mid_block_attentions", 0, "proj_in")),
    ("te.final_layer_norm", ("", None, "final_layer_norm")), ("encoder.fc_1", ("", None, "fc_1")),
    ("7", ("", None, "7")), ("", ("", None, "")),
])  # fmt: skip
def test_places(name: str, place: tuple[str, int | None, str]) -> None:
    assert place_of(name) == Place(*place)


def test_heat_maps_hold_their_numbers() -> None:
    names = [f"layers.{i}.{p}" for i in range(3) for p in ("q", "v")]
    found = heat_of("x", zip(names, (3.0, 0.5, 4.0, 0.0, 1.0, float("nan")), strict=True))
    assert found is not None and found.columns == ["0", "1", "2"]
    assert [(row, [c.text for c in cells]) for row, cells in found.rows] == [
        ("q", ["3", "4", "1"]), ("v", ["0.5", "0", "–"])]  # fmt: skip
    assert [c.level for c in found.rows[0][1]] == [14, 18, 4]
    assert heat_of("one layer", [("layers.0.q", 1.0)]) is None


def test_long_tables_are_cut_and_say_so() -> None:
    rows = [(f"module {i}", number(i / 7)) for i in range(3000)]
    page = Blocks("inspect", "x", sections=[Section("s", [Rows("all", ("a", "b"), rows)])])
    whole = len(render(page))
    data = render(page, most=whole - 1)
    assert len(data) < whole and "The first 2,000 of 3,000 rows" in Page(data).text


def test_the_help_of_what_cannot_be_shown(run: Run, toy: Path) -> None:
    done = run("subtract", str(toy / "style"), str(toy / "sql"), "-o", "x", "--html", "y.html")
    assert done.code == 2 and "LT-204" in done.err


@pytest.mark.parametrize("command", [lt.compress, lt.merge])
@pytest.mark.parametrize("page", ["out", "out/page.html", "link/page.html"])
def test_a_page_is_no_part_of_another_output(
    command: Any, page: str, toy: Path, tmp_path: Path
) -> None:
    """Told before the work: nothing is written."""
    adapter, out = str(toy / "style"), tmp_path / "out"
    if page != "out":
        out.mkdir()  # an empty folder may become an output
        (tmp_path / "link").symlink_to(out)
    before = sorted(tmp_path.rglob("*"))
    how = {"rank": 1} if command is lt.compress else {}
    some = [adapter] if how else [adapter, adapter]
    with pytest.raises(lt.LoratoolError) as caught:
        command(some, output=out, html=tmp_path / ".." / tmp_path.name / page, **how)
    assert caught.value.code == "LT-508" and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("line", [
    "merge TOY/style TOY/sql -o OUT", "merge TOY/style --base TOY/base -o OUT",
    "compress TOY/style --rank 1 -o OUT", "extract TOY/tuned --base TOY/base -o OUT",
])  # fmt: skip
def test_a_dry_run_says_what_it_wrote(run: Run, toy: Path, tmp_path: Path, line: str) -> None:
    words = line.replace("TOY", str(toy)).replace("OUT", str(tmp_path / "out")).split()
    done = run(*words, "--dry-run")
    assert done.code == 0 and done.out.rstrip().endswith("nothing was written")
    page = tmp_path / "page.html"
    done = run(*words, "--dry-run", "--html", str(page))
    assert done.code == 0 and "nothing was written but this page" in done.out
    assert "nothing was written but this page" in Page(page).text
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
