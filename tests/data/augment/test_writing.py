"""What a model writes of rows: what of it stays, that it reaches the rows that were asked of, and that chance is theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.augment import writing
from lib.data.augment.counting import Known
from lib.data.augment.making import Making
from lib.data.augment.rows import Augmentation, augment
from lib.data.blocks import Reading
from lib.data.build import build
from lib.data.places import Found
from lib.data.plan import plan
from lib.data.redact import Rules
from lib.errors import ConfigError, ModelError
from lib.settings import AugmentSettings
from tests.data.test_build import settings, write_jsonl

SMOLLM = "sample://smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("old", "new", "stays"),
    [
        ("the dress is soft", "a soft dress it is", True),
        ("the dress is soft", "The  DRESS is soft", False),
        ("the dress is soft", "soft", False),
        ("the dress is soft", "the dress is soft, and I would like to say a great deal more of it", False),
        ("write to <EMAIL_1> today", "today, write to <EMAIL_1>", True),
        ("write to <EMAIL_1> today", "write to them today please", False),
        ("write to <EMAIL_1> today", "<EMAIL_1> and <EMAIL_2>, write", False),
        ("write to them all today", "write to ada@example.com", False),
    ],
)
def test_what_is_written_has_to_differ_and_be_about_as_long(old: str, new: str, stays: bool) -> None:
    assert writing.stay(old, new, (0.5, 2.0), Rules()) == stays


def test_prompts_are_filled_whatever_a_text_holds() -> None:
    assert (
        writing.filled("Into {language}: {text}", "a {language} {0}", "German")
        == "Into German: a {language} {0}"
    )


def test_models_that_write_nothing_are_refused(tiny_base: Path, storage: Path) -> None:
    def given(model: str) -> Any:
        writer = AugmentSettings.model_validate({"paraphrase": True, "writer": {"model": model}}).writer
        assert writer is not None
        return writer

    with pytest.raises(
        ConfigError, match=r"data.augment.writer.model: .* is BertModel, which writes nothing"
    ):
        writing.identity(given(str(tiny_base)))
    with pytest.raises(ModelError, match="no model version support@3 in storage"):
        writing.identity(given("support@3"))


class Scripted:
    """Stands in for the model where what it says has to be known: everything else is real."""

    context = 100
    asked: list[str]

    def __init__(self) -> None:
        self.asked = []

    def prompt(self, turns: list[dict[str, str]]) -> list[int]:
        return [0] * len(turns[0]["content"].split())

    def answers(self, dialogues: Any, *arguments: Any, seeds: list[int]) -> list[Any]:
        from lib.generation import Answer

        self.asked += [turns[0]["content"] for turns in dialogues]
        assert len(set(seeds)) == len(seeds)
        said = [turns[0]["content"].partition(": ")[2] for turns in dialogues]
        return [Answer(" ".join(reversed(text.split())), 1, 1, "endless" not in text) for text in said]


def written(asked: list[str], **given: Any) -> tuple[list[str | None], list[str]]:
    values = AugmentSettings.model_validate({"writer": {"model": "m", "max_tokens": 10}, **given})
    assert values.writer is not None
    by = Making(Augmentation(values, 0), Known([]))
    reading = Reading((), {}, frozenset(), 1, None)
    writer = writing.Writer(reading, None, Found(), by, Rules(), values.writer)  # type: ignore[arg-type]
    model = Scripted()
    writer._generator = model  # type: ignore[assignment]
    (method,) = values.methods
    said = writer._written([(f"row{i}", (method, i % 2), 0, text) for i, text in enumerate(asked)])
    return said, model.asked


def test_paraphrases_are_asked_for_once_and_translations_twice() -> None:
    texts = ["one two three", "one", "endless one two", "long " * 95, "four five"]
    said, asked = written(texts, paraphrase={"prompt": "Say: {text}"})
    assert said == ["three two one", None, None, None, "five four"]
    assert asked == ["Say: one two three", "Say: one", "Say: endless one two", "Say: four five"]
    told = {
        "prompt": "To {language}: {text}",
        "languages": ["German", "French"],
        "language": "English",
        "n_aug": 2,
    }
    said, asked = written(["one two three", "four five"], back_translation=told)
    assert asked == [
        "To German: one two three",
        "To French: four five",
        "To English: three two one",
        "To English: five four",
    ]
    assert said == [None, None]  # translated back, they are what they were


def test_written_texts_become_rows_of_those_that_they_were_asked_of() -> None:
    rows = pa.table(
        {"id": ["a", "b"], "text": ["one two", "three four"], "label": pa.array([0, 1], pa.int32())}
    )
    by = Augmentation(
        AugmentSettings.model_validate({"paraphrase": {"n_aug": 2}, "writer": {"model": "m"}}), 0
    )
    texts = [{"paraphrase:0": ["two one"], "paraphrase:1": ["two  one"]}, {"paraphrase:1": ["four & three"]}]
    new = augment(rows, np.array([0, 1], np.int32), by, lambda hashes: np.zeros(len(hashes), bool), texts)
    assert new.rows.select(["id", "text", "label", "augmented_by"]).to_pylist() == [
        {"id": "a~paraphrase0", "text": "two one", "label": 0, "augmented_by": "paraphrase"},
        {"id": "b~paraphrase1", "text": "four & three", "label": 1, "augmented_by": "paraphrase"},
    ]
    assert new.counts == {"paraphrase": 2, "unchanged": 2, "known": 0}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
@pytest.mark.long
def test_a_model_writes_rows_on_ray(tiny_base: Path, tmp_path: Path) -> None:
    texts = [
        "The dress is soft and fits me very well.",
        "I returned the shirt because the fabric was awful.",
        "Great color, but the size was too small for me.",
        "I love this sweater and wear it every day.",
        "The quality is poor and it fell apart in the wash.",
        "Write to me if you want to know more about it.",
    ]
    rows = [{"text": text, "label": 1 + i % 2} for i, text in enumerate(texts)]
    given = {
        "paraphrase": {"n_aug": 2, "prompt": "Rewrite this sentence in other words: {text}"},
        "writer": {"model": SMOLLM, "max_tokens": 40, "length": [0.3, 4.0], "least_similarity": 0.2},
    }
    split = {"train": 1, "validation": 0, "test": 0}
    found = []
    for size in (6, 2):
        source = write_jsonl(tmp_path / "a.jsonl", rows)
        planned = plan(
            settings(
                tiny_base,
                source,
                augment=given,
                rows_per_shard=size,
                split=split,
                leakage="off",
            )
        )
        manifest = build(planned)
        shards = planned.ref.shards("train")
        train = pa.concat_tables(pq.read_table(shard.removeprefix("file://")) for shard in shards).to_pylist()
        found.append({row["id"]: row["text"] for row in train if row["augmented_by"]})
        assert manifest["augmented"]["paraphrase"] == len(found[-1])
        assert all(row["augmented_from"] in row["id"] for row in train if row["augmented_by"])
    assert found[0]
    assert not set(found[0].values()) & set(texts)
    # In other blocks, and so in other batches of the model, chance is the same; rounding is not quite.
    same = sum(found[1].get(name) == text for name, text in found[0].items())
    assert same >= len(found[0]) / 2
