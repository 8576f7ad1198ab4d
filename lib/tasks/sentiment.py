"""Sentiment: sequence classification on any encoder, with one head or several (sentiment, topic and the like).

A row is a text; the answer is one of the labels with a score for each (softmax of the head). With several heads
(`data.heads`) each answers so, all from one pass of the encoder; a row may lack a head's label and then teaches
that head nothing.

Shapes: B rows, C classes of a head, all heads' classes side by side in the outputs [B, ΣC].
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from lib import encoders, heads
from lib.artifacts import DatasetRef, TaskFile, check_model_directory
from lib.calibration import fit_temperature
from lib.encoders import IGNORED, base_tokenizer, load_tokenizer, save, softmax
from lib.errors import ConfigError
from lib.heads import Head
from lib.labels import MISSING, UNKNOWN, Mapping
from lib.settings import DataSettings, ModelSettings, ScoreSettings, ServingSettings, Settings
from lib.settings.augmentation import METHODS
from lib.tasks import Asked, Prepared, is_good
from lib.text import is_empty, normalise

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import nn

    from lib.engines import Encoder
    from lib.tasks import Batch, Outputs

__all__ = ["save"]

PACKS = False
METRIC = "macro_f1"
LISTS: frozenset[str] = frozenset()
TEXTS = frozenset({"text"})
AUGMENTED = frozenset(METHODS)
BASELINE: Literal["tfidf", "lookup"] = "tfidf"
SHOWN_CHARS = 100


class Request(BaseModel):
    """Texts to classify."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"inputs": ["Fits perfectly, I wear it every week.", "It fell apart."]}]
        },
    )
    inputs: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class Choice(BaseModel):
    """What one head says."""

    label: str
    scores: dict[str, float]
    """Label → probability; they sum to 1."""


class Answer(Choice):
    truncated: bool
    """True when the text was longer than the model reads, and only its beginning was scored."""
    heads: dict[str, Choice] = {}
    """Of a model with several heads: name → answer. `label` and `scores` are those of the first."""


class Response(BaseModel):
    results: list[Answer]


def columns(data: DataSettings, present: Collection[str] = ()) -> dict[str, str]:
    for name, head in heads.settings_of(data).items():
        if len(head.label_names) < 2:
            key = f"data.heads.{name}.labels" if name else "data.labels"
            raise ConfigError(f"{key}: at least two different labels are needed to tell texts apart")
    if not data.heads:
        return {"text": data.columns.text, "label": data.columns.label}
    return {"text": data.columns.text, **{_source(name): head.column for name, head in data.heads.items()}}


def _source(head: str) -> str:
    """A head's column of the source, named by its key."""
    return f"heads.{head}.column" if head else "label"


def classes(data: DataSettings) -> list[str]:
    return data.class_names


def prepare(source: dict[str, pa.Array], data: DataSettings) -> Prepared:
    """`text`, and int32 classes of each head in its column."""
    texts = normalise(source["text"])
    rows = {"text": texts}
    named = heads.settings_of(data)
    found = {name: Mapping.of(head).apply(source[_source(name)]) for name, head in named.items()}
    rows |= {heads.column(name, place): labels for place, (name, labels) in enumerate(found.items())}
    values = source[_source(next(iter(named)))]
    if not data.heads:
        return Prepared(pa.table(rows), texts, found[""], values, is_empty(texts), {})
    labels, values = _together(found, source)
    return Prepared(pa.table(rows), texts, labels, values, is_empty(texts), {})


def _together(found: dict[str, np.ndarray], source: dict[str, pa.Array]) -> tuple[np.ndarray, pa.Array]:
    """All heads' labels of a row as one number, of which only equality counts, and the value that is UNKNOWN."""
    each = np.stack(list(found.values()), axis=1)
    # A row of no label at all is MISSING, one of a single unknown value UNKNOWN.
    joined = np.array([zlib.crc32(row.tobytes()) >> 1 for row in each], np.int32)
    joined[(each == MISSING).all(1)] = MISSING
    joined[(each == UNKNOWN).any(1)] = UNKNOWN
    values: list[str | None] = [None] * len(each)
    for name, labels in found.items():
        given = source[_source(name)]
        for row in np.flatnonzero(labels == UNKNOWN).tolist():
            values[row] = values[row] or f"{name}: {given[row].as_py()}"
    return joined, pa.array(values, pa.string())


def counts(rows: pa.Table, classes: list[str]) -> dict[str, int]:
    """Class → rows."""
    columns = _label_columns(rows)
    if len(columns) == 1:
        sizes = [len(classes)]
    else:  # a class is HEAD/LABEL, and a head's name holds no slash
        sizes = list(Counter(name.partition("/")[0] for name in classes).values())
    found: list[int] = []
    for name, size in zip(columns, sizes, strict=True):
        labels = rows[name].to_numpy()
        found += np.bincount(labels[labels >= 0], minlength=size).tolist()
    return dict(zip(classes, found, strict=True))


def _label_columns(rows: pa.Table) -> list[str]:
    """A column of classes for each head, in their order."""
    return [name for name in rows.column_names if name == "label" or name.startswith("label:")]


def encode(rows: pa.Table, model: ModelSettings) -> pa.Table:
    """Add `input_ids` list<int32>, `length` int32 and `truncated` bool to rows with a `text` column."""
    ids, truncated = tokenize(base_tokenizer(model.base, model.max_length), rows["text"].to_pylist())
    input_ids, lengths = encoders.lists(ids)
    rows = rows.append_column("input_ids", input_ids)
    rows = rows.append_column("length", lengths)
    return rows.append_column("truncated", pa.array(truncated))


def read(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
    """`tokenize` for texts as clients send them: normalised first, as the training texts were."""
    return tokenize(tokenizer, normalise(pa.array(texts, pa.string())).to_pylist())


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
    """Token ids of each text, special tokens included, and whether its end was cut off."""
    encodings = tokenizer.encode_batch_fast(texts)
    return [np.asarray(e.ids, np.int32) for e in encodings], [bool(e.overflowing) for e in encodings]


def build(base: Path, settings: Settings, dataset: DatasetRef | None = None) -> nn.Module:
    """The encoder with a fresh classification head, in fp32."""
    from transformers import AutoModelForSequenceClassification

    return encoders.pretrained(AutoModelForSequenceClassification, base, settings, classes(settings.data))


def collate(rows: pa.Table, pad: int) -> Batch:
    """`input_ids` and `attention_mask` int64 [B, T], `labels` int64 [B, heads]; IGNORED where a row has none."""
    import torch

    labels = np.stack([rows[name].to_numpy() for name in _label_columns(rows)], axis=1).astype(np.int64)
    labels[labels < 0] = IGNORED
    return {**encoders.inputs(rows, pad), "labels": torch.from_numpy(labels)}


def balance(manifest: dict[str, Any], settings: Settings) -> dict[str, float]:
    """Weight of each label: 1, rows / (classes · rows of the label), or what the configuration says; times its
    head's weight."""
    weights: dict[str, float] = {}
    given = heads.settings_of(settings.data)
    for head in heads.of_data(settings.data):
        titles = [head.title(label) for label in head.labels]
        own, weight = given[head.name].class_weights, given[head.name].weight
        chosen = own or settings.training.class_weights
        if isinstance(own, dict):
            chosen = {head.title(label): value for label, value in own.items()}
        balanced = encoders.balance(chosen, titles, manifest)
        weights |= {title: weight * value for title, value in balanced.items()}
    return weights


def weight(rows: pa.Table, settings: Settings, balance: dict[str, float]) -> float:
    total = 0.0
    for head in heads.of_data(settings.data):
        labels = rows[head.column].to_numpy()
        total += float(_weights(head, balance)[labels[labels >= 0]].sum())
    return total


def _weights(head: Head, balance: dict[str, float]) -> np.ndarray:
    return np.array([balance[head.title(label)] for label in head.labels])


def loss(
    model: nn.Module, batch: Batch, settings: Settings, balance: dict[str, float]
) -> tuple[torch.Tensor, Outputs]:
    """Weighted cross-entropy, summed over rows and heads; in evaluation `logits` [B, C] and `labels` [B] of each
    head, under `logits/HEAD` and `labels/HEAD` where there are several.

    Divided by `weight`, it is the mean over all labels: a label counts as its class and its head weigh, in
    whichever row it lies.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    total, outputs = logits.new_zeros(()), {}
    for place, head in enumerate(heads.of_data(settings.data)):
        own, labels = logits[:, head.outputs], batch["labels"][:, place]
        smoothing = settings.training.label_smoothing
        part, learning = encoders.loss(own, labels, _weights(head, balance).tolist(), smoothing)
        total = total + part
        if not learning:  # nobody reads them in training, and on a GPU each copy would wait for the step
            outputs[head.title("logits")] = own.detach().cpu().numpy()
            outputs[head.title("labels")] = labels.cpu().numpy()
    return total, outputs


def metrics(outputs: Outputs) -> dict[str, float]:
    """`accuracy`, `macro_f1` and the `temperature` that fits best; a class without rows and predictions counts 0,
    as in scikit-learn.

    With several heads `HEAD/accuracy` and so on, and the means over the heads that have a label.
    """
    from sklearn.metrics import accuracy_score, f1_score

    found: dict[str, dict[str, float]] = {}
    for name, all_logits in outputs.items():
        if not name.endswith("logits"):
            continue
        prefix = name.removesuffix("logits")
        labels = outputs[f"{prefix}labels"]
        logits, labels = all_logits[labels != IGNORED], labels[labels != IGNORED]
        if not len(labels):
            continue
        predicted, indices = logits.argmax(-1), range(logits.shape[-1])
        macro_f1 = f1_score(labels, predicted, labels=indices, average="macro", zero_division=0)
        found[prefix] = {
            "accuracy": float(accuracy_score(labels, predicted)),
            "macro_f1": float(macro_f1),
            "temperature": fit_temperature(logits, labels),
        }
    if "" in found:
        return found[""]
    means = {name: float(np.mean([one[name] for one in found.values()])) for name in ("accuracy", "macro_f1")}
    return means | {f"{head}{name}": value for head, one in found.items() for name, value in one.items()}


@dataclass
class Predictor:
    """A model directory, loaded: tokeniser, engine, labels."""

    info: TaskFile
    tokenizer: Tokenizer
    encoder: Encoder


def load(folder: Path, serving: ServingSettings) -> Predictor:
    """Raises ModelError when the directory is not a sentiment model or its weights are not safetensors."""
    from lib.engines import load_encoder

    check_model_directory(folder)
    info = TaskFile.read(folder, "sentiment")
    encoder = load_encoder(folder, serving)
    encoders.check_classes(folder, encoder.classes, info)
    return Predictor(info, load_tokenizer(folder, info.max_length), encoder)


def predict(predictor: Predictor, request: Request) -> Response:
    rows, truncated = read(predictor.tokenizer, request.inputs)
    return Response(results=answers(predictor, predictor.encoder.logits(rows), truncated))


def answers(predictor: Predictor, logits: np.ndarray, truncated: list[bool]) -> list[Answer]:
    """Logits [B, ΣC] of tokenised texts as answers, in their order. Serving batches between the two."""
    laid = heads.of_model(predictor.info)
    scores = [softmax(logits[:, head.outputs] / head.temperature) for head in laid]
    results = []
    for row, cut in enumerate(truncated):
        said = {
            head.name: Choice(
                label=head.labels[int(own[row].argmax())],
                scores=dict(zip(head.labels, own[row].tolist(), strict=True)),
            )
            for head, own in zip(laid, scores, strict=True)
        }
        first = said.pop(laid[0].name)
        results.append(Answer(label=first.label, scores=first.scores, truncated=cut, heads=said))
    return results


def input_columns(data: DataSettings, present: Collection[str]) -> dict[str, str]:
    return {"text": data.columns.text}


def ask(source: dict[str, pa.Array], data: DataSettings) -> Asked:
    texts = source["text"]
    empty = np.flatnonzero(is_empty(normalise(texts))).tolist()
    return Asked(pa.table({"text": texts}), texts.to_pylist(), dict.fromkeys(empty, "has no text"))


def score(
    predictor: Predictor, inputs: list[str], settings: ScoreSettings
) -> tuple[pa.Table, dict[int, str]]:
    """`label`, its `score` and the `scores` of all labels; the same of each other head under `label:HEAD` and so on;
    `truncated`."""
    said = predict(predictor, Request.model_construct(inputs=inputs)).results
    columns: dict[str, pa.Array] = {}
    for place, head in enumerate(heads.of_model(predictor.info)):
        choices: list[Choice] = [answer.heads[head.name] if place else answer for answer in said]
        behind = head.column.removeprefix("label")
        columns[head.column] = pa.array([choice.label for choice in choices], pa.string())
        columns[f"score{behind}"] = pa.array([c.scores[c.label] for c in choices], pa.float32())
        scores = pa.struct([(label, pa.float32()) for label in head.labels])
        columns[f"scores{behind}"] = pa.array([choice.scores for choice in choices], scores)
    columns["truncated"] = pa.array([answer.truncated for answer in said], pa.bool_())
    return pa.table(columns), {}


def tally(answers: pa.Table) -> dict[str, dict[str, int]]:
    """Label → rows, of each head."""
    return {name: dict(Counter(answers[name].to_pylist())) for name in _label_columns(answers)}


def items(rows: pa.Table) -> pa.Table:
    """A row is judged as a whole."""
    return rows


def predict_rows(predictor: Predictor, rows: pa.Table) -> Outputs:
    """`logits` [B, ΣC] for rows of a dataset, as the model gives them: before the temperature.

    From the text, by the model's own tokeniser: the stored `input_ids` belong to the dataset's base
    model, and a champion may come from another.
    """
    ids, _ = tokenize(predictor.tokenizer, rows["text"].to_pylist())
    return {"logits": predictor.encoder.logits(ids)}


def row_metrics(items: pa.Table, predicted: np.ndarray, classes: list[str]) -> dict[str, float]:
    return {}


def request(row: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    return "/v1/sentiment", {"inputs": [row["text"]]}


def tell(row: dict[str, Any], reply: dict[str, Any], classes: list[str]) -> str:
    (answer,) = reply["results"]
    text = row["text"] if len(row["text"]) < SHOWN_CHARS else row["text"][: SHOWN_CHARS - 3] + "…"
    given = [(name, row[name]) for name in row if name == "label" or name.startswith("label:")]
    label = answer["label"]
    said = [f"{label} {answer['scores'][label]:.2f}"]
    if len(given) == 1:
        truth = [classes[row["label"]]]
    else:
        said += [f"{c['label']} {c['scores'][c['label']]:.2f}" for c in answer["heads"].values()]
        sizes = list(Counter(title.partition("/")[0] for title in classes).values())
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        labels = zip(starts, given, strict=True)
        truth = [
            classes[start + label].partition("/")[2] if label >= 0 else "?" for start, (_, label) in labels
        ]
    return f"{text}\n    → {', '.join(said)}   (the data says: {', '.join(truth)})"


def feedback(row: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """Of the main head, which is the first; one that says nothing of it praises the answer."""
    column = "label" if "label" in row else next(name for name in row if name.startswith("label:"))
    known = row[column]
    return {"rating": 1} if known is None or known < 0 else {"label": classes[known].rpartition("/")[2]}


def from_feedback(event: dict[str, Any]) -> list[dict[str, Any]]:
    """A text with the label that was said to be right, or with the one that was given and found good.

    Nothing of a request with several texts: which one was meant is not known.
    """
    said, asked = event["feedback"], event["request"]
    # POST /v1/opinions has documents.
    inputs = asked["inputs"] if "inputs" in asked else [document["text"] for document in asked["documents"]]
    if len(inputs) != 1 or not (said["label"] or is_good(said)):
        return []
    return [{"text": inputs[0], "label": said["label"] or event["answer"]["results"][0]["label"]}]
