"""What the tasks on an encoder share: tokeniser, configuration, batches, export. Inference is `lib.engines`.

Shapes: B rows in a batch, T tokens in its longest row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lib.artifacts import TaskFile
from lib.base_models import base_directory
from lib.errors import ModelError
from lib.settings import Settings

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import nn

# A label that is no class: no loss, no prediction.
IGNORED = -100
# A `max_length` that no text has.
UNCUT = 1 << 30


@functools.lru_cache(maxsize=4)
def base_tokenizer(base: str, max_length: int) -> Tokenizer:
    """`load_tokenizer` of a base model, once in a process."""
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


def lists(rows: Sequence[np.ndarray]) -> tuple[pa.ListArray, pa.Array]:
    """Rows of int32 as one list<int32> column, and their lengths int32."""
    lengths = np.fromiter((len(row) for row in rows), np.int32, len(rows))
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    flat = np.concatenate(rows) if len(rows) else np.zeros(0, np.int32)
    # One flat buffer and its offsets: building lists of Python ints would cost more than the tokeniser.
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)), pa.array(lengths)


def padded(column: pa.ChunkedArray, lengths: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """A list<int32> column as int64 [B, T], `fill` behind each row's end, and the mask bool [B, T] of what is real."""
    mask = np.arange(lengths.max()) < lengths[:, None]
    values = np.full(mask.shape, fill, np.int64)
    values[mask] = column.combine_chunks().flatten().to_numpy()
    return values, mask


def inputs(rows: pa.Table, pad: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, T], from the columns `input_ids` and `length`."""
    import torch

    lengths = rows["length"].to_numpy().astype(np.int64)
    input_ids, mask = padded(rows["input_ids"], lengths, pad)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }


def pretrained(auto_class: Any, base: Path, settings: Settings, classes: list[str]) -> nn.Module:
    """The base model under a fresh head of `classes` outputs, in fp32. `auto_class` is transformers' name for both.

    Raises ModelError when `model.max_length` is above the base's positions.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=settings.model.trust_remote_code)
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    positions = getattr(config, "max_position_embeddings", None)
    if positions and settings.model.max_length > positions:
        raise ModelError(
            f"model.max_length {settings.model.max_length} is above the {positions} positions of {settings.model.base}"
        )
    if settings.model.dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, settings.model.dropout)
    model: nn.Module = auto_class.from_pretrained(
        base,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=settings.model.trust_remote_code,
    )
    return model


def balance(
    chosen: str | dict[str, float], classes: Sequence[str], manifest: dict[str, Any]
) -> dict[str, float]:
    """Weight of each class: 1, training rows of them all / (classes · rows of the class), or what `chosen` gives it.

    `chosen` is `training.class_weights`; only `balanced` needs the manifest's counts.
    """
    if isinstance(chosen, dict):
        return {name: chosen.get(name, 1.0) for name in classes}
    if chosen == "none":
        return dict.fromkeys(classes, 1.0)
    counts = manifest["splits"]["train"]["labels"]
    rows = {name: counts.get(name, 0) for name in classes}
    total = sum(rows.values())
    return {name: total / (len(classes) * max(rows[name], 1)) for name in classes}


def loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: list[float], smoothing: float
) -> tuple[torch.Tensor, bool]:
    """Weighted cross-entropy of logits [N, C] and labels [N], summed over N but for labels of IGNORED; and
    whether this is training: validation is without gradients, and without `smoothing`."""
    import torch
    from torch.nn import functional

    # Not `model.training`: a DeepSpeed engine changes only that of the module inside it.
    learning = torch.is_grad_enabled()
    total = functional.cross_entropy(
        logits,
        labels,
        weight=torch.tensor(weights, device=logits.device),
        reduction="sum",
        ignore_index=IGNORED,
        label_smoothing=smoothing if learning else 0.0,
    )
    return total, learning


def check_classes(folder: Path, outputs: int, info: TaskFile) -> None:
    """Raises ModelError when a model has another number of outputs than task.json names classes."""
    if outputs != len(info.labels):
        raise ModelError(f"{folder} has {outputs} outputs, but task.json names {len(info.labels)} labels")


def save(model: nn.Module, base: Path, info: TaskFile, folder: Path) -> None:
    """Write a model directory: safetensors weights, tokenizer, task.json."""
    from transformers import AutoTokenizer

    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.model_max_length = info.max_length
    tokenizer.save_pretrained(folder)
    info.write(folder)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [..., C] from logits [..., C]."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)  # type: ignore[no-any-return]
