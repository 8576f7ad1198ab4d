"""Ways to change some words of a text: easy data augmentation (Wei and Zou 2019, "EDA", arXiv 1901.11196), and typing
errors.

Of EDA are synonym replacement, random insertion, random swap (each n = max(1, α · words) times) and random deletion (each
word with probability α). What differs: case and punctuation stay, a deletion always deletes something, and
words that are kept, placeholders and addresses are not touched.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lib.data.augment.thesaurus import Thesaurus
from lib.data.augment.words import Words, is_unspaced

Method = Callable[[Words, float, random.Random, Thesaurus], Words | None]
"""Words with a share of them changed; None where there is nothing to change."""

# Keys beside each other on an English keyboard, by rows and columns shifted by half a key.
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LEAST_LETTERS = 3


def synonyms(words: Words, alpha: float, rng: random.Random, thesaurus: Thesaurus) -> Words | None:
    """Words become others of like meaning; in an entity none do, which would be another one then."""
    found: list[tuple[int, int, list[str]]] = []
    place = 0
    while place < len(words):
        length, others = _looked_up(words, place, thesaurus)
        if others:
            found.append((place, length, others))
        place += length
    if not found:
        return None
    changed: dict[int, str] = {}
    gone: list[int] = []
    for place, length, others in rng.sample(found, min(_count(words, alpha), len(found))):
        changed[place] = _cased(rng.choice(others), words.words[place])
        gone += range(place + 1, place + length)
    return words.with_words(changed).without(gone)


def swap(words: Words, alpha: float, rng: random.Random, thesaurus: Thesaurus) -> Words | None:
    """Two words change places, n times."""
    places = words.changeable
    if len({words.words[place] for place in places}) < 2:
        return None
    said = list(words.words)
    for _ in range(_count(words, alpha)):
        first, second = rng.sample(places, 2)
        said[first], said[second] = said[second], said[first]
    return words.with_words(dict(enumerate(said)))


def delete(words: Words, alpha: float, rng: random.Random, thesaurus: Thesaurus) -> Words | None:
    """Each word goes with probability α; one at least goes, and one at least stays."""
    places = words.changeable
    gone = [place for place in places if rng.random() < alpha] or (places and [rng.choice(places)])
    if len(gone) == len(words):
        gone.remove(rng.choice(gone))
    return words.without(gone) if gone else None


def insert(words: Words, alpha: float, rng: random.Random, thesaurus: Thesaurus) -> Words | None:
    """A synonym of some word comes to stand anywhere, n times."""
    found = [others for place in range(len(words)) if (others := _looked_up(words, place, thesaurus)[1])]
    if not found:
        return None
    said = words
    for _ in range(_count(words, alpha)):
        word = rng.choice(rng.choice(found))
        said = said.inserted(rng.randrange(len(said) + 1), word)
    return said


def spelling(words: Words, alpha: float, rng: random.Random, thesaurus: Thesaurus) -> Words | None:
    """Typing errors in n words of LEAST_LETTERS letters or more."""
    places = [
        place
        for place in words.changeable
        if len(words.words[place]) >= LEAST_LETTERS
        and words.words[place].isalpha()
        and not is_unspaced(words.words[place])
    ]
    if not places:
        return None
    chosen = rng.sample(places, min(_count(words, alpha), len(places)))
    return words.with_words({place: mistyped(words.words[place], rng) for place in chosen})


BY_NAME: dict[str, Method] = {
    "synonyms": synonyms,
    "swap": swap,
    "delete": delete,
    "insert": insert,
    "spelling": spelling,
}


def mistyped(word: str, rng: random.Random) -> str:
    """A word with one error, another word for sure: the key beside the right one, two letters the wrong way round, one
    missing, or one twice."""
    ways = list(_ERRORS)
    rng.shuffle(ways)
    for way in ways:
        said = way(word, rng)
        if said != word:
            return said
    return word


def _beside(word: str, rng: random.Random) -> str:
    places = [i for i, letter in enumerate(word) if letter.lower() in _NEIGHBOURS]
    if not places:
        return word
    place = rng.choice(places)
    key = rng.choice(_NEIGHBOURS[word[place].lower()])
    return word[:place] + (key.upper() if word[place].isupper() else key) + word[place + 1 :]


def _turned(word: str, rng: random.Random) -> str:
    place = rng.randrange(len(word) - 1)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _missing(word: str, rng: random.Random) -> str:
    place = rng.randrange(len(word))
    return word[:place] + word[place + 1 :]


def _twice(word: str, rng: random.Random) -> str:
    place = rng.randrange(len(word))
    return word[: place + 1] + word[place:]


_ERRORS = (_beside, _turned, _missing, _twice)


def _keyboard() -> dict[str, str]:
    at = {key: (row, place + row / 2) for row, keys in enumerate(_ROWS) for place, key in enumerate(keys)}
    return {
        key: "".join(
            other
            for other, (r, p) in at.items()
            if other != key and abs(r - row) <= 1 and abs(p - place) <= 1
        )
        for key, (row, place) in at.items()
    }


_NEIGHBOURS = _keyboard()


def _count(words: Words, alpha: float) -> int:
    return max(1, int(alpha * len(words)))


def _looked_up(words: Words, place: int, thesaurus: Thesaurus) -> tuple[int, list[str]]:
    """How many words from a place on are one of the thesaurus, the longest first, and its synonyms."""
    if words.free[place] and not (words.tags and words.tags[place]):
        for length in range(min(thesaurus.longest, len(words) - place), 0, -1):
            if words.together(place, length):
                others = thesaurus.others("".join(words.words[place : place + length]))
                if words.tags is not None:
                    others = [other for other in others if " " not in other]
                if others:
                    return length, others
    return 1, []


def _cased(word: str, like: str) -> str:
    """A word with the capitals of another."""
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word
