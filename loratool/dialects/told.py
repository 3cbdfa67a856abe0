"""What the metadata and names of a tensor file tell people: trainer, training, trigger words.

Rows first: a trainer is one line of `BY_METADATA` or `BY_NAMES`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from loratool.dialects.candidate import one_of_alike
from loratool.dialects.metadata import OWN, SPEC, TRIGGER
from loratool.lazy import regex
from loratool.report.told import Told

Metadata = Mapping[str, str]
_MOST_TAGS = 8
_THUMBNAIL, _COVERS = f"{SPEC}thumbnail", "ssmd_cover_images"
_MUSUBI = regex(
    r"hunyuan_video|hv|wan|framepack|flux_kontext|flux_2|qwen_image|kandinsky5|z_image|hidream_o1"
    r"|ideogram4|krea2"
)
"""What musubi-tuner calls the models that it trains (``ss_base_model_version``)."""


def _software(metadata: Metadata) -> str:
    said = _mapping(metadata.get("software", ""))
    return " ".join(str(said[key]) for key in ("name", "version") if said.get(key))


def _lycoris(metadata: Metadata) -> str:
    algorithm = _mapping(metadata.get("ss_network_args", "")).get("algo", "")
    return f"LyCORIS {algorithm} in {_scripts(metadata)}".replace("  ", " ")


def _scripts(metadata: Metadata) -> str:
    if OWN in metadata and "ss_network_module" not in metadata:
        return ""  # we wrote what it is for, and no trainer has been there
    is_musubi = _MUSUBI.match(metadata.get("ss_base_model_version", ""))
    return "musubi-tuner" if is_musubi else "sd-scripts"


BY_METADATA: tuple[tuple[str, str, Callable[[Metadata], str]], ...] = (
    ("ot_branch", "", lambda m: f"OneTrainer {m.get('ot_revision', '')[:8]}".strip()),
    ("ot_config", "", lambda m: "OneTrainer"),
    ("software", "", _software),
    ("training_info", "", lambda m: "ai-toolkit"),
    ("trained_words", "", lambda m: "SimpleTuner"),
    ("ss_network_module", "lycoris", _lycoris),
    ("ss_network_module", "", _scripts),
    ("ss_base_model_version", "", _scripts),
    ("lora_adapter_metadata", "", lambda m: "diffusers"),
)
"""(entry, what its value begins with, the trainer); the first row that fits."""

BY_NAMES: tuple[tuple[str, str], ...] = (
    (r"^lora_transformer_|\.(qkv|linear\d)\.\d\.lora_down\.", "OneTrainer"),
    (r"\.magnitude$", "ai-toolkit"),
    (r"^Hunyuan_video_I2V_lora_", "HunyuanVideo-I2V"),
    (r"^lora_unet__", "VideoX-Fun"),
    (r"processor\.(qkv|proj)_lora\d?\.", "XLabs"),
    (r"\.base_model\.model\..*\.lora\.down\.", "SimpleTuner"),
    (r"^(single_)?(transformer_)?(blocks|layers)\..*\.lora_[AB]\.default\.", "DiffSynth"),
    (r"^(pipe\.)?dit\..*\.lora_[AB]\.", "DiffSynth"),
)
"""(expression found in a tensor's name, whatever its digits, the trainer that alone writes it)."""


def tell(metadata: Metadata, card: str = "") -> Told:
    """What the metadata of a file, and the model card beside it, say in words.

    Nothing in them is trusted: what is damaged is passed over.

    Args:
        metadata: of the tensor file.
        card: text of the ``README.md`` beside it, "" if there is none.
    """
    return Told(
        trainer=_trainer(metadata),
        base=_first(metadata, "ss_base_model_version", f"{SPEC}architecture", "ss_sd_model_name"),
        title=_first(metadata, f"{SPEC}title", "ss_output_name"),
        author=_first(metadata, f"{SPEC}author"),
        description=_first(metadata, f"{SPEC}description"),
        tags=_first(metadata, f"{SPEC}tags"),
        triggers=tuple(_triggers(metadata, card)),
        comment=_first(metadata, "ss_training_comment"),
        frequent=_frequent(metadata.get("ss_tag_frequency", "")),
        training=tuple(_training(metadata)),
        has_thumbnail=any(key in metadata for key in (_THUMBNAIL, _COVERS)),
    )  # fmt: skip


def cover(metadata: Metadata) -> str:
    """The picture in the metadata as it is written, a data URI or base64; "" if there is none."""
    if _THUMBNAIL in metadata:
        return metadata[_THUMBNAIL]
    covers = _parsed(metadata.get(_COVERS, ""))
    return covers[0] if isinstance(covers, list) and covers and isinstance(covers[0], str) else ""


def _trainer(metadata: Metadata) -> str:
    for entry, start, name_of in BY_METADATA:
        if entry in metadata and metadata[entry].startswith(start) and (name := name_of(metadata)):
            return name
    return ""


def trainer_by_names(names: tuple[str, ...]) -> str:
    """The trainer that alone spells tensors in this way, "" if several do."""
    text = "\n".join(one_of_alike(names))
    return next((who for mark, who in BY_NAMES if re.search(mark, text, re.MULTILINE)), "")


def embeddings_of(names: Iterable[str]) -> tuple[str, ...]:
    """Words of the embeddings that are bundled with an adapter (``bundle_emb.<word>.…``)."""
    found = (n.split(".", 2) for n in names if n.startswith("bundle_emb."))
    return tuple(dict.fromkeys(parts[1] for parts in found if len(parts) > 1))


def _triggers(metadata: Metadata, card: str) -> Iterable[tuple[str, str]]:
    if phrase := _first(metadata, TRIGGER):
        yield phrase, TRIGGER
    if words := _first(metadata, "trained_words"):
        said = _parsed(words)
        listed = [str(w) for w in said] if isinstance(said, list) else [words]
        yield ", ".join(listed), "trained_words"
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    prompt = re.search(r"^instance_prompt:[ \t]*(.+)$", front[1], re.MULTILINE) if front else None
    if prompt and (text := prompt[1].strip().strip("'\"")) not in ("null", "~", ""):
        yield text, "instance_prompt"


def _frequent(text: str) -> tuple[tuple[str, int], ...]:
    if not text:
        return ()
    counts: Counter[str] = Counter()
    for tags in _mapping(text).values():
        if isinstance(tags, dict) and {int}.issuperset(map(type, tags.values())):
            counts.update(tags)
    return tuple(counts.most_common(_MOST_TAGS))


def _training(metadata: Metadata) -> Iterable[str]:
    for entry, noun in (("ss_num_train_images", "images"), ("ss_num_epochs", "epochs"),
                        ("ss_max_train_steps", "steps")):  # fmt: skip
        if metadata.get(entry, "").isdecimal():
            yield f"{int(metadata[entry][:18]):,} {noun}"
    said = _mapping(metadata.get("training_info", ""))
    for key in ("epoch", "step"):
        if isinstance(said.get(key), int):
            yield f"{key} {said[key]:,}"
    if resolution := _first(metadata, f"{SPEC}resolution", "ss_resolution"):
        yield resolution


def _first(metadata: Metadata, *entries: str) -> str:
    said = (metadata.get(entry, "").strip() for entry in entries)
    return next((value for value in said if value and value not in ("None", "null")), "")


def _mapping(text: str) -> dict[str, Any]:
    found = _parsed(text) if text.lstrip().startswith("{") else None
    return found if isinstance(found, dict) else {}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
