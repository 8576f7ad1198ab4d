"""A sentence encoder as a stage of Ray Data has it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from lib.retrieval.embedding import Embedder
from lib.settings import EmbedderSettings, ServingSettings

# Texts that the encoder is given at a time: enough that batches of like lengths can be formed.
TEXTS_AT_ONCE = 512


def open_embedder(settings: EmbedderSettings) -> Embedder:
    """The encoder of one actor.

    In fp32: cosines are compared with a threshold, and in bf16 they would depend on a text's neighbours in its batch.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threads = max(1, (os.cpu_count() or 1) // settings.workers)
    serving = ServingSettings(gpus_per_replica=settings.gpus_per_worker, threads=threads, precision="fp32")
    return Embedder(settings.model, serving)


def embed(embedder: Embedder, texts: Sequence[str]) -> np.ndarray:
    """Vectors float32 [texts, D] of length 1."""
    if not len(texts):
        return embedder.vectors([""])[:0]
    starts = range(0, len(texts), TEXTS_AT_ONCE)
    return np.concatenate([embedder.vectors(texts[start : start + TEXTS_AT_ONCE]) for start in starts])
