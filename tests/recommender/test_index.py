"""What an index finds of a large catalogue is what all items looked at would give, and at once what came since."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lib.errors import ModelError
from lib.recommender import index
from lib.recommender.index import Aim, Index, Measured
from lib.recommender.shelf import Filters, Item, Pool, Shelf
from lib.settings import OfferSettings
from tests.recommending import clustered

N, W, USERS, MOST = 20_000, 32, 128, 200
FLOOR = OfferSettings().least_recall
GENRES = 20


def catalogue() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors and biases of items, and users who are near what they like."""
    random = np.random.default_rng(0)
    vectors, _ = clustered(N, W, random)
    liked = vectors[random.integers(0, N, (USERS, 3))].mean(1) + 0.05 * random.standard_normal((USERS, W))
    users = 4 * liked / np.linalg.norm(liked, axis=1, keepdims=True)
    return vectors, random.normal(0, 0.5, N).astype(np.float32), users.astype(np.float32)


VECTORS, BIAS, LIKED = catalogue()
ITEMS = [
    Item(f"i{i}", f"Film {i}", categories=(f"genre=g{i % GENRES}",), numbers=(float(i),)) for i in range(N)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model directory, what the index has there."""
    folder = tmp_path_factory.mktemp("index")
    had = [np.random.default_rng(i).integers(0, N, 50) for i in range(USERS)]
    index.make(VECTORS, BIAS, LIKED, had, folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> Measured:
    found = index.told(str(folder))
    assert found is not None
    return found


@pytest.fixture
def shelf(folder: Path) -> Shelf:
    return Shelf(ITEMS, VECTORS, BIAS, index.read(folder, VECTORS, BIAS))


@pytest.fixture(scope="module")
def plain() -> Shelf:
    """Without the index."""
    return Shelf(ITEMS, VECTORS, BIAS)


def pools(shelf: Shelf, user: np.ndarray, allowed: np.ndarray, had: int = 0) -> tuple[Pool, Pool]:
    """By the index, and by all scores."""
    return shelf.near(user, allowed, MOST, had), shelf.pool(shelf.scores(user[None])[0], allowed, MOST)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.isin(exact, found).mean())


def everything(shelf: Shelf) -> np.ndarray:
    return shelf.allowed(Filters(), (), len(shelf))


def test_what_is_found_is_what_was_measured(shelf: Shelf, measured: Measured) -> None:
    found = [
        recall(near.rows, exact.rows) for near, exact in (pools(shelf, u, everything(shelf)) for u in LIKED)
    ]
    assert np.mean(found) >= FLOOR
    assert np.mean(found) == pytest.approx(measured.recall, abs=0.02)
    assert measured.items == N
    assert measured.reads < N / 4  # a small part of all is read
    assert FLOOR <= measured.recall <= 1
    assert measured.worst <= measured.recall
    assert f"recall@200 of the exact answer {measured.recall:.3f}" in str(measured)


def test_scores_and_chances_are_those_of_all_items(shelf: Shelf) -> None:
    for user in LIKED[:20]:
        near, exact = pools(shelf, user, everything(shelf))
        if recall(near.rows, exact.rows) == 1:
            assert near.rows.tolist() == exact.rows.tolist()
        both = np.intersect1d(near.rows, exact.rows)
        for name, tolerance in (("worth", 1e-4), ("chances", 0.02)):
            mine, theirs = (
                getattr(pool, name)[np.argsort(pool.rows)][np.isin(np.sort(pool.rows), both)]
                for pool in (near, exact)
            )
            assert mine == pytest.approx(theirs, rel=tolerance, abs=1e-9), name
        assert np.all(np.diff(near.worth) <= 0)
    assert not shelf.near(LIKED[0], everything(shelf), MOST, chances=False).chances.any()


def test_with_all_read_the_answer_is_the_exact_one() -> None:
    everywhere = Index(index.divided(VECTORS, BIAS, 1.0), 1.0, VECTORS, BIAS)
    for user in LIKED[:5]:
        aim, allowed = Aim.user(user), np.ones(N, bool)
        near = everywhere.near(aim, allowed, N, N)
        assert near is not None
        assert np.array_equal(np.sort(near.rows), np.arange(N))
        assert near.worth[np.argsort(near.rows)] == pytest.approx(VECTORS @ user + BIAS, abs=1e-5)
        assert near.log_rest == -np.inf
        assert everywhere.near(aim, allowed, N, N - 1) is None


def test_who_did_nothing_gets_what_is_popular(shelf: Shelf) -> None:
    near, exact = pools(shelf, np.zeros(W, np.float32), everything(shelf))
    assert recall(near.rows, exact.rows) >= FLOOR


@pytest.mark.parametrize("genres", [1, 3, 10])
def test_filters_leave_as_good_an_answer(shelf: Shelf, genres: int) -> None:
    allowed = shelf.allowed(Filters({"genre": [f"g{i}" for i in range(genres)]}), range(0, N, 7), N)
    found = []
    for user in LIKED[:40]:
        near, exact = pools(shelf, user, allowed)
        assert allowed[near.rows].all()
        assert len(near.rows) == MOST
        found.append(recall(near.rows, exact.rows))
    assert np.mean(found) >= FLOOR


def test_few_that_are_left_are_all_looked_at(shelf: Shelf) -> None:
    narrow = Filters({"genre": ["g3"]}, {0: (100.0, 900.0)})
    for filters, out in (
        (narrow, [103]),
        (Filters({"genre": ["none"]}), ()),
        (Filters({}, {0: (5.0, 5.0)}), ()),
    ):
        allowed = shelf.allowed(filters, out, N)
        near, exact = pools(shelf, LIKED[0], allowed)
        assert near.rows.tolist() == exact.rows.tolist()
        assert near.chances == pytest.approx(exact.chances, rel=1e-4)
        assert not np.isin(out, near.rows).any()


def test_filters_that_lie_elsewhere_than_a_users_taste_are_looked_at_as_a_whole(shelf: Shelf) -> None:
    """What is likest to the user is not allowed: what promises most shows nothing."""
    user = LIKED[0]
    allowed = VECTORS @ user + BIAS < np.quantile(VECTORS @ user + BIAS, 0.5)
    near, exact = pools(shelf, user, allowed)
    assert recall(near.rows, exact.rows) >= FLOOR
    assert allowed[near.rows].all()


def test_the_best_are_found_when_they_are_out(shelf: Shelf) -> None:
    """A long history: all that stands first was had already."""
    for user in LIKED[:10]:
        out = np.argsort(-(VECTORS @ user + BIAS))[:500]
        allowed = shelf.allowed(Filters(), out.tolist(), N)
        near, exact = pools(shelf, user, allowed, had=len(out))
        assert not np.isin(out, near.rows).any()
        assert recall(near.rows, exact.rows) >= FLOOR


def test_what_came_or_changed_is_found_at_once(shelf: Shelf) -> None:
    user = LIKED[0]
    worst, best = (int(np.argsort(sign * (VECTORS @ user + BIAS))[0]) for sign in (1, -1))
    drawn = 2 * user / np.linalg.norm(user)
    came = [Item(f"new-{n}", "New", categories=("genre=new",), numbers=(0.0,)) for n in range(3)]
    for item in came:
        shelf.put([item], drawn[None], np.ones(1, np.float32))
    shelf.put([ITEMS[worst], ITEMS[best]], np.stack([drawn, -drawn]), np.zeros(2, np.float32))
    near, exact = pools(shelf, user, everything(shelf))
    assert set(near.rows[:4].tolist()) == {N, N + 1, N + 2, worst}
    assert best not in near.rows
    assert recall(near.rows, exact.rows) >= FLOOR
    assert len(set(near.rows.tolist())) == len(near.rows)
    # Again as it was; and one whose title alone is another is as it was in the index.
    shelf.put([ITEMS[worst]], VECTORS[worst][None], BIAS[[worst]])
    shelf.put([replace(ITEMS[best], title="again")], -drawn[None], np.zeros(1, np.float32))
    near, _ = pools(shelf, user, everything(shelf))
    assert worst not in near.rows
    # Of new ones only, and for who asked before they were there.
    only, _ = pools(shelf, user, shelf.allowed(Filters({"genre": ["new"]}), [N], len(shelf)))
    assert sorted(only.rows.tolist()) == [N + 1, N + 2]
    assert shelf.near(user, np.ones(N, bool), MOST).rows.max() < N


def test_items_alike_and_words(shelf: Shelf, plain: Shelf) -> None:
    alike, searched = [], []
    for row in range(0, N, N // 40):
        near, exact = (one.similar(row, MOST, everything(one)) for one in (shelf, plain))
        alike.append(recall(np.array([r for r, _ in near]), np.array([r for r, _ in exact])))
        cosines = dict(exact)
        assert all(cosine == pytest.approx(cosines[r], abs=1e-5) for r, cosine in near if r in cosines)
        assert row not in dict(near)
        user = LIKED[row % USERS]
        for taste in (0.0, 0.3, 1.0):
            asked = VECTORS[row], user, taste, everything(shelf), MOST
            mine, theirs = shelf.search(*asked), plain.search(*asked)
            searched.append(recall(np.array([r for r, *_ in mine]), np.array([r for r, *_ in theirs])))
            told = {r: (worth, cosine) for r, worth, cosine in theirs}
            for r, worth, cosine in mine:
                if r in told:
                    assert (worth, cosine) == pytest.approx(told[r], abs=1e-3)
    assert np.mean(alike) >= FLOOR
    assert np.mean(searched) >= FLOOR


def test_words_and_taste_are_each_standardised(plain: Shelf) -> None:
    user, words = LIKED[0], VECTORS[5]
    cosines = VECTORS @ words / np.linalg.norm(VECTORS, axis=1) / np.linalg.norm(words)
    scores = VECTORS @ user + BIAS
    wanted = 0.7 * (cosines - cosines.mean()) / cosines.std() + 0.3 * (scores - scores.mean()) / scores.std()
    found = plain.search(words, user, 0.3, everything(plain), 20)
    assert [row for row, *_ in found] == np.argsort(-wanted)[:20].tolist()
    assert [worth for _, worth, _ in found] == pytest.approx(np.sort(wanted)[::-1][:20].tolist(), abs=1e-3)
    assert [cosine for *_, cosine in found] == pytest.approx(
        cosines[[row for row, *_ in found]].tolist(), abs=1e-5
    )


def test_the_same_items_have_the_same_index(folder: Path, tmp_path: Path) -> None:
    had = [np.random.default_rng(i).integers(0, N, 50) for i in range(USERS)]
    again = index.make(VECTORS, BIAS, LIKED, had, tmp_path)
    assert again == index.told(str(folder))
    assert (tmp_path / index.FILE).read_bytes() == (folder / index.FILE).read_bytes()


def test_items_that_are_all_the_same(tmp_path: Path) -> None:
    vectors, bias = np.ones((300, 4), np.float32), np.zeros(300, np.float32)
    measured = index.make(vectors, bias, np.ones((1, 4), np.float32), [np.zeros(0, np.int64)], tmp_path)
    assert measured.cells == 1
    found = index.read(tmp_path, vectors, bias).near(
        Aim.user(np.ones(4, np.float32)), np.ones(300, bool), 10, 300
    )
    assert found is not None
    assert len(found.rows) == 300


def test_an_index_of_others_is_refused(folder: Path, tmp_path: Path) -> None:
    assert index.told(str(tmp_path)) is None
    with pytest.raises(ModelError, match=r"is of 20,000 items and not 5; export it again"):
        index.read(folder, VECTORS[:5], BIAS[:5])
    values = json.loads((folder / index.TOLD).read_text())
    (tmp_path / index.TOLD).write_text(json.dumps(values | {"format": 2}))
    with pytest.raises(ModelError, match="has format 2"):
        index.told(str(tmp_path))
