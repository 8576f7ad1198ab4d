"""How likely answers are under a causal language model: token log-probabilities where a row has labels.

The label of position t is the token at t, unshifted; the model's output at t - 1 predicts it. Shapes: B rows,
T tokens in the longest, K positions that predict a labelled token in any row, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lib.encoders import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import nn

# Logits that one batch may hold where no gradient is kept: 512 MiB in fp32.
LOGITS_AT_ONCE = 1 << 27


def answer_log_probabilities(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability of each row's labelled tokens float32 [B], in nats, and their number int64 [B].

    `input_ids`, `attention_mask`, `labels` are int64 [B, T], padded on the right. The first token of a row has
    nothing before it and is never counted. The vocabulary is computed only at the K positions that need it.
    """
    import torch

    targets = labels[:, 1:]
    wanted = targets != IGNORED
    kept = wanted.any(0).nonzero().squeeze(-1)
    if not len(kept):  # the model is run all the same: under ZeRO-3 every forward pass is collective
        kept = torch.zeros(1, dtype=torch.long, device=labels.device)
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=kept, use_cache=False
    ).logits
    targets, wanted = targets[:, kept], wanted[:, kept]
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view_as(targets).sum(-1), wanted.sum(-1)


def padded(rows: list[np.ndarray], fill: int, left: bool = False) -> np.ndarray:
    """Rows of token ids as int64 [B, T], `fill` behind each row's end, or before its start."""
    width = max(len(row) for row in rows)
    out = np.full((len(rows), width), fill, np.int64)
    for i, row in enumerate(rows):
        out[i, width - len(row) if left else 0 : None if left else len(row)] = row
    return out


def mask(rows: list[np.ndarray], left: bool = False) -> np.ndarray:
    """1 where `padded` has a row's own tokens, 0 elsewhere; int64 [B, T]."""
    return padded([np.ones(len(row), np.int64) for row in rows], 0, left)


def batches(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Row numbers, longest rows first, in groups of at most `tokens` padded tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, tokens // max(lengths[order[start]], 1))
        yield order[start : start + size]
        start += size


def last_answer(labels: np.ndarray) -> int:
    """Where the last unbroken run of labels begins: what lies before it is the prompt of the last answer.

    Raises ValueError when nothing is labelled.
    """
    labelled = np.flatnonzero(labels != IGNORED)
    if not len(labelled):
        raise ValueError("no token is labelled")
    breaks = np.flatnonzero(np.diff(labelled) > 1)
    return int(labelled[breaks[-1] + 1] if len(breaks) else labelled[0])
