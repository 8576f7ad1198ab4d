"""Texts → vectors, by a sentence encoder. Inference is `lib.engines`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from lib import storage
from lib.base_models import base_directory, tokenizer_checksum
from lib.encoders import load_tokenizer
from lib.engines import POOLING_FILE, SentenceEncoder, load_sentence_encoder
from lib.errors import ModelError
from lib.settings import ServingSettings

# What sentence-transformers writes of the longest text that a model was made for.
LENGTH_FILE = "sentence_bert_config.json"


class Embedder:
    """A tokenizer and an encoder. Not for use by two threads at once."""

    def __init__(self, base: str, serving: ServingSettings) -> None:
        folder = base_directory(base)
        self._folder, self._serving = folder, serving
        self.tokenizer = load_tokenizer(folder, max_tokens(folder))

    @cached_property
    def encoder(self) -> SentenceEncoder:
        return load_sentence_encoder(self._folder, self._serving)

    def rows(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids int32 of each text, cut to what the encoder reads."""
        return [np.array(e.ids, np.int32) for e in self.tokenizer.encode_batch(list(texts))]

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors float32 [len(texts), D] of length 1."""
        return self.encoder.vectors(self.rows(texts))


def max_tokens(folder: Path) -> int:
    """The longest text that an encoder reads, special tokens included. Raises ModelError when it says nothing."""
    if (folder / LENGTH_FILE).is_file():
        length = storage.read_json(str(folder / LENGTH_FILE)).get("max_seq_length")
        if isinstance(length, int):
            return length
    positions = storage.read_json(str(folder / "config.json")).get("max_position_embeddings")
    if not isinstance(positions, int):
        raise ModelError(f"{folder} does not say how many tokens it reads (max_position_embeddings)")
    return positions - 2  # RoBERTa and its kin keep two positions for themselves


def base_checksum(base: str) -> str:
    """A digest of everything that a base model's vectors depend on."""
    folder = base_directory(base)
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    names = [*weights, "config.json", LENGTH_FILE, str(POOLING_FILE)]
    found = {name: storage.checksum(str(folder / name)) for name in names if (folder / name).is_file()}
    return storage.fingerprint(found | {"tokenizer": tokenizer_checksum(base)})
