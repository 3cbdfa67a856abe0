"""Write the example data: short reviews with a label, made from templates.

The test set shares neither topics nor opinion words with the training set, so that a model
which only learned words by heart fails on it.  Same seed, same files.

    python examples/data/make_sentences.py
"""

import random
from pathlib import Path

HERE = Path(__file__).parent
FRAMES = (
    "the {thing} was {word}",
    "I found the {thing} {word}",
    "quite the most {word} {thing}, honestly",
    "we all thought the {thing} was {word}",
    "the {thing} turned out to be {word} in the end",
    "my sister called the {thing} {word}",
    "such a truly {word} {thing}",
    "after an hour the {thing} still seemed {word}",
)
NEGATED = ("the {thing} was not {word} at all", "there is nothing {word} about the {thing}")
TRAIN = {
    "things": (
        "soup dessert waiter breakfast menu coffee hotel room pool lobby mattress balcony "
        "novel chapter ending plot hero dialogue phone screen battery keyboard charger camera"
    ),
    "good": (
        "wonderful delicious charming excellent delightful superb lovely brilliant perfect "
        "amazing beautiful clever elegant generous graceful inspiring pleasant reliable"
    ),
    "bad": (
        "awful horrible dull disgusting terrible dreadful poor annoying broken "
        "ugly boring clumsy nasty useless hideous dismal rotten unreliable"
    ),
}
TEST = {
    "things": (
        "concert singer orchestra stage festival drummer train ticket carriage conductor "
        "journey station garden fountain museum painting"
    ),
    "good": "magnificent enjoyable splendid impressive fantastic pleasing remarkable refreshing",
    "bad": "mediocre unbearable shabby disappointing pathetic tedious lousy miserable",
}


def make(words: dict[str, str], count: int, rng: random.Random) -> list[str]:
    """``count`` different lines "label<TAB>sentence", half of them good (1)."""
    lines: list[str] = []
    for label, same, opposite in ((1, "good", "bad"), (0, "bad", "good")):
        every = [
            f"{label}\t{frame.format(thing=thing, word=word)}"
            for frames, key in ((FRAMES, same), (NEGATED, opposite))
            for frame in frames
            for thing in words["things"].split()
            for word in words[key].split()
        ]
        lines += rng.sample(every, count // 2)
    rng.shuffle(lines)
    return lines


if __name__ == "__main__":
    rng = random.Random(7)
    for name, words, count in (("train", TRAIN, 384), ("test", TEST, 128)):
        text = "\n".join(make(words, count, rng)) + "\n"
        (HERE / f"{name}.tsv").write_text(text, encoding="utf-8")
