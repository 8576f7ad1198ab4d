"""Near duplicates: which texts are alike, how they are found, and which of a cluster stays."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.alike import near
from lib.data.alike.near import Bands
from lib.settings import NearSettings

WORDS = NearSettings()
CHINESE = "我昨天在这家商店买了一条很好看的红色裙子，非常合身，面料也很舒服。"


def shingles(text: str, settings: NearSettings = WORDS) -> set[int]:
    (found,) = near.sliced([text], settings)
    return set(found.hashes.tolist())


def jaccard(first: str, second: str, settings: NearSettings = WORDS) -> float:
    one, two = shingles(first, settings), shingles(second, settings)
    return len(one & two) / len(one | two)


def sketched(pairs: list[tuple[str, str]], settings: NearSettings = WORDS) -> np.ndarray:
    first, second = (near.sketches(list(side), settings) for side in zip(*pairs, strict=True))
    return near.similarities(first, second)


def linked(texts: list[str], settings: NearSettings = WORDS) -> set[tuple[int, int]]:
    """What candidates of these texts are, by their numbers."""
    keys, _ = near.band_keys(texts, settings)
    found = near.candidates(keys.ravel(), np.repeat(np.arange(len(texts)), keys.shape[1]))
    return set(zip(found["a"].to_pylist(), found["b"].to_pylist(), strict=True))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99])
def test_bands_find_what_is_at_the_threshold(threshold: float) -> None:
    bands = Bands.of(threshold)
    assert bands.rows > 1
    assert 0.995 <= bands.found(threshold) < bands.found((1 + threshold) / 2)
    # What is far below it is rarely compared.
    assert bands.found(threshold / 3) < 0.45


def test_bands_are_found_as_often_as_they_say() -> None:
    """Sets of a known similarity, of which each pair is drawn anew: the hash functions are as good as random."""
    rng = np.random.default_rng(0)
    bands, size = Bands(5, 4), 60
    for similarity, shared in ((0.5, 40), (0.8, 53)):
        hits, pairs = 0, 1000
        for _ in range(pairs):
            common, one, two = np.split(rng.integers(0, 2**64, 2 * size - shared, np.uint64), [shared, size])
            together = near.Shingles(np.concatenate([common, one, common, two]), np.array([0, size]))
            least = near.minhash(together, bands)
            hits += bool((near._keys(least, bands)[0] == near._keys(least, bands)[1]).any())
        truth = bands.found(shared / (2 * size - shared))
        assert shared / (2 * size - shared) == pytest.approx(similarity, abs=0.01)
        assert hits / pairs == pytest.approx(truth, abs=4 * np.sqrt(truth * (1 - truth) / pairs))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("It fits, and I LOVE it!", "it fits and i love it"),
        ("Ｆｕｌｌ width ①", "full WIDTH 1"),
        ("caf\u00e9 au lait", "cafe\u0301 au lait"),
        ("很好，看。", "很好看"),
    ],
)
def test_case_form_and_punctuation_do_not_count(first: str, second: str) -> None:
    assert jaccard(first, second) == 1


def test_in_chinese_each_character_is_a_word() -> None:
    assert len(shingles("红色裙子")) == 3
    assert len(shingles("red dress, size 10")) == 3
    assert len(shingles("买了iPhone手机")) == 4
    changed = CHINESE.replace("红", "蓝")
    assert jaccard(CHINESE, changed) == sketched([(CHINESE, changed)])[0] > 0.85
    assert linked([CHINESE, changed, "这个手机的电池用了三天就坏了，客服也不理人，太失望了。"]) == {(0, 1)}


def test_characters_are_a_unit_of_their_own() -> None:
    letters = NearSettings(unit="characters", size=5)
    assert len(shingles("abcdefg", letters)) == 3
    assert shingles("a  b\nc d", letters) == shingles("a b c d", letters)
    assert jaccard("abcdefgh!", "abcdefgh?", letters) == pytest.approx(4 / 6)


def test_short_texts_are_like_their_equals_alone() -> None:
    texts = ["", "Good", "good!", "bad", "!!!", "???", "!!!", "👍", "👎", "no no", "no"]
    links = linked(texts)
    assert links == {(1, 2), (4, 6)}
    assert all(len(shingles(text)) == 1 for text in texts)


def test_sketches_are_exact_where_the_texts_are_short_and_near_where_they_are_long() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(4000)]
    pairs = []
    for length in (5, 50, 500, 20_000):
        for changes in (0, 1, length // 20, length // 4):
            words = rng.choices(vocabulary, k=length)
            other = list(words)
            for place in rng.sample(range(length), changes):
                other[place] = rng.choice(vocabulary)
            pairs.append((" ".join(words), " ".join(other)))
    found, truth = sketched(pairs), np.array([jaccard(*pair) for pair in pairs])
    short = np.array([len(pair[0].split()) < near.SKETCH for pair in pairs])
    assert found[short].tolist() == pytest.approx(truth[short].tolist(), abs=1e-12)
    assert found[~short] == pytest.approx(truth[~short], abs=4 * 0.016)  # four standard errors at 0.5
    assert not (found[~short] == truth[~short]).all()
    assert max(np.diff(near.sketches([p[0] for p in pairs], WORDS).offsets.to_numpy())) == near.SKETCH


def test_what_is_compared_together_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefghij", k=rng.randint(0, 30))) for _ in range(200)] + ["", CHINESE]
    (keys, size), sketches = near.band_keys(texts, WORDS), near.sketches(texts, WORDS)
    alike = near.similarities(sketches[:-1], sketches[1:])
    monkeypatch.setattr(near, "SLICE_CHARACTERS", 40)
    monkeypatch.setattr(near, "COMPARED", 64)
    again = near.band_keys(texts, WORDS)
    assert (again[0] == keys).all()
    assert again[1] == size >= len(sketches.flatten())
    assert near.sketches(texts, WORDS).equals(sketches)
    assert near.similarities(sketches[:-1], sketches[1:]).tolist() == alike.tolist()


@settings(deadline=None)  # the first text waits for a table of all characters
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8), st.sampled_from(["words", "characters"]))
def test_any_texts_are_taken(texts: list[str], unit: str) -> None:
    wanted = NearSettings.model_validate({"unit": unit, "size": 3})
    keys, _ = near.band_keys([*texts, None, "\ud800"], wanted)
    assert keys.shape == (len(texts) + 2, Bands.of(0.8).bands)
    sketches = near.sketches([*texts, None], wanted)
    assert near.similarities(sketches, sketches).tolist() == [1.0] * (len(texts) + 1)


@pytest.mark.timeout(60)
def test_a_text_of_a_megabyte_is_one_of_many() -> None:
    long = "It was a good dress. " * 50_000
    different = " ".join(f"word{i}" for i in range(120_000))
    keys, _ = near.band_keys([long, different, long + "Indeed.", different[:-9]], WORDS)
    assert (keys[1] == keys[3]).any()
    assert sketched([(different, different[:-9])])[0] > 0.95
    assert not (keys[0] == keys[1]).any()


@pytest.mark.timeout(60)
def test_links_of_a_hundred_thousand_rows_of_one_key_are_no_square() -> None:
    rows = 100_000
    positions = np.random.default_rng(0).permutation(rows)
    sure = near.equals(np.zeros(rows, np.int64), positions)
    assert set(sure["a"].to_pylist()) == {0}
    assert sure["b"].to_pylist() == list(range(1, rows))
    found = near.candidates(np.zeros(rows, np.int64), positions)
    assert near.NEIGHBOURS * rows < found.num_rows < (near.NEIGHBOURS + 1) * rows


def test_an_unlike_row_that_comes_first_does_not_part_the_others() -> None:
    found = near.candidates(np.array([7, 7, 7, 8]), np.array([4, 2, 9, 1]))
    assert found.to_pydict() == {"a": [2, 2, 4], "b": [4, 9, 9]}
    many = near.candidates(np.zeros(20, int), np.arange(20))
    assert {(a, b) for a, b in zip(*many.to_pydict().values(), strict=True) if a and b - a > 6} == set()
    assert {(10, 16), (9, 10), (0, 19)} < set(zip(*many.to_pydict().values(), strict=True))


def test_candidates_do_not_depend_on_order() -> None:
    rng = np.random.default_rng(0)
    keys, positions = rng.integers(0, 50, 400), rng.integers(0, 200, 400)
    first = near.candidates(keys, positions)
    order = rng.permutation(400)
    assert near.candidates(keys[order], positions[order]).equals(first)
    assert (first["a"].to_numpy() < first["b"].to_numpy()).all()
    assert len(set(zip(*first.to_pydict().values(), strict=True))) == first.num_rows
    assert near.candidates(np.empty(0, np.int64), np.empty(0, np.int64)).num_rows == 0


def test_a_candidate_counts_where_it_is_like_enough() -> None:
    texts = [
        "one two three four five six seven eight nine ten",
        "one two three four five six seven eight nine eleven",
        "one two three four five six seven eight nine ten !",
        "of all things this is none",
    ]
    alike = near.sketches(texts, WORDS)

    def rows(order: list[int]) -> pa.Table:
        position = pa.array([1, 2, 3, 9])  # row 9 has changed since: its first, 5, is not there
        return pa.table({"a": [1, 1, 1, 5], "position": position, "value": alike}).take(pa.array(order))

    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        assert near.verified(rows(order), 0.8).to_pydict() == {"a": [1, 1], "b": [2, 3]}
        assert near.verified(rows(order), 0.9).to_pydict() == {"a": [1], "b": [3]}
    assert near.verified(rows([0]), 0.9).num_rows == 0


def test_planted_duplicates_are_found() -> None:
    """Against exact Jaccard of all pairs; `make bench-dedup` measures more of them."""
    rng = random.Random(2)
    vocabulary = [f"word{i}" for i in range(300)]
    texts = []
    for _ in range(60):
        words = rng.choices(vocabulary, k=rng.randint(20, 60))
        texts += [" ".join(words)] + [" ".join(edited(words, vocabulary, rng)) for _ in range(4)]
    sets = [shingles(text) for text in texts]
    truth = {
        (i, j)
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.8
    }
    candidates = sorted(linked(texts))
    alike = sketched([(texts[a], texts[b]) for a, b in candidates])
    found = {pair for pair, similarity in zip(candidates, alike, strict=True) if similarity >= 0.8}
    assert found <= truth
    assert len(truth) > 100
    assert {row for pair in truth for row in pair} == {row for pair in found for row in pair}


def edited(words: list[str], vocabulary: list[str], rng: random.Random) -> list[str]:
    changed = list(words)
    for place in rng.sample(range(len(words)), rng.randint(0, max(1, len(words) // 10))):
        changed[place] = rng.choice(vocabulary)
    return changed
