"""The recommender: what its vectors depend on, and that nothing that comes later is among it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.recommender import items as catalogue
from lib.recommender.model import GAPS, Facts, Recommender, gap_codes
from lib.tasks import recommend
from tests.recommending import ITEMS, dataset_of, item_rows, settings_for


@pytest.fixture
def build(storage: Path, tiny_base: Path) -> Any:
    def build(seen: int | list[int] = 5, **recommender: Any) -> Recommender:
        settings = settings_for(tiny_base, **recommender)
        ref = dataset_of(
            item_rows(tiny_base, seen=seen), {}, fingerprint=f"{len(list(storage.glob('*/*/*'))):016x}"
        )
        torch.manual_seed(0)
        return recommend.build(tiny_base, settings, ref)

    return build


def asked(batch: int = 3, length: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(top: int) -> torch.Tensor:
        return torch.randint(0, top, (batch, length), generator=generator)

    return {
        "items": drawn(ITEMS),
        "gaps": drawn(GAPS),
        "events": drawn(2),
        "user_categories": torch.tensor([0, 1]),
        "user_starts": torch.tensor([0, 1, 1]),
        "user_numbers": torch.tensor([[0.0], [1.0], [-1.0]]),
    }


@pytest.mark.parametrize("sequence", ["gru", "transformer"])
@torch.no_grad()
def test_a_user_is_what_came_before_and_not_what_comes_after(build: Any, sequence: str) -> None:
    model = build(sequence=sequence, heads=2).eval()
    given = asked()
    users, _, _ = model(**given)
    for name, top in (("items", ITEMS), ("gaps", GAPS), ("events", 2)):
        other = {**given, name: given[name].clone()}
        other[name][:, 3] = (other[name][:, 3] + 1) % top
        changed, _, _ = model(**other)
        assert torch.equal(changed[:, :3], users[:, :3])
        assert (changed[:, 3:] != users[:, 3:]).any(-1).all(), name


@torch.no_grad()
def test_what_is_known_of_a_user_counts(build: Any) -> None:
    model = build().eval()
    given = asked()
    users, _, _ = model(**given)
    other, _, _ = model(**{**given, "user_numbers": torch.tensor([[0.0], [2.0], [-1.0]])})
    assert torch.equal(other[[0, 2]], users[[0, 2]])
    assert not torch.isclose(other[1], users[1]).all(-1).any()
    other, _, _ = model(**{**given, "user_categories": torch.tensor([1, 1])})
    assert not torch.isclose(other[0], users[0]).all(-1).any()
    assert torch.equal(other[1:], users[1:])


@pytest.mark.parametrize("text", ["none", "tuned"])
@torch.no_grad()
def test_some_items_are_encoded_as_all_are(build: Any, text: str) -> None:
    model = build(text=text).eval()
    given, wanted = asked(), torch.tensor([7, 0, 23])
    users, vectors, bias = model(**given)
    some, chosen, chosen_bias = model(**given, wanted=wanted)
    torch.testing.assert_close(some, users)
    torch.testing.assert_close(chosen, vectors[wanted])
    torch.testing.assert_close(chosen_bias, bias[wanted])


@torch.no_grad()
def test_a_new_item_is_what_is_known_of_it(build: Any, tiny_base: Path) -> None:
    rows = item_rows(tiny_base)
    model = build(seen=[0, *[5] * (ITEMS - 1)]).eval()
    vectors, bias = model.item_vectors(torch.arange(ITEMS))
    facts = model.facts_of(torch.arange(ITEMS))
    assert torch.equal(vectors[0], facts[0])  # never seen: its id means nothing
    assert not torch.isclose(vectors[1:], facts[1:]).all(-1).any()
    codes, starts = catalogue.coded(rows["categories"], model.config.item_categories)
    numbers = catalogue.Scale(**model.config.item_numbers).apply(catalogue.numbers(rows["numbers"]))
    alone = model.with_facts(Facts(codes, starts, numbers, np.zeros(ITEMS, np.int64)))
    found, found_bias = alone.item_vectors(torch.arange(ITEMS))
    torch.testing.assert_close(found, facts)
    torch.testing.assert_close(found_bias[0], bias[0])


def test_training_leaves_out_the_ids_of_some_items(build: Any) -> None:
    model = build(id_dropout=0.5).train()
    torch.manual_seed(1)
    vectors, _ = model.item_vectors(torch.arange(ITEMS))
    without = torch.isclose(vectors, model.facts_of(torch.arange(ITEMS))).all(-1)
    assert 0 < int(without.sum()) < ITEMS
    model.eval()
    vectors, _ = model.item_vectors(torch.arange(ITEMS))
    assert not torch.isclose(vectors, model.facts_of(torch.arange(ITEMS))).all(-1).any()


def test_numbers_that_are_not_known_are_the_mean() -> None:
    scale = catalogue.Scale.of(np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, 5.0]]))
    assert scale.mean == [2.0, 5.0]
    assert scale.spread == [1.0, 1.0]  # of a column that never differs: nothing is divided by 0
    applied = scale.apply(np.array([[1.0, 5.0], [np.nan, np.nan]]))
    assert applied.tolist() == [[-1.0, 0.0], [0.0, 0.0]]
    assert scale.undo(applied).tolist() == [[1.0, 5.0], [2.0, 5.0]]


def test_gaps_grow_with_time_and_end_somewhere() -> None:
    times = np.array([100, 100, 101, 3701, 3701 + 86400 * 365, 3700])
    codes = gap_codes(times)
    assert codes[:3].tolist() == [0, 0, 0]
    assert 0 < codes[3] < codes[4] < GAPS
    assert codes[5] == 0  # the clock went back
    assert gap_codes(np.array([0, 10**15])).tolist() == [0, GAPS - 1]
