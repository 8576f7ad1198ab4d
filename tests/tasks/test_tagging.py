"""The tagging task: rows of any scheme, alignment, windows, loss, and a model directory's round trip."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib import entities
from lib.artifacts import TaskFile
from lib.base_models import base_directory
from lib.encoders import load_tokenizer
from lib.errors import ConfigError, ModelError
from lib.labels import MISSING, UNKNOWN
from lib.settings import ModelSettings, ServingSettings, Settings
from lib.tasks import load_task, tagging
from lib.words import case_of, cut_words, first_pieces, tokenize_words, windows

CLASSES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SENTENCES = [
    (["the", "great", "dress", "is", "in", "size", "."], [0, 1, 2, 0, 0, 3, 0]),
    (["fabric"], [3]),
    (["unlikely", "shirt"] * 20, [1, 0] * 20),
]


def settings_for(
    base: Path | str = "unused", data: dict[str, Any] | None = None, **training: Any
) -> Settings:
    return Settings.model_validate(
        {
            "name": "x",
            "task": "tagging",
            "data": {"source": "x.jsonl", "labels": ["PER", "LOC"], **(data or {})},
            "model": {"base": str(base), "max_length": 16},
            "training": training,
        }
    )


def prepared(rows: list[tuple[Any, Any]], **data: Any) -> Any:
    columns = {
        name: pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values], pa.string())
        for name, values in zip(("tokens", "tags"), zip(*rows, strict=True), strict=True)
    }
    return tagging.prepare(columns, settings_for(data=data).data)


def encoded(base: Path) -> pa.Table:
    rows = pa.table(
        {
            "id": [f"{i:016x}" for i in range(len(SENTENCES))],
            "tokens": [words for words, _ in SENTENCES],
            "tags": pa.array([tags for _, tags in SENTENCES], pa.list_(pa.int32())),
        }
    )
    return tagging.encode(rows, settings_for(base).model)


def test_every_scheme_becomes_iob2() -> None:
    found = prepared(
        [
            (["Ada", "Lovelace", "saw", "Paris"], ["I-PER", "I-PER", "O", "I-LOC"]),
            (["Ada", "Lovelace", "saw", "Paris"], ["B-PER", "E-PER", "O", "S-LOC"]),
        ]
    )
    assert found.rows["tags"].to_pylist() == [[1, 2, 0, 3]] * 2
    assert found.labels[0] == found.labels[1] >= 0
    assert found.texts.to_pylist() == ["Ada Lovelace saw Paris"] * 2


def test_rows_without_words_or_tags_and_with_unknown_kinds_are_told_apart() -> None:
    found = prepared([([], []), (["Ada"], None), (["Ada"], ["B-ORG"]), (None, None), (["Ada"], ["B-PER"])])
    assert found.empty.tolist() == [True, False, False, True, False]
    assert found.labels[[1, 2]].tolist() == [MISSING, UNKNOWN]
    assert found.values[2].as_py() == "B-ORG"
    assert found.labels[4] >= 0
    assert not found.malformed


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((["Ada", "saw"], ["B-PER"]), "has 2 tokens and 1 tags"),
        ((["Ada"], ["PER"]), "has the tag 'PER'; give O, or a prefix"),
        (("not json", ["O"]), r"holds no list in data\.columns\.tokens, 'tokens'"),
        ((["Ada", 3], ["O", "O"]), r"must hold a list of strings in data\.columns\.tokens"),
        (({"a": 1}, ["O"]), "must hold a list of strings"),
    ],
)
def test_a_row_of_a_wrong_form_is_named(row: Any, said: str) -> None:
    found = prepared([(["Ada"], ["O"]), row])
    assert list(found.malformed) == [1]

    assert re.search(said, found.malformed[1])


def test_kinds_are_mapped() -> None:
    found = prepared([(["Ada", "Paris"], ["B-person", "B-city"])], labels={"person": "PER", "city": "LOC"})
    assert found.rows["tags"].to_pylist() == [[1, 3]]


def test_words_are_normalised_and_keep_their_places() -> None:
    found = prepared([(["caf\u0065\u0301", "\u200b", "x"], ["O", "O", "B-LOC"])])
    assert found.rows["tokens"].to_pylist() == [["café", "\ufffd", "x"]]


def test_undersampling_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.undersample"):
        tagging.columns(settings_for(data={"undersample": {"PER": 0.5}}).data)


def test_the_first_piece_of_a_word_carries_its_class(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    rows = encoded(tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for row, (words, tags) in zip(rows.to_pylist(), SENTENCES, strict=True):
        expected = tokenizer(words, is_split_into_words=True, truncation=True, max_length=16)
        assert row["input_ids"] == expected["input_ids"]
        labels = [tagging.IGNORED] * len(expected["input_ids"])
        for place, word in enumerate(expected.word_ids()):
            if word is not None and word != expected.word_ids()[place - 1]:
                labels[place] = tags[word]
        assert row["labels"] == labels
    assert rows["truncated"].to_pylist() == [False, False, True]


def test_loss_is_a_sum_so_that_batches_add_up(tiny_base: Path) -> None:
    settings = settings_for(tiny_base)
    balance = dict(zip(CLASSES, [0.5, 1.0, 1.0, 2.0, 1.0], strict=True))
    model = tagging.build(tiny_base, settings).eval()
    rows = encoded(tiny_base)
    with torch.no_grad():
        whole, outputs = tagging.loss(model, tagging.collate(rows, 0), settings, balance)
        parts = [
            tagging.loss(model, tagging.collate(rows.slice(i, 1), 0), settings, balance)[0] for i in range(3)
        ]
    assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-5)
    labels = [tag for row in rows["labels"].to_pylist() for tag in row if tag != tagging.IGNORED]
    assert tagging.weight(rows, settings, balance) == pytest.approx(sum(balance[CLASSES[t]] for t in labels))
    assert outputs["labels"].tolist() == labels
    assert outputs["words"].sum() == len(labels)
    trained, nothing = tagging.loss(model, tagging.collate(rows, 0), settings, balance)
    assert trained.requires_grad
    assert nothing == {}


def test_metrics_are_those_of_words_and_of_entities() -> None:
    labels = np.array([1, 2, 0, 3, 0])
    predicted = np.array([1, 0, 0, 3, 0])
    found = tagging.metrics(
        {"labels": labels, "predicted": predicted, "words": np.array([3, 2]), "classes": np.array([5])}
    )
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["entity_f1"] == pytest.approx(0.5)


def test_class_weights() -> None:
    manifest = {"splits": {"train": {"labels": dict(zip(CLASSES, [60, 10, 10, 10, 10], strict=True))}}}
    assert set(tagging.balance(manifest, settings_for()).values()) == {1.0}
    balanced = tagging.balance(manifest, settings_for(class_weights="balanced"))
    assert balanced["O"] == pytest.approx(100 / (5 * 60))
    named = tagging.balance(manifest, settings_for(class_weights={"LOC": 3.0}))
    assert named == {"O": 1, "B-PER": 1, "I-PER": 1, "B-LOC": 3, "I-LOC": 3}


@pytest.mark.parametrize("sizes", [[1] * 50, [3] * 30, [1, 9, 2, 2, 8, 1, 1, 1, 1, 1, 12, 1], [40], [4]])
def test_windows_cover_every_word_once_within_the_room(sizes: list[int]) -> None:
    ends = np.cumsum(sizes)
    starts = ends - sizes
    found = windows(starts, ends, 10)
    assert [i for _, last, counts_from in found for i in range(counts_from, last)] == list(range(len(sizes)))
    for first, last, counts_from in found:
        assert first <= counts_from < last
        assert ends[last - 1] - starts[first] <= 10 or last == first + 1
    if sizes == [1] * 50:
        assert all(counts_from - first == 2 for first, _, counts_from in found[1:])


@pytest.fixture(scope="module")
def model_directory(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagger")
    torch.manual_seed(0)
    model = tagging.build(tiny_base, settings_for(tiny_base))
    model.classifier.weight.data *= 20
    tagging.save(model, tiny_base, TaskFile("tagging", CLASSES, 16, str(tiny_base), "0" * 16), folder)
    return folder


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_predictor_answers_as_transformers_does(model_directory: Path, engine: str) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    predictor = tagging.load(model_directory, ServingSettings(engine=engine, precision="fp32", threads=1))
    words = SENTENCES[0][0]
    rows = encoded(model_directory).slice(0, 2)
    logits = tagging.predict_rows(predictor, rows)["logits"]
    assert logits.shape == (len(words) + 1, len(CLASSES))
    model = AutoModelForTokenClassification.from_pretrained(model_directory).eval()
    inputs = AutoTokenizer.from_pretrained(model_directory)(
        words, is_split_into_words=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**inputs).logits[0].numpy()
    places, _ = first_pieces(inputs.word_ids())
    np.testing.assert_allclose(logits[: len(words)], expected[places], atol=1e-4)


def test_long_sentences_are_answered_to_their_end(model_directory: Path) -> None:
    predictor = tagging.load(model_directory, ServingSettings(engine="torch", precision="fp32", threads=1))
    rows = encoded(model_directory)
    logits = tagging.predict_rows(predictor, rows)["logits"]
    items = tagging.items(rows)
    assert len(logits) == len(items) == sum(len(words) for words, _ in SENTENCES)
    # Beyond the first window there are answers of the model, not the stand-in for words without a piece.
    assert np.abs(logits[-10:]).max() > 0.01


def test_texts_come_back_with_places(model_directory: Path) -> None:
    predictor = tagging.load(model_directory, ServingSettings(engine="torch", precision="fp32", threads=1))
    text = "The great dress, U.S. size 3.5 is  fine."
    words, places = cut_words(text)
    assert words == ["The", "great", "dress", ",", "U.S.", "size", "3.5", "is", "fine", "."]
    assert [text[a:b] for a, b in places] == words
    request = tagging.Request(inputs=[text, words])
    answer = tagging.predict(predictor, request)
    by_text, by_words = answer.results
    assert [(e.label, e.text) for e in by_text.entities] == [
        (e.label, e.text if e.start + 1 == e.end else text[places[e.start][0] : places[e.end - 1][1]])
        for e in by_words.entities
    ]
    assert by_text.entities, "a head of large random weights finds something"
    for entity in by_text.entities:
        assert text[entity.start : entity.end] == entity.text
        assert entity.label in ("PER", "LOC")
        assert 0 < entity.score <= 1


def test_items_are_words_in_order_with_their_rows(tiny_base: Path) -> None:
    rows = encoded(tiny_base).append_column("kind", pa.array(["a", "b", "c"]))
    items = tagging.items(rows)
    assert items.sort_by("id")["text"].to_pylist() == [w for words, _ in SENTENCES for w in words]
    assert items["label"].to_pylist() == [t for _, tags in SENTENCES for t in tags]
    assert items["kind"].to_pylist()[:8] == ["a"] * 7 + ["b"]
    perfect = tagging.row_metrics(items, items["label"].to_numpy(), CLASSES)
    assert perfect["entity_f1"] == perfect["entity_f1/PER"] == 1
    outside = tagging.row_metrics(items, np.zeros(len(items), np.int64), CLASSES)
    assert outside["entity_f1"] == 0


def test_a_marker_follows_each_word_with_capitals() -> None:
    base = ModelSettings(base="sample://minilm-l6", max_length=12, case_markers=True)
    sentence = ["EU", "rejects", "a", "McDonald", "in", "Brussels", "U.S.", "iPhone", "A", "1996"]
    rows = pa.table({"tokens": [sentence, ["small"]], "tags": [[3, 0, 0, 3, 0, 3, 3, 0, 0, 0], [0]]})
    found = tagging.encode(rows, base)
    tokenizer = load_tokenizer(base_directory(base.base), 64)
    shown = [tokenizer.id_to_token(i) for i in found["input_ids"][0].as_py()]
    assert shown == [
        "[CLS]",
        "eu",
        "[unused2]",
        "rejects",
        "a",
        "mcdonald",
        "[unused3]",
        "in",
        "brussels",
        "[unused1]",
        "u",
        "[SEP]",
    ]
    assert found["labels"][0].as_py() == [-100, 3, -100, 0, 0, 3, -100, 0, 3, -100, 3, -100]
    assert found["truncated"].to_pylist() == [True, False]
    assert [case_of(word) for word in sentence] == [1, None, None, 2, None, 0, 1, 2, 0, None]
    tokenizer.no_truncation()
    reading = tokenize_words(tokenizer, 12, [sentence], cased=True)
    seen = [
        (word, tokenizer.id_to_token(row[piece]))
        for row, places in zip(reading.rows, reading.places, strict=True)
        for _, word, piece in places
    ]
    assert seen == list(
        enumerate(["eu", "rejects", "a", "mcdonald", "in", "brussels", "u", "iphone", "a", "1996"])
    )
    assert max(len(row) for row in reading.rows) <= 12


def test_markers_need_a_vocabulary_that_has_them(tiny_base: Path) -> None:
    model = ModelSettings(base=str(tiny_base), max_length=12, case_markers=True)
    with pytest.raises(ConfigError, match=r"model.case_markers: the base's vocabulary has no \[unused1\]"):
        tagging.encode(pa.table({"tokens": [["A"]], "tags": [[0]]}), model)


def test_counts_and_tell() -> None:
    rows = pa.table({"tags": pa.array([[0, 1, 2], [3]], pa.list_(pa.int32()))})
    assert tagging.counts(rows, CLASSES) == {"O": 1, "B-PER": 1, "I-PER": 1, "B-LOC": 1, "I-LOC": 0}
    line = tagging.tell(
        {"tokens": ["Ada", "Lovelace", "here"], "tags": [1, 2, 0]},
        {"entities": [{"text": "Ada", "label": "PER", "score": 0.9}]},
        CLASSES,
    )
    assert "→ Ada PER 0.90" in line
    assert "the data says: Ada Lovelace PER" in line
    assert entities.tag_names(["PER", "LOC"]) == CLASSES


def test_the_directory_of_another_task_is_refused(model_directory: Path) -> None:
    with pytest.raises(ModelError, match="is a tagging model, not sentiment"):
        load_task("sentiment").load(model_directory, ServingSettings(engine="torch"))
