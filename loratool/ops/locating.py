"""Which weights of which family every change of an adapter is of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loratool.adapter import Adapter, DeltaSpec
from loratool.archs.families import (
    MODEL_KEY,
    Guess,
    Place,
    families,
    family_of,
    places,
    split_component,
)
from loratool.delta import stacking
from loratool.delta.forms import shape_of, side_sizes
from loratool.dialects.slots import is_text, usual_encoder
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, replace
from loratool.lazy import regex

_OF_CLIP = regex(r"text_model[._](encoder[._]layers|embeddings|final_layer_norm)[._]")


class Located(Frozen):
    """A change, and which weights of which family it is of.

    Attributes:
        spec: as the adapter has it.
        component: part of the pipeline, a key of `diffusion.json`; "" = not said.
        module: its name behind the component's prefix, flat or dotted.
        place: None = of no family that is known.
    """

    spec: DeltaSpec
    component: str
    module: str
    place: Place | None


def locate(adapter: Adapter, naming: str = "written") -> list[Located]:
    """Find every change among the weights of the family that the adapter is of.

    Args:
        adapter: opened; with flat or dotted names.
        naming: a dialect's, which is asked for: families that agree in it need not be told apart.
    """
    guess = _guess(adapter)
    found = []
    for spec in adapter.specs:
        component, name = split_component(spec.name)
        if not component and _OF_CLIP.match(name):  # LyCORIS alone does not name parts
            component = "te"
        module = name.rpartition(".")[0]
        family = guess.parts.get(component) if component.startswith("te") else guess.family
        known = places(component, module, spec.parameter, family) if family else []
        if not known:  # of a part that is not the file's main one, or of one of several families
            known = _settled(component, places(component, module, spec.parameter), naming)
        found.append(Located(spec, component, module, known[0] if known else None))
    return found


def require_one_family(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that are of different models, as far as these are known.

    Raises:
        MismatchError: LT-469.
    """
    titles = {g.family: g.title for a in adapters if (g := _guess(a)).family}
    if len(titles) > 1:
        raise MismatchError(
            "LT-469", "the adapters are of different models", got=list_some(titles.values()),
            file=list_some(a.label for a in adapters),
        )  # fmt: skip


def require_family(adapter: Adapter, of: Sequence[str], title: str) -> None:
    """Refuse an adapter of another family than a dialect's files may be of.

    Raises:
        MismatchError: LT-411.
    """
    guess = _guess(adapter)
    may_be = (guess.family,) if guess.family else guess.others
    if of and may_be and not {*may_be} & {*of}:
        titles = [guess.title] if guess.title else [families()[name].title for name in may_be]
        raise MismatchError(
            "LT-411", f"{title} cannot hold this adapter: it is of {' or '.join(titles)}",
            expected=list_some((families()[name].title for name in of), 3), file=adapter.path,
            hint="--to comfyui has names for it",
        )  # fmt: skip


def of_one_family(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters for one model: what one is of is said of those whose names fit several families."""
    guesses = [_guess(one) for one in adapters]
    known = {guess.family for guess in guesses if guess.family}
    if len(known) != 1:
        return list(adapters)
    (family,) = known
    said = {MODEL_KEY: next(iter(families()[family].versions), "")}
    return [
        replace(one, metadata={**one.metadata, **said}) if family in guess.others else one
        for one, guess in zip(adapters, guesses, strict=True)
    ]


def is_of_images(adapter: Adapter) -> bool:
    """True if its modules are those of an image or video model, or of several that are known."""
    guess = _guess(adapter)
    return bool(guess.family or guess.others)


def _guess(adapter: Adapter) -> Guess:
    return family_of({_unit(s): _shape(s) for s in adapter.specs}, adapter.metadata)


def _unit(spec: DeltaSpec) -> str:
    """The module of a change; the parameter where that is none of a module's."""
    return spec.module if spec.parameter in ("weight", "bias") else spec.name


def _settled(component: str, known: list[Place], naming: str) -> list[Place]:
    """Places that several families have, if it does not matter which: one; else none."""
    if is_text(component):
        usual = usual_encoder(component)
        return sorted(known, key=lambda p: p.family != usual)
    ways = [(p, p.called(naming_in(p.family, naming), 0, 0)) for p in known]
    names = {(p.names(way), p.row.split, p.row.swap) for p, way in ways}
    return known if len(names) == 1 else []


def _shape(spec: DeltaSpec) -> tuple[int, ...]:
    if not spec.is_matrix:
        return shape_of(spec)
    out, inner = side_sizes(spec)
    return (out, *inner)


def uncuttable(located: Iterable[Located], naming: str) -> set[str]:
    """Names of the changes that take other factors before a naming can cut or join them."""
    return {
        one.spec.name for one in located
        if one.place is not None and not stacking.is_cuttable(one.spec)
        and (one.place.row.parts > 1 or one.place.row.swap)
        and not _keeps(one.place, naming_in(one.place.family, naming))
    }  # fmt: skip


def naming_in(family: str, wanted: str) -> str:
    """The naming of a family that a dialect's stands for; ``written`` = that of flat files.

    Text encoders go by the names of transformers in adapters of every program.
    """
    known = families()[family]
    return known.flat if wanted == "written" or is_text(known.component) else wanted


def _keeps(place: Place, naming: str) -> bool:
    """True if a naming has one module for the very parts, in their order."""
    names = place.row.names.get(naming) or place.row.names["original"]
    return any((n.first, n.stop) == (place.first, place.stop) for n in names) and not (
        place.is_turned(naming)
    )
