"""Which model a file is for, and whose names its modules have: what `loratool.archs` says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from math import prod

from loratool.archs import families as archs
from loratool.dialects.programs.grammar import Group
from loratool.frozen import Frozen

ORIGINAL, DIFFUSERS, BOTH = "original", "diffusers", "both"
SD, SD3, FLUX1, FLUX2, QWEN, WAN = "sd1", "sd3", "flux1", "flux2", "qwen_image", "wan"
Z_IMAGE, LUMINA2, KREA2, ANIMA = "z_image", "lumina2", "krea2", "anima"
HUNYUAN, LTX, HIDREAM = "hunyuan_video", "ltx_video", "hidream_i1"

_PARTS = ("text_conditioner.", "connectors.")


class Family(Frozen):
    """The model of a file.

    Attributes:
        name: the family as which programs load it (`loratool.archs.Family.kin`), "" = unknown.
        map: the family whose names it has: of several that it may be the likeliest.
        title: for people, with the size where that is known.
        naming: whose names most modules have: `ORIGINAL`, `DIFFUSERS`; `BOTH` where they agree.
    """

    name: str = ""
    map: str = ""
    title: str = ""
    naming: str = ""


def family_of(groups: Sequence[Group], metadata: Mapping[str, str]) -> Family:
    """The model of a file, by names, shapes and metadata."""
    mine = [g for g in groups if g.kind and not g.is_text]
    factored = [g for g in mine if g.kind not in ("full", "norm", "set")]
    shapes = {f"unet.{_module(g)}": _shape(g) for g in factored or mine}
    guess = archs.family_of(shapes, metadata)
    known = archs.families()
    fitting = (guess.family,) if guess.family else guess.others
    kin = {known[name].kin for name in fitting}
    if len(kin) != 1:
        return Family()
    found = Counter(naming_of(g, fitting[0]) for g in mine)
    apart = [naming for naming, _ in found.most_common() if naming not in ("", BOTH)]
    (name,) = kin
    title = guess.title or known[name].title
    return Family(name, fitting[0], title, apart[0] if apart else BOTH)


def naming_of(group: Group, family: str) -> str:
    """Whose name a module has: `ORIGINAL`, `DIFFUSERS`, `BOTH`; "" if the family's map has none."""
    is_asked = family and not group.is_text
    return _naming(archs.flatten(_module(group)), family) if is_asked else ""


@lru_cache(maxsize=1 << 14)  # every program asks for every module
def _naming(flat: str, family: str) -> str:
    found = (archs.places("unet", flat, one, family) for one in ("weight", "scale"))
    for place in chain.from_iterable(found):
        if place.naming == ORIGINAL and flat in map(archs.flatten, place.diffusers):
            return BOTH
        return DIFFUSERS if place.naming in place.row.like_diffusers else ORIGINAL
    return ""


def _module(group: Group) -> str:
    """The module's name, in which some parts of diffusers' pipelines stand as in no other file."""
    return group.stem if group.prefix in _PARTS else group.path


def _shape(group: Group) -> tuple[int, ...]:
    """(out, in) of the change, () where its tensors do not tell."""
    ends = {key[len(group.stem) + 1 :]: group.tensors[key].shape for key in group.keys}
    if group.kind == "loha":
        factors = [_product(ends, "hada_w1", "hada_t1")]
    elif group.kind == "lokr":
        factors = [_product(ends, f"lokr_w{i}", f"lokr_t{i}") for i in "12"]
    else:
        factors = [group.shape("diff") or (*group.shape("up")[:1], *group.shape("down")[1:2])]
    if any(len(factor) < 2 for factor in factors):
        return ()
    return prod(f[0] for f in factors), prod(f[1] for f in factors)


def _product(ends: Mapping[str, tuple[int, ...]], name: str, core: str) -> tuple[int, ...]:
    """Shape of a tensor, or of the product of two; beside a core the first is turned round."""
    left, right = ends.get(f"{name}_a", ()), ends.get(f"{name}_b", ())
    return ends.get(name) or (*left[core in ends :][:1], *right[1:2])
