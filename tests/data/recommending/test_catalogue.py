"""Rows of a table of items or users as what a recommender reads."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lib.data.recommending.catalogue import prepare
from lib.settings import ItemSettings, UserSettings


def strings(*values: str | None) -> pa.Array:
    return pa.array(values, pa.string())


def test_texts_are_joined_and_categories_are_named_by_their_columns() -> None:
    table = ItemSettings(source="x", text=["title", "about"], categories=["kind", "tags"], numbers=["price"])
    rows = {
        "id": strings(" a ", "b"),
        "text.0": strings("A film.", "B"),
        "text.1": strings("of a  dress", None),
        "categories.0": strings("old", ""),
        "categories.1": strings("x| y |", None),
        "numbers.0": strings("3.5", ""),
    }
    found, wrong = prepare(rows, table)
    assert wrong is None
    assert found["id"].to_pylist() == ["a", "b"]
    assert found["title"].to_pylist() == ["A film.", "B"]
    assert found["text"].to_pylist() == ["A film. of a dress", "B"]
    assert found["categories"].to_pylist() == [["kind=old", "tags=x", "tags=y"], []]
    prices = found["numbers"].to_pylist()
    assert prices[0] == [3.5]
    assert np.isnan(prices[1][0])


def test_a_table_without_categories_and_numbers_has_empty_ones() -> None:
    for table in (ItemSettings(source="x"), UserSettings(source="x")):
        found, _ = prepare({"id": strings("a", "b"), "text.0": strings("A", "B")}, table)
        assert found["categories"].to_pylist() == [[], []]
        assert found["numbers"].to_pylist() == [[], []]


def test_the_first_row_that_cannot_be_read_is_told() -> None:
    table = UserSettings(source="x", numbers=["age"])
    rows = {"id": strings("a", " ", "c"), "numbers.0": strings("1", "2", "old")}
    assert prepare(rows, table)[1] == (1, "has no user")
    assert prepare(rows | {"id": strings("a", "b", "c")}, table)[1] == (
        2,
        "has the age 'old', which is no number",
    )
