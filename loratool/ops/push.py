"""What a push publishes: validated files and the facts of the model card."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loratool.adapter import TensorRef
from loratool.archs.stated import name_of
from loratool.dialects import open_adapter
from loratool.errors import MismatchError
from loratool.frozen import Frozen
from loratool.ops.card_facts import adapter_facts, checkpoint_facts
from loratool.ops.summary import summarize
from loratool.store.adapter_folder import find_adapter
from loratool.store.card import CardFacts
from loratool.store.checkpoint import Checkpoint, open_checkpoint
from loratool.store.contained import list_folder, typed
from loratool.store.header import read_header
from loratool.store.jsonfile import load_json
from loratool.store.push_files import Chosen, choose_files, refuse_local_base


class Publication(Frozen):
    """What is published.

    Attributes:
        what: ``adapter`` or ``checkpoint``.
        chosen: the files.
        base: the base's name as the files say it, None if they do not.
        facts: for the model card.
        notes: what a user should know.
    """

    what: str
    chosen: Chosen
    base: str | None
    facts: CardFacts
    notes: tuple[str, ...] = ()


def prepare(path: Path, repo: str, skip: Iterable[str] = ()) -> Publication:
    """Validate an adapter or a checkpoint for publication; reads every value.

    Args:
        path: adapter or checkpoint.
        repo: ``owner/name``.
        skip: names of files that are left out.

    Raises:
        LoratoolError: it cannot be opened, its configuration contradicts its tensors, a value is
            not finite (LT-801), a file must not be published (LT-930 to LT-933), or one changed
            meanwhile (LT-332).
    """
    path = typed(path)
    what = summarize(path).what
    if what == "folder":
        raise MismatchError(
            "LT-491", "this folder is neither an adapter nor a checkpoint itself", file=path,
            hint="push one of the models in it",
        )  # fmt: skip
    make = _adapter if what == "adapter" else _checkpoint
    publication = make(path, repo, tuple(skip))
    publication.chosen.check_unchanged()
    return publication


def _adapter(path: Path, repo: str, skip: tuple[str, ...]) -> Publication:
    from loratool.engine.finite import check_finite

    chosen = choose_files(path, skip=skip)
    adapter = open_adapter(find_adapter(path))
    refuse_local_base(adapter.base_model, path / "adapter_config.json")
    check_finite(_refs(chosen, path))
    card = adapter_facts(adapter, repo)
    notes = _notes(card, adapter.base_model)
    return Publication("adapter", chosen, adapter.base_model or card.base, card, notes)


def _checkpoint(path: Path, repo: str, skip: tuple[str, ...]) -> Publication:
    from loratool.engine.finite import check_finite

    checkpoint = open_checkpoint(path)
    chosen = choose_files(path, _sub_folders(checkpoint), skip)
    for file in (path / name for name in chosen.files):
        if file.name == "config.json":
            config = load_json(file, folder=checkpoint.path)
            refuse_local_base(name_of(config), file)
    check_finite(_refs(chosen, path))
    card = checkpoint_facts(checkpoint, repo)
    named = name_of(checkpoint.config)
    notes = _notes(card, named if named not in ("", repo) else None)
    return Publication("checkpoint", chosen, card.base, card, notes)


def _sub_folders(checkpoint: Checkpoint) -> tuple[str, ...]:
    """All folders of a pipeline: its tokenizer and scheduler hold no weights."""
    if not checkpoint.components:
        return ()
    listed = load_json(checkpoint.path / "model_index.json")
    inside = [e.name for e in list_folder(checkpoint.path) if e.is_dir()]
    return tuple(name for name in inside if isinstance(listed.get(name), list))


def _refs(chosen: Chosen, path: Path) -> list[TensorRef]:
    root = path if path.is_dir() else path.parent
    return [ref for file in chosen.weights() for ref in read_header(file, folder=root).tensors]


def _notes(card: CardFacts, named: str | None) -> tuple[str, ...]:
    """What a user should know about the card."""
    if card.base is not None:
        return ()
    if named is None:
        return ("the files name no base model, so the card names none",)
    return ("the base's name cannot be one of the Hub, so the card leaves it out",)
