"""diffusers: text encoders, whose spelling is told from a few of their names.

Read from, and tried with, ``_load_lora_into_text_encoder`` of diffusers 0.42.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from loratool.dialects.programs.base import DROPPED, RAISES, WRONG, Hit, Rule
from loratool.dialects.programs.grammar import Group
from loratool.dialects.programs.look import Look

_LOADERS = "https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/"
_STATE = _LOADERS + "utils/state_dict_utils.py#L195"
_CODE = _LOADERS + "loaders/lora_base.py#L373"
_QKV = ("_q_proj", "_k_proj", "_v_proj")
_MLP = ("_fc1", "_fc2")
_KOHYA = ("lora_te_", "lora_te1_", "lora_te2_")
_OWN = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
_PROJECTION = "text_projection"


def _encoders(look: Look, prefixes: Sequence[str]) -> Iterator[list[Group]]:
    """The plain LoRA of every text encoder of CLIP's kind."""
    for prefix in prefixes:
        mine = [g for g in look.groups if g.prefix == prefix and "down" in g.parts]
        if any("encoder_layers_" in g.flat or g.flat == _PROJECTION for g in mine):
            yield mine


def _of(groups: Iterable[Group], *ends: str) -> list[Group]:
    return [g for g in groups if g.flat.endswith(ends)]


def _hits(
    prefixes: Sequence[str], find: Callable[[list[Group]], list[Group]]
) -> Callable[[Look], Iterable[Hit]]:
    """Modules that are found in one encoder after another."""

    def test(look: Look) -> Iterable[Hit]:
        names = [g.stem for mine in _encoders(look, prefixes) for g in find(mine)]
        return [Hit(tuple(names))] if names else []

    return test


def _without_out(mine: list[Group]) -> list[Group]:
    """q, k and v in kohya's names where no out_proj tells that they are renamed."""
    return _of(mine, *_QKV) if _of(mine, *_MLP) and not _of(mine, "_out_proj") else []


def _untold(mine: list[Group]) -> list[Group]:
    return mine if not _of(mine, *_MLP, "_out_proj") else []


def _untold_own(mine: list[Group]) -> list[Group]:
    spelled = [g for g in mine if g.uses_letters]
    is_told = _of(mine, *_QKV, "_out_proj")
    return [] if is_told or len(spelled) < len(mine) else mine


def _other_rank(look: Look) -> Iterable[Hit]:
    """A projection whose rank is not that of most other modules, which it is made with."""
    if "lora_adapter_metadata" in look.metadata:
        return []
    names = []
    for mine in _encoders(look, (*_KOHYA, *_OWN)):
        ranks = Counter(g.shape("down")[:1] for g in mine if g.flat != _PROJECTION)
        most = ranks.most_common(1)[0][0] if ranks else ()
        names += [g.stem for g in mine if g.flat == _PROJECTION and g.shape("down")[:1] != most]
    return [Hit(tuple(names))] if names else []


def _alphas(look: Look) -> Iterable[Hit]:
    """Projections of attention whose alpha is not the commonest of their encoder."""
    if not (named := look.stated_alphas):
        return []
    names = []
    for mine in _encoders(look, _KOHYA):
        alphas = {g.stem: named.get(next(iter(g.of("down")))) for g in mine if "alpha" in g.parts}
        most = Counter(alphas.values()).most_common(1)[0][0] if alphas else None
        odd = [g for g in _of(mine, *_QKV, "_out_proj") if alphas.get(g.stem, most) != most]
        names += [g.stem for g in odd]
    return [Hit(tuple(names))] if names else []


TEXT_RULES = (
    Rule("te-untold", RAISES, _hits(_KOHYA, _untold), "a text encoder of q, k and v alone",
         "its spelling is told by out_proj or the MLP: ValueError", _STATE, is_mended=True,
         home="diffusers"),
    Rule("te-own-untold", RAISES, _hits(_OWN, _untold_own), "a text encoder without attention",
         "its spelling is told by the attention: ValueError", _STATE, is_mended=True,
         home="kohya"),
    Rule("te-without-out", DROPPED, _hits(_KOHYA, _without_out),
         "a text encoder's q, k and v without out_proj",
         "its older names are told by to_out: without it they are unexpected", _STATE,
         is_mended=True, home="diffusers"),
    Rule("te-alphas", WRONG, _alphas, "an alpha of its own in a text encoder's attention",
         "its table of alphas has no names of the attention's projections: they get the commonest",
         _LOADERS + "utils/peft_utils.py#L189", is_mended=True, home="diffusers"),
    Rule("te-projection", RAISES, _other_rank, "text_projection of another rank",
         "it is made with the rank of most other modules: sizes that do not fit", _CODE),
)  # fmt: skip
