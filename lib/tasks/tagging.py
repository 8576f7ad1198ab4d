"""Tagging: a class for each word of a sentence (named entities and the like), on any encoder.

A row is a sentence of words with a tag each; tags are IOB2 inside, whatever scheme the source uses. The first
piece of a word carries its class, in training and in prediction (Devlin et al. 2019, section 5.3). A sentence
longer than the model reads is trained on its beginning, and predicted in overlapping windows.

Shapes: B sentences, T pieces, W words in all sentences together, C classes.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from lib import encoders, entities
from lib.artifacts import DatasetRef
from lib.base_models import base_directory
from lib.calibration import fit_temperature
from lib.encoders import IGNORED, load_tokenizer, save
from lib.entities import OUTSIDE
from lib.errors import ConfigError
from lib.labels import MISSING, UNKNOWN
from lib.settings import DataSettings, ModelSettings, ScoreSettings, Settings
from lib.tagger import (
    Answer,
    Entity,
    Predictor,
    Request,
    Response,
    answers,
    class_logits,
    load,
    predict,
    read,
    read_sentences,
    whole,
)
from lib.tasks import Asked, Prepared
from lib.text import is_empty, normalise
from lib.words import first_pieces, pieces, special

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import nn

    from lib.tasks import Batch, Outputs

__all__ = [
    "Answer",
    "Entity",
    "Predictor",
    "Request",
    "Response",
    "answers",
    "class_logits",
    "load",
    "predict",
    "read",
    "save",
]

PACKS = False
METRIC = "macro_f1"
LISTS = frozenset({"tokens", "tags"})
TEXTS = frozenset({"tokens"})
AUGMENTED = frozenset({"synonyms", "delete", "spelling"})
BASELINE: Literal["tfidf", "lookup"] = "lookup"


def columns(data: DataSettings, present: Collection[str] = ()) -> dict[str, str]:
    if not data.label_names:
        raise ConfigError("data.labels is missing; name the kinds of entity, such as [PER, ORG]")
    if data.undersample:
        raise ConfigError("data.undersample: a sentence has no label of its own; only tasks with one take it")
    return {"tokens": data.columns.tokens, "tags": data.columns.tags}


def classes(data: DataSettings) -> list[str]:
    return entities.tag_names(data.label_names)


def prepare(source: dict[str, pa.Array], data: DataSettings) -> Prepared:
    """`tokens` list<string>, `tags` list<int32>; a word that normalises to nothing keeps its place as `\\ufffd`."""
    names = {name: i for i, name in enumerate(classes(data))}
    kinds = data.label_map
    size = len(source["tokens"])
    words: list[list[str]] = [[] for _ in range(size)]
    tags: list[list[int]] = [[] for _ in range(size)]
    labels, values = np.full(size, MISSING, np.int32), [""] * size
    malformed: dict[int, str] = {}
    for row, (tokens_json, tags_json) in enumerate(
        zip(source["tokens"].to_pylist(), source["tags"].to_pylist(), strict=True)
    ):
        try:
            tokens, given = _strings(tokens_json, "tokens", data), _strings(tags_json, "tags", data)
            if given and len(tokens) != len(given):
                raise ValueError(f"has {len(tokens)} tokens and {len(given)} tags; each token needs one tag")
            found = entities.iob2(given)
        except ValueError as error:
            malformed[row] = str(error)
            continue
        words[row] = tokens
        if not given:
            continue
        unknown = next((tag for tag in found if tag != OUTSIDE and tag[2:] not in kinds), None)
        if unknown is not None:
            labels[row], values[row] = UNKNOWN, unknown
            continue
        tags[row] = [names[tag if tag == OUTSIDE else tag[:2] + kinds[tag[2:]]] for tag in found]
        # What is to be learned of a sentence, as one number: only its equality counts.
        labels[row] = zlib.crc32(np.array(tags[row], np.int32).tobytes()) >> 1
    flat = normalise(pa.array([word for sentence in words for word in sentence], pa.string())).to_pylist()
    ends = np.cumsum([0, *map(len, words)])
    clean = [[word or "\ufffd" for word in flat[start:end]] for start, end in pairwise(ends.tolist())]
    rows = pa.table(
        {
            "tokens": pa.array(clean, pa.list_(pa.string())),
            "tags": pa.array(tags, pa.list_(pa.int32())),
        }
    )
    empty = np.array([not sentence for sentence in clean], bool)
    empty[list(malformed)] = False
    return Prepared(
        rows,
        pa.array([" ".join(sentence) for sentence in clean], pa.string()),
        labels,
        pa.array(values, pa.string()),
        empty,
        malformed,
    )


def _strings(text: str | None, what: str, data: DataSettings) -> list[str]:
    """A JSON list of strings; empty for null. Raises ValueError in words."""
    if text is None or not text.strip():
        return []
    key = f"data.columns.{what}, {getattr(data.columns, what)!r}"
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError(
            f'holds no list in {key}: {text[:60]!r}; give a list such as ["Ada", "Lovelace"]'
        ) from None
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"must hold a list of strings in {key}, not {text[:60]!r}")
    return value


def counts(rows: pa.Table, classes: list[str]) -> dict[str, int]:
    """Class → words."""
    found = np.bincount(rows["tags"].combine_chunks().flatten().to_numpy(), minlength=len(classes))
    return dict(zip(classes, found.tolist(), strict=True))


def encode(rows: pa.Table, model: ModelSettings) -> pa.Table:
    """Add `input_ids` and `labels` list<int32>, `length` int32 and `truncated` bool to sentences.

    `labels` holds a word's class on its first piece and IGNORED on all others.
    """
    tokenizer = _base_tokenizer(model.base)
    before, after = special(tokenizer)
    room = model.max_length - len(before) - len(after)
    ids, labels, truncated = [], [], []
    read = pieces(tokenizer, rows["tokens"].to_pylist(), model.case_markers)
    for (found, numbers), tags in zip(read, rows["tags"].to_pylist(), strict=True):
        ids.append(np.array([*before, *found[:room], *after], np.int32))
        places, words = first_pieces(numbers[:room])
        row = np.full(len(ids[-1]), IGNORED, np.int32)
        row[places + len(before)] = np.asarray(tags, np.int32)[words]
        labels.append(row)
        truncated.append(len(found) > room)
    input_ids, lengths = encoders.lists(ids)
    rows = rows.append_column("input_ids", input_ids)
    rows = rows.append_column("labels", encoders.lists(labels)[0])
    rows = rows.append_column("length", lengths)
    return rows.append_column("truncated", pa.array(truncated, pa.bool_()))


@functools.lru_cache(maxsize=4)
def _base_tokenizer(base: str) -> Tokenizer:
    return whole(load_tokenizer(base_directory(base), 1))


def build(base: Path, settings: Settings, dataset: DatasetRef | None = None) -> nn.Module:
    """The encoder with a fresh classification head on every piece, in fp32."""
    from transformers import AutoModelForTokenClassification

    return encoders.pretrained(AutoModelForTokenClassification, base, settings, classes(settings.data))


def collate(rows: pa.Table, pad: int) -> Batch:
    """`input_ids`, `attention_mask` and `labels`, int64 [B, T]; labels are IGNORED where nothing is learned."""
    import torch

    lengths = rows["length"].to_numpy().astype(np.int64)
    labels, _ = encoders.padded(rows["labels"], lengths, IGNORED)
    return {**encoders.inputs(rows, pad), "labels": torch.from_numpy(labels)}


def balance(manifest: dict[str, Any], settings: Settings) -> dict[str, float]:
    """Weight of each class: 1; words / (classes · words of the class); or what the configuration gives its kind."""
    names, chosen = classes(settings.data), settings.training.class_weights
    if isinstance(chosen, dict):
        chosen = {name: chosen.get(name[2:], 1.0) for name in names}
    return encoders.balance(chosen, names, manifest)


def weight(rows: pa.Table, settings: Settings, balance: dict[str, float]) -> float:
    labels = rows["labels"].combine_chunks().flatten().to_numpy()
    weights = np.array([balance[name] for name in classes(settings.data)])
    return float(weights[labels[labels != IGNORED]].sum())


def loss(
    model: nn.Module, batch: Batch, settings: Settings, balance: dict[str, float]
) -> tuple[torch.Tensor, Outputs]:
    """Weighted cross-entropy, summed over words; in evaluation `logits` [words, C] and `labels` [words],
    `words` [B] a row."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    weights = [balance[name] for name in classes(settings.data)]
    total, learning = encoders.loss(
        logits.flatten(0, 1), batch["labels"].flatten(), weights, settings.training.label_smoothing
    )
    if learning:
        return total, {}
    chosen = batch["labels"] != IGNORED
    return total, {
        "logits": logits[chosen].cpu().numpy(),
        "labels": batch["labels"][chosen].cpu().numpy(),
        "words": chosen.sum(-1).cpu().numpy(),
    }


def metrics(outputs: Outputs) -> dict[str, float]:
    """`accuracy`, `macro_f1` and the `temperature` that fits best over words, `entity_f1` over entities of
    unnamed kinds.

    Classes are numbers here: B- and I- of kind k are 2k + 1 and 2k + 2.
    """
    from sklearn.metrics import f1_score

    predicted, labels = outputs["logits"].argmax(-1), outputs["labels"]
    number = outputs["logits"].shape[-1]
    names = entities.tag_names([str(k) for k in range((number - 1) // 2)])
    found = entities.score(
        _sentences(labels, outputs["words"], names), _sentences(predicted, outputs["words"], names)
    )
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(
            f1_score(labels, predicted, labels=range(number), average="macro", zero_division=0)
        ),
        "entity_f1": found[""]["f1"],
        "temperature": fit_temperature(outputs["logits"], labels),
    }


def _sentences(tags: np.ndarray, words: np.ndarray, names: list[str]) -> list[list[str]]:
    """Class indices [W] as the tags of sentences of `words` [B] words each."""
    ends = np.cumsum([0, *words.tolist()]).tolist()
    return [[names[tag] for tag in tags[start:end]] for start, end in pairwise(ends)]


ENTITIES = pa.list_(
    pa.struct(
        [
            ("label", pa.string()),
            ("text", pa.string()),
            ("start", pa.int32()),
            ("end", pa.int32()),
            ("score", pa.float32()),
        ]
    )
)


def input_columns(data: DataSettings, present: Collection[str]) -> dict[str, str]:
    """Words, where the source has a column of them; else texts."""
    if data.columns.tokens in present or data.columns.text not in present:
        return {"tokens": data.columns.tokens}
    return {"text": data.columns.text}


def ask(source: dict[str, pa.Array], data: DataSettings) -> Asked:
    bad: dict[int, str] = {}
    if "text" in source:
        texts = source["text"]
        empty = np.flatnonzero(is_empty(normalise(texts))).tolist()
        return Asked(pa.table({"text": texts}), texts.to_pylist(), dict.fromkeys(empty, "has no text"))
    words: list[list[str]] = []
    for row, text in enumerate(source["tokens"].to_pylist()):
        try:
            words.append(_strings(text, "tokens", data))
            if not words[-1]:
                bad[row] = "has no words"
        except ValueError as error:
            words.append([])
            bad[row] = str(error)
    return Asked(pa.table({"tokens": pa.array(words, pa.list_(pa.string()))}), list(words), bad)


def score(
    predictor: Predictor, inputs: list[str | list[str]], settings: ScoreSettings
) -> tuple[pa.Table, dict[int, str]]:
    """`entities`, as in an answer."""
    said = predict(predictor, Request.model_construct(inputs=inputs)).results
    found = [[entity.model_dump() for entity in answer.entities] for answer in said]
    return pa.table({"entities": pa.array(found, ENTITIES)}), {}


def tally(answers: pa.Table) -> dict[str, dict[str, int]]:
    """Kind → entities."""
    kinds = answers["entities"].combine_chunks().flatten().field("label")
    return {"entities": dict(Counter(kinds.to_pylist()))}


def items(rows: pa.Table) -> pa.Table:
    """A word each: `id` sentence and place, `row` the sentence and `text` the word."""
    sentences, tags = rows["tokens"].to_pylist(), rows["tags"].combine_chunks()
    sizes = np.array([len(words) for words in sentences], np.int64)
    index = np.repeat(np.arange(len(sentences)), sizes)
    carried = [name for name in rows.column_names if name not in NOT_CARRIED]
    table = rows.select(carried).take(pa.array(index))
    rows_of = rows["id"].take(pa.array(index))
    numbers = np.concatenate([np.arange(n) for n in sizes]) if len(sizes) else np.zeros(0, np.int64)
    ids = [f"{name}:{i:05d}" for name, i in zip(rows_of.to_pylist(), numbers.tolist(), strict=True)]
    table = table.append_column("id", pa.array(ids, pa.string())).append_column("row", rows_of)
    table = table.append_column("text", pa.array([w for words in sentences for w in words], pa.string()))
    return table.append_column("label", tags.flatten().cast(pa.int32()))


NOT_CARRIED = ("id", "tokens", "tags", "input_ids", "labels", "truncated")


def predict_rows(predictor: Predictor, rows: pa.Table) -> Outputs:
    """`logits` [W, C], before the temperature, for the words of rows of a dataset, by the model's own tokeniser."""
    reading = read_sentences(predictor, rows["tokens"].to_pylist())
    return {"logits": class_logits(predictor, reading, predictor.encoder.logits(reading.rows))}


def row_metrics(items: pa.Table, predicted: np.ndarray, classes: list[str]) -> dict[str, float]:
    """`entity_precision`, `entity_recall`, `entity_f1`, and `entity_f1/KIND` for each kind."""
    sentence = items["row"].to_numpy(zero_copy_only=False)
    ends = np.append(np.flatnonzero(sentence[1:] != sentence[:-1]) + 1, len(sentence))
    words = np.diff(ends, prepend=0)
    found = entities.score(
        _sentences(items["label"].to_numpy(), words, classes), _sentences(predicted, words, classes)
    )
    whole = found.pop("")
    figures = {f"entity_{name}": whole[name] for name in ("precision", "recall", "f1")}
    return figures | {f"entity_f1/{kind}": values["f1"] for kind, values in found.items()}


def request(row: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    return "/v1/tagging", {"inputs": [row["tokens"]]}


def tell(row: dict[str, Any], reply: dict[str, Any], classes: list[str]) -> str:
    (answer,) = reply["results"]
    truth = entities.spans([classes[tag] for tag in row["tags"]])
    said = [f"{e['text']} {e['label']} {e['score']:.2f}" for e in answer["entities"]]
    real = [f"{' '.join(row['tokens'][first:end])} {kind}" for kind, first, end in truth]
    return (
        f"{' '.join(row['tokens'])}\n    → {'; '.join(said) or 'no entity'}"
        f"   (the data says: {'; '.join(real) or 'no entity'})"
    )
