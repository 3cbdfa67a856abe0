"""What a file says of itself in words: who made it, for what, and how it is called up."""

from __future__ import annotations

from loratool.frozen import Frozen


class Told(Frozen):
    """What the metadata of a tensor file tell people; "" and () where they are silent.

    Attributes:
        trainer: program that wrote it, with what it says of its version or algorithm.
        base: what it was trained on, as the trainer calls it.
        title: of the work.
        author: likewise.
        description: likewise.
        tags: likewise.
        triggers: (words that call it up, where they are written).
        comment: the trainer's note.
        frequent: (tag, images) of the captions, most frequent first.
        training: sizes of the training, such as ``10 epochs``.
        has_thumbnail: there is a picture in it.
    """

    trainer: str = ""
    base: str = ""
    title: str = ""
    author: str = ""
    description: str = ""
    tags: str = ""
    triggers: tuple[tuple[str, str], ...] = ()
    comment: str = ""
    frequent: tuple[tuple[str, int], ...] = ()
    training: tuple[str, ...] = ()
    has_thumbnail: bool = False

    @property
    def trigger(self) -> str:
        """The words to type: those written down, else the most frequent tag."""
        written = ", ".join(dict.fromkeys(words for words, _ in self.triggers))
        return written or (self.frequent[0][0] if self.frequent else "")
