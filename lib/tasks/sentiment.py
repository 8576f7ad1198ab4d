"""Sentiment: sequence classification with one head, on any encoder.

A row is a text; the answer is one of the labels with a score for each (softmax of the head).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from lib import encoders
from lib.artifacts import TaskFile, check_model_directory
from lib.encoders import base_tokenizer, load_tokenizer, save, softmax
from lib.errors import ConfigError
from lib.labels import Mapping
from lib.settings import DataSettings, ModelSettings, ServingSettings, Settings
from lib.tasks import Prepared
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


class Answer(BaseModel):
    label: str
    scores: dict[str, float]
    """Label → probability; they sum to 1."""
    truncated: bool
    """True when the text was longer than the model reads, and only its beginning was scored."""


class Response(BaseModel):
    results: list[Answer]


def columns(data: DataSettings, present: Collection[str] = ()) -> dict[str, str]:
    if len(data.label_names) < 2:
        raise ConfigError("data.labels: at least two different labels are needed to tell texts apart")
    return {"text": data.columns.text, "label": data.columns.label}


def classes(data: DataSettings) -> list[str]:
    return data.label_names


def prepare(source: dict[str, pa.Array], data: DataSettings) -> Prepared:
    texts = normalise(source["text"])
    labels = Mapping.of(data).apply(source["label"])
    rows = pa.table({"text": texts, "label": labels})
    return Prepared(rows, texts, labels, source["label"], is_empty(texts), {})


def counts(rows: pa.Table, classes: list[str]) -> dict[str, int]:
    """Class → rows."""
    found = np.bincount(rows["label"].to_numpy(), minlength=len(classes))
    return dict(zip(classes, found.tolist(), strict=True))


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


def build(base: Path, settings: Settings) -> nn.Module:
    """The encoder with a fresh classification head, in fp32."""
    from transformers import AutoModelForSequenceClassification

    return encoders.pretrained(AutoModelForSequenceClassification, base, settings, classes(settings.data))


def collate(rows: pa.Table, pad: int) -> Batch:
    """`input_ids` and `attention_mask` int64 [B, T], `labels` int64 [B]."""
    import torch

    labels = torch.from_numpy(rows["label"].to_numpy().astype(np.int64))
    return {**encoders.inputs(rows, pad), "labels": labels}


def balance(manifest: dict[str, Any], settings: Settings) -> dict[str, float]:
    """Weight of each label: 1, rows / (classes · rows of the label), or what the configuration says."""
    return encoders.balance(settings.training.class_weights, settings.data.label_names, manifest)


def weight(rows: pa.Table, settings: Settings, balance: dict[str, float]) -> float:
    weights = np.array([balance[label] for label in settings.data.label_names])
    return float(weights[rows["label"].to_numpy()].sum())


def loss(
    model: nn.Module, batch: Batch, settings: Settings, balance: dict[str, float]
) -> tuple[torch.Tensor, Outputs]:
    """Weighted cross-entropy, summed over rows; outputs `logits` [B, C] and `labels` [B] in evaluation."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    weights = [balance[label] for label in settings.data.label_names]
    total, learning = encoders.loss(logits, batch["labels"], weights, settings.training.label_smoothing)
    if learning:  # nobody reads them, and on a GPU each copy would wait for the step
        return total, {}
    return total, {"logits": logits.detach().cpu().numpy(), "labels": batch["labels"].cpu().numpy()}


def metrics(outputs: Outputs) -> dict[str, float]:
    """`accuracy` and `macro_f1`; a class without rows and predictions counts 0, as in scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score

    predicted = outputs["logits"].argmax(-1)
    indices = range(outputs["logits"].shape[-1])
    return {
        "accuracy": float(accuracy_score(outputs["labels"], predicted)),
        "macro_f1": float(
            f1_score(outputs["labels"], predicted, labels=indices, average="macro", zero_division=0)
        ),
    }


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
    """Logits [B, C] of tokenised texts as answers, in their order. Serving batches between the two."""
    labels = predictor.info.labels
    return [
        Answer(
            label=labels[int(row.argmax())],
            scores=dict(zip(labels, row.tolist(), strict=True)),
            truncated=cut,
        )
        for row, cut in zip(softmax(logits), truncated, strict=True)
    ]


def items(rows: pa.Table) -> pa.Table:
    """A row is judged as a whole."""
    return rows


def predict_rows(predictor: Predictor, rows: pa.Table) -> Outputs:
    """`logits` [B, C] for rows of a dataset.

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
    label, truth = answer["label"], classes[row["label"]]
    return f"{text}\n    → {label} {answer['scores'][label]:.2f}   (the data says: {truth})"
