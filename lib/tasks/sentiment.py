"""Sentiment: sequence classification with one head, on any encoder.

A row is a text; the answer is one of the labels with a score for each (softmax of the head).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from lib.artifacts import TaskFile, check_model_directory
from lib.base_models import base_directory
from lib.errors import ModelError
from lib.settings import ModelSettings, ServingSettings, Settings
from lib.text import normalise

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import nn

    from lib.engines import Encoder
    from lib.tasks import Batch, Outputs


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


def encode(rows: pa.Table, model: ModelSettings) -> pa.Table:
    """Add `input_ids` list<int32>, `length` int32 and `truncated` bool to rows with a `text` column."""
    ids, truncated = tokenize(_tokenizer(model.base, model.max_length), rows["text"].to_pylist())
    lengths = np.fromiter((len(i) for i in ids), np.int32, len(ids))
    offsets = np.zeros(len(ids) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    # One flat buffer and its offsets: building lists of Python ints would cost more than the tokeniser.
    rows = rows.append_column("input_ids", pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)))
    rows = rows.append_column("length", pa.array(lengths))
    return rows.append_column("truncated", pa.array(truncated))


def read(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
    """`tokenize` for texts as clients send them: normalised first, as the training texts were."""
    return tokenize(tokenizer, normalise(pa.array(texts, pa.string())).to_pylist())


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[np.ndarray], list[bool]]:
    """Token ids of each text, special tokens included, and whether its end was cut off."""
    encodings = tokenizer.encode_batch_fast(texts)
    return [np.asarray(e.ids, np.int32) for e in encodings], [bool(e.overflowing) for e in encodings]


@functools.lru_cache(maxsize=4)
def _tokenizer(base: str, max_length: int) -> Tokenizer:
    return load_tokenizer(base_directory(base), max_length)


def load_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """The Rust tokeniser of a model directory, cutting at `max_length` tokens and never padding.

    Raises ModelError when the directory has none.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        # Some hub models ship only a vocabulary; transformers converts it.
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        except Exception as error:
            raise ModelError(f"{folder} has no usable tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def build(base: Path, settings: Settings) -> nn.Module:
    """The encoder with a fresh classification head, in fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    labels = settings.data.label_names
    config = AutoConfig.from_pretrained(base, trust_remote_code=settings.model.trust_remote_code)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    positions = getattr(config, "max_position_embeddings", None)
    if positions and settings.model.max_length > positions:
        raise ModelError(
            f"model.max_length {settings.model.max_length} is above the {positions} positions of {settings.model.base}"
        )
    if settings.model.dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, settings.model.dropout)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        base,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=settings.model.trust_remote_code,
    )
    return model


def collate(rows: pa.Table, pad: int) -> Batch:
    """`input_ids` and `attention_mask` int64 [B, T], `labels` int64 [B]."""
    import torch

    column = rows["input_ids"].combine_chunks()
    lengths = rows["length"].to_numpy().astype(np.int64)
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(mask.shape, pad, np.int64)
    input_ids[mask] = column.flatten().to_numpy()
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "labels": torch.from_numpy(rows["label"].to_numpy().astype(np.int64)),
    }


def balance(manifest: dict[str, Any], settings: Settings) -> dict[str, float]:
    """Weight of each label: 1, rows / (classes · rows of the label), or what the configuration says."""
    labels = settings.data.label_names
    chosen = settings.training.class_weights
    if isinstance(chosen, dict):
        return {label: chosen.get(label, 1.0) for label in labels}
    if chosen == "none":
        return dict.fromkeys(labels, 1.0)
    counts = manifest["splits"]["train"]["labels"]
    total = sum(counts.values())
    return {label: total / (len(labels) * max(counts.get(label, 0), 1)) for label in labels}


def weight(rows: pa.Table, settings: Settings, balance: dict[str, float]) -> float:
    weights = np.array([balance[label] for label in settings.data.label_names])
    return float(weights[rows["label"].to_numpy()].sum())


def loss(
    model: nn.Module, batch: Batch, settings: Settings, balance: dict[str, float]
) -> tuple[torch.Tensor, Outputs]:
    """Weighted cross-entropy, summed over rows; outputs `logits` [B, C] and `labels` [B] in evaluation."""
    import torch
    from torch.nn import functional

    # Not `model.training`: a DeepSpeed engine changes only that of the module inside it.
    learning = torch.is_grad_enabled()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    weights = torch.tensor([balance[label] for label in settings.data.label_names], device=logits.device)
    total = functional.cross_entropy(
        logits,
        batch["labels"],
        weight=weights,
        reduction="sum",
        label_smoothing=settings.training.label_smoothing if learning else 0.0,
    )
    if learning:  # nobody reads them, and on a GPU each copy would wait for the step
        return total, {}
    return total, {"logits": logits.detach().cpu().numpy(), "labels": batch["labels"].cpu().numpy()}


def metrics(outputs: Outputs) -> dict[str, float]:
    """`accuracy` and `macro_f1`; a class without rows and predictions counts 0, as in scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score

    predicted = outputs["logits"].argmax(-1)
    classes = range(outputs["logits"].shape[-1])
    return {
        "accuracy": float(accuracy_score(outputs["labels"], predicted)),
        "macro_f1": float(
            f1_score(outputs["labels"], predicted, labels=classes, average="macro", zero_division=0)
        ),
    }


def save(model: nn.Module, base: Path, info: TaskFile, folder: Path) -> None:
    from transformers import AutoTokenizer

    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.model_max_length = info.max_length
    tokenizer.save_pretrained(folder)
    info.write(folder)


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
    info = TaskFile.read(folder)
    if info.task != "sentiment":
        raise ModelError(f"{folder} is a {info.task} model, not sentiment")
    encoder = load_encoder(folder, serving)
    if encoder.classes != len(info.labels):
        raise ModelError(
            f"{folder} has {encoder.classes} outputs, but task.json names {len(info.labels)} labels"
        )
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


def predict_rows(predictor: Predictor, rows: pa.Table) -> Outputs:
    """`logits` [B, C] for rows of a dataset.

    From the text, by the model's own tokeniser: the stored `input_ids` belong to the dataset's base
    model, and a champion may come from another.
    """
    ids, _ = tokenize(predictor.tokenizer, rows["text"].to_pylist())
    return {"logits": predictor.encoder.logits(ids)}


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)  # type: ignore[no-any-return]
