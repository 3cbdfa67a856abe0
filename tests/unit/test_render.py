"""Escaping and number formats."""

import json
import unicodedata

import pytest

from loratool.cli import render
from loratool.cli.render import safe

HOSTILE = [
    "\x1b[31mred",
    "\x1b]8;;http://evil\x07click\x1b]8;;\x07",
    "\x9b2J",
    "a\nb\r\tc",
    "\x00\x7f",
    "\u202egnp.exe",
    "zero\u200bwidth\ufeff",
    "\ud800lone",
    "\U000e0041tag",
    "line\u2028sep",
    "filler\u3164\u115f",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_safe_leaves_nothing_that_a_terminal_obeys(text):
    shown = safe(text)
    shown.encode()  # no surrogates
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for c in shown)
    assert "\u3164" not in shown and "\u115f" not in shown


def test_safe_keeps_what_is_harmless():
    for text in ("model.layers.0.q_proj", "[/bold] [link=x]", "größe 4096×1024", "模型", "a b"):
        assert safe(text) == text


def test_safe_names_what_it_hides():
    assert safe("a\x1b[1m\u202e\U000e0041\n") == "a\\x1b[1m\\u202e\\U000e0041\\n"


def test_safe_caps():
    assert safe("x" * 200) == "x" * 200
    assert safe("x" * 201) == "x" * 199 + "…"
    assert len(safe("\x1b" * 10**6)) == 200
    assert safe(3.5) == "3.5"


def test_secrets_are_blanked():
    token = "hf_" + "a1B2" * 8
    assert token not in safe(f"got {token}") and "hf_***" in safe(f"got {token}")
    assert safe("https://me:secret@host/x") == "https://***@host/x"
    assert token not in render.dump_json({"a": [token], token: 1})


def test_a_token_beyond_the_cap_is_not_half_shown():
    token = "hf_" + "A" * 34
    for before in range(150, 205):
        assert "hf_A" not in safe("x" * before + token)


def test_dump_json_is_printable_ascii():
    text = render.dump_json({"key\x7f\x1b": "\u202e\ud800\x9b", "n": [1, None]})
    assert text.isascii() and text.isprintable()
    assert json.loads(text)["n"] == [1, None]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (640, "640 B"), (999, "999 B"), (1000, "1.00 kB"), (1_330_000_000, "1.33 GB"),
        (410_000_000, "410 MB"), (16_400_000_000, "16.4 GB"), (999_960_000, "1.00 GB"),
        (2_500_000_000_000, "2.50 TB"),
    ],
)  # fmt: skip
def test_bytes(count, text):
    assert render.format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512"), (337_920, "338 k"), (43_600_000, "43.6 M"), (8_190_000_000, "8.19 G")],
)
def test_counts(count, text):
    assert render.format_count(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"), (1.0, "100 %"), (0.118, "11.8 %"), (0.5, "50 %"), (0.991, "99.1 %"),
        (0.99996, "99.996 %"), (0.999999, "99.9999 %"), (0.9999999, "> 99.9999 %"),
        (0.0004, "0.04 %"), (1e-9, "1e-07 %"),
    ],
)  # fmt: skip
def test_shares_never_claim_all_or_nothing(share, text):
    assert render.format_share(share) == text
    assert render.format_share(0.85, aligned=True) == "85.0 %"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.04 s"), (0.8, "0.8 s"), (9.99, "10 s"), (59.4, "59 s"), (187, "3:07"),
        (3723, "1:02:03"),
    ],
)  # fmt: skip
def test_seconds(seconds, text):
    assert render.format_seconds(seconds) == text


def test_lines_and_tables():
    assert render.line("base", "a", "", "b") == "\x1b[1mbase\x1b[0m      a · b"
    assert render.line("", "more").endswith(" " * 10 + "more")
    assert "long-label-here\x1b[0m  x" in render.line("long-label-here", "x")
    lines = render.table([("a", "1"), ("模型", "100")], ("name", "n"), right=(1,))
    assert lines[1:] == ["a       1", "模型  100"]
    assert render.plural(1, "tensor") == "1 tensor"
    assert render.plural(1200, "matrix", "matrices") == "1,200 matrices"
    assert render.format_shape((3, 4)) == "3×4" and render.format_shape(()) == "scalar"
    assert render.some(["a", "b\x1b", "c"], limit=2) == "a, b\\x1b and 1 more"


def test_what_is_too_long_is_cut():
    assert render.short("model.layers.0", 40) == "model.layers.0"
    assert render.short("model.layers.0", 8) == "model.l…"
    assert render.short("a" * 30 + "模型.safetensors", 20, at_start=True) == "…aaa模型.safetensors"


LONG = (
    "loss      bfloat16 rounds away 1.2 % of the change; worst model.layers.1.mlp.gate_proj.weight"
    " 1.2 % · --dtype float32 keeps all · loratool merge a --base b -o c"
)


@pytest.mark.parametrize("columns", [*range(48, 120, 7), len(LONG)])
def test_lines_are_wrapped_between_facts_and_words(columns):
    lines = render.wrapped(LONG, columns, 10).split("\n")
    assert all(len(text) <= columns for text in lines)
    assert all(text.startswith(" " * 10 + text.strip()) for text in lines[1:])
    assert lines[-1].endswith("loratool merge a --base b -o c")
    words = " ".join(text.strip() for text in lines).replace(" · ", " ").split()
    assert words == LONG.replace(" · ", " ").split()


def test_a_command_is_never_broken():
    text = "next      loratool merge " + "very-long-name " * 9 + "-o out"
    assert render.wrapped(text, 40, 10) == text


def test_tables_fit_a_terminal(monkeypatch):
    monkeypatch.setattr(render, "is_terminal", lambda *_: True)
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("model.layers.0.mlp.down_proj.weight", "2", "copied from the base")]
    _, row = render.table(rows, ("tensor", "number", "what happens"), right=(1,))
    assert render.cell_width(row) <= 40 and row.startswith("…") and "2  " in row
    monkeypatch.setenv("COLUMNS", "14")
    assert render.table([("a", "1.00", "2.000")], ("x", "first", "second"), right=(1, 2))[1] == (
        "a  1.00  2.000"
    )
    monkeypatch.setenv("COLUMNS", "10")
    narrow = render.table([("a", "1.00", "2.000")], ("x", "first", "second"), right=(1, 2))
    words = [render.click.unstyle(text).split() for text in narrow[1:]]
    assert words == [["a", "1.00"], [], ["x", "second"], ["a", "2.000"]]
