"""Parts of a pipeline in a dialect: what it calls the model and its text encoders."""

from __future__ import annotations

from loratool.archs.families import families
from loratool.dialects.table import Table

_ENCODERS = {"te2": "openclip_g", "te3": "t5"}


def is_text(component: str) -> bool:
    """True for a text encoder."""
    return component.startswith(("te", "prior_te"))


def usual_encoder(component: str) -> str:
    """Family of a text encoder that nothing but its place in the pipeline tells."""
    return _ENCODERS.get(component, "clip_l")


def is_untold(table: Table, component: str, family: str) -> bool:
    """True for a second CLIP, where a dialect names no parts: all it has are names of the first.

    Args:
        table: of the dialect.
        component: that a change is of, a key of `diffusion.json`.
        family: of its module, "" = unknown.
    """
    is_second = is_text(component) and (family or usual_encoder(component)) == _ENCODERS["te2"]
    return is_second and not any(c.name for c in table.components)


def slot_of(table: Table, component: str, family: str, main: str, usual: str = "unet") -> str:
    """What a dialect calls the part that a change is of, a name of its components.

    Args:
        table: of the dialect.
        component: as another dialect calls it, a key of `diffusion.json`.
        family: of the module, "" = unknown.
        main: family of the file's model, "" = unknown.
        usual: what a pipeline calls a model of no known family.
    """
    known = families()
    if not is_text(component):
        model = known.get(main or family)
        part = "unet" if table.is_flat else model.part if model else usual
        if component in ("", "unet"):  # the model itself, in whatever spelling
            wanted = [part] if component or family else [component]
        else:
            wanted = [component, part] if family else [component]
    else:
        encoders = known[main].encoders if main in known else ()
        kind = family or usual_encoder(component)
        wanted = [{"openclip_g": "te2", "t5": "te3"}.get(kind, "te1")]
        if kind in encoders and table.naming == "diffusers":  # they are counted
            wanted = [f"te{encoders.index(kind) + 1}"]
        elif len(encoders) < 2:  # one, or nothing tells how many there are
            wanted = ["te", *wanted] if encoders or wanted == ["te1"] else [*wanted, "te"]
    slots = {name: c.name for c in reversed(table.components) for name in (c.name, *c.also)}
    return next((slots[slot] for slot in wanted if slot in slots), component)
