"""Which of the passages that were found answer a question best, by a model that reads both together.

A cross-encoder (Nogueira and Cho 2019) sees more than two vectors can say, and takes a pass of the model for each passage:
it puts a few in order, and finds none.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lib.base_models import base_directory
from lib.encoders import load_tokenizer
from lib.engines import load_cross_encoder
from lib.errors import ModelError
from lib.retrieval.embedding import max_tokens
from lib.settings import ServingSettings


class Reranker:
    """Raises ModelError for a model that has more than one answer about a pair. Threads may share it."""

    def __init__(self, base: str) -> None:
        folder = base_directory(base)
        self._tokenizer = load_tokenizer(folder, max_tokens(folder))
        # Of the two the longer one is cut.
        self._tokenizer.enable_truncation(max_tokens(folder), strategy="longest_first")
        # One thread: the engine beside it wants the cores.
        self._encoder = load_cross_encoder(folder, ServingSettings(threads=1))
        if self._encoder.classes != 1:
            raise ModelError(
                f"{base} gives {self._encoder.classes} scores for a pair; a cross-encoder that ranks gives one"
            )
        self._lock = threading.Lock()

    def scores(self, question: str, passages: Sequence[str]) -> np.ndarray:
        """Float32 [len(passages)]: the higher, the better it answers."""
        pairs = self._tokenizer.encode_batch([(question, passage) for passage in passages])
        rows = [np.array(pair.ids, np.int32) for pair in pairs]
        with self._lock:
            return np.asarray(self._encoder.logits(rows)[:, 0])


@lru_cache(maxsize=1)
def reranker(base: str) -> Reranker:
    """Once in a process."""
    return Reranker(base)
