"""Model cards: injection, existing text, and the Hub's own parser."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st

from loratool.errors import HubError
from loratool.store.card import CardFacts, make_card


def facts_of(base: str | None, **more: str) -> CardFacts:
    return CardFacts("me/x", "adapter", base, None, "peft", tags=("lora",), facts=more)


@given(st.text(max_size=300))
@example("\x85")
@example("a\u2028b")
def test_names_cannot_inject(name: str) -> None:
    card = make_card(facts_of(name), None)
    front = ModelCard(card).data.to_dict()
    assert set(front) == {"base_model", "base_model_relation", "library_name", "tags"}
    loaded = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert loaded["base_model"] == name[:200]


@pytest.mark.parametrize("value", ["a\n# Title", "x | y", "<script>", "![i](http://x)", "`c`"])
def test_values_stay_plain_text(value: str) -> None:
    card = make_card(facts_of("org/base", method=value), None)
    row = next(line for line in card.splitlines() if line.startswith("| method"))
    for mark in "|<`[":
        assert row.count(mark) - row.count("\\" + mark) == (3 if mark == "|" else 0)
    assert card.count("\n# ") == 1


def test_existing_text_is_kept() -> None:
    text = "\n# Mine\r\n\nWords --- and\n---\nmore.\n"
    card = make_card(facts_of("org/base"), f"---\nlicense: mit\ntags: mine\n---\n{text}")
    assert card.endswith(f"\n---\n{text}")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "mit" and front["tags"] == ["mine", "lora"]
    assert make_card(facts_of("org/base"), card) == card
    assert make_card(facts_of("org/base"), "Only text.\n").endswith("---\n\nOnly text.\n")


def test_front_matter_that_is_no_yaml() -> None:
    for front in ("a: [", "- a"):
        with pytest.raises(HubError) as caught:
            make_card(facts_of(None), f"---\n{front}\n---\ntext")
        assert caught.value.code == "LT-715"


def test_unfilled_template_is_replaced() -> None:
    template = (
        "---\nlicense: mit\n---\n# Model Card for Model ID\n" + "[More Information Needed]\n" * 20
    )
    card = make_card(facts_of("org/base"), template)
    assert "Needed" not in card and "license: mit" in card and "# x" in card
