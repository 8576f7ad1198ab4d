"""A trained recommender in use: a model directory, loaded, that ranks a catalogue for histories.

    config.json, model.safetensors     the shape and the weights, but for those of single items (lib.recommender.model)
    items-*.parquet                    the catalogue: item, title, text, categories, numbers, interactions, vector, bias
    encoder/                           the text encoder, which items that come later are read by

Shapes: B histories, N items, W width.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from lib.artifacts import PICKLES, TaskFile, check_model_directory
from lib.errors import ModelError
from lib.recommender import items as catalogue
from lib.recommender.items import Scale
from lib.recommender.model import TEXT_SCALE, Facts, Recommender, Shape, gap_codes
from lib.retrieval.embedding import Embedder
from lib.settings import ServingSettings

ENCODER = "encoder"
WEIGHTS = "model.safetensors"
# Of the weights, those that lie with the items, or in ENCODER.
ELSEWHERE = ("id.", "id_bias.", "encoder.")
ROWS_PER_FILE = 100_000


@dataclass(frozen=True)
class History:
    """What a user has done, in order; L interactions."""

    items: np.ndarray
    """int64 [L]: numbers of the catalogue's rows."""
    times: np.ndarray
    """int64 [L]: seconds since 1970."""
    events: np.ndarray
    """int64 [L]: numbers of `Shape.events`."""
    categories: np.ndarray
    """int64: numbers of `Shape.user_categories`."""
    numbers: np.ndarray
    """float32 [F], standardised."""


@dataclass
class Predictor:
    """Not for use by two threads at once."""

    info: TaskFile
    model: Recommender
    """Of the weights only what no single item owns: its catalogue is empty."""
    rows: pa.Table
    """Of the catalogue: item, title, categories and interactions; with `text` and `numbers`."""
    vectors: np.ndarray
    """float32 [N, W]."""
    bias: np.ndarray
    """float32 [N]."""
    folder: Path
    serving: ServingSettings

    @property
    def shape(self) -> Shape:
        return self.model.config

    @cached_property
    def embedder(self) -> Embedder:
        return Embedder(str(self.folder / ENCODER), self.serving)

    @torch.inference_mode()
    def users(self, histories: Sequence[History], vectors: np.ndarray | None = None) -> np.ndarray:
        """Vectors float32 [B, W] of users, none of whose histories is empty, after their last interaction. `vectors` [N, W] are
        those of the items, where there are others than the catalogue's own."""
        longest = self.shape.recommender.history
        sizes = np.array([min(len(h.items), longest) for h in histories])
        mask = torch.from_numpy(np.arange(sizes.max()) < sizes[:, None])

        def padded(parts: list[np.ndarray]) -> torch.Tensor:
            found = torch.zeros(mask.shape, dtype=torch.long)
            found[mask] = torch.from_numpy(np.concatenate(parts))
            return found

        items, gaps, events = (
            padded(parts)
            for parts in (
                [h.items[-longest:] for h in histories],
                [gap_codes(h.times)[-longest:] for h in histories],
                [h.events[-longest:] for h in histories],
            )
        )
        about = self._about(histories)
        read = torch.from_numpy(self.vectors if vectors is None else vectors)[items]
        states = self.model.user_vectors(read, gaps, events, about)
        return states[torch.arange(len(sizes)), torch.from_numpy(sizes - 1)].numpy()  # type: ignore[no-any-return]

    def _about(self, histories: Sequence[History]) -> torch.Tensor | None:
        counts = np.array([len(h.categories) for h in histories])
        return self.model.about(
            torch.from_numpy(np.concatenate([h.categories for h in histories])),
            torch.from_numpy(np.cumsum(counts) - counts),
            torch.from_numpy(np.stack([h.numbers for h in histories])),
        )

    @torch.inference_mode()
    def nobody(self, history: History) -> np.ndarray:
        """The vector float32 [W] of a user who has done nothing: what is known besides."""
        about = self._about([history])
        return np.zeros(self.vectors.shape[1], np.float32) if about is None else about[0].numpy()

    @torch.inference_mode()
    def meaning(self, text: str) -> np.ndarray:
        """A text among the vectors of items, float32 [W]: where an item of which only this is known would lie."""
        assert self.model.text is not None
        vector = torch.from_numpy(self.embedder.vectors([text]))
        return self.model.text(TEXT_SCALE * vector)[0].numpy()  # type: ignore[no-any-return]

    def scores(self, users: np.ndarray) -> np.ndarray:
        """float32 [B, N]: logits of what the users turn to next."""
        return users @ self.vectors.T + self.bias  # type: ignore[no-any-return]

    @torch.inference_mode()
    def new_items(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Vectors [K, W] and biases [K] of items that training has not seen, from what is known of them: `text`,
        `categories` and `numbers`."""
        if not len(rows):
            return self.vectors[:0], self.bias[:0]
        codes, starts = catalogue.coded(rows["categories"], self.shape.item_categories)
        scale = Scale(**self.shape.item_numbers)
        facts = Facts(
            codes,
            starts,
            scale.apply(catalogue.numbers(rows["numbers"])),
            np.zeros(len(rows), np.int64),
            self.embedder.vectors(rows["text"].to_pylist()) if self.shape.text_width else None,
        )
        vectors, bias = self.model.with_facts(facts).item_vectors(torch.arange(len(rows)))
        return vectors.numpy(), bias.numpy() + np.float32(self.info.new_bias)

    def over(self, rows: pa.Table) -> Predictor:
        """The same model over another catalogue: items that it knows keep their vectors."""
        place = pc.fill_null(pc.index_in(rows["item"], self.rows["item"].combine_chunks()), -1).to_numpy()
        known = place >= 0
        vectors, bias = self.vectors[place], self.bias[place]
        vectors[~known], bias[~known] = self.new_items(rows.filter(pa.array(~known)))
        return replace(self, rows=rows, vectors=vectors, bias=bias)


def save(model: Any, base: Path, info: TaskFile, folder: Path) -> None:
    """Write a model directory."""
    model.eval()
    model.config.write(folder / "config.json")
    weights = {
        name: t.contiguous() for name, t in model.state_dict().items() if not name.startswith(ELSEWHERE)
    }
    save_file(weights, folder / WEIGHTS)
    info.write(folder)
    if model.config.text_width:
        encoder = folder / ENCODER
        shutil.copytree(base, encoder, ignore=shutil.ignore_patterns(*(f"*{ending}" for ending in PICKLES)))
        if model.encoder is not None:
            model.encoder.save_pretrained(encoder)
    rows = catalogue.read(model.dataset).drop_columns(["input_ids", "length"])
    with torch.inference_mode():
        for number, start in enumerate(range(0, len(rows), ROWS_PER_FILE)):
            part = rows.slice(start, ROWS_PER_FILE)
            vectors, bias = model.item_vectors(torch.arange(start, start + len(part)))
            flat = pa.array(vectors.float().numpy().ravel())
            part = part.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
            part = part.append_column("bias", pa.array(bias.float().numpy()))
            pq.write_table(part, folder / f"items-{number:05d}.parquet", compression="zstd")


def load(folder: Path, serving: ServingSettings) -> Predictor:
    """Raises ModelError when the directory is not a recommender's."""
    check_model_directory(folder)
    info = TaskFile.read(folder, "recommend")
    files = sorted(folder.glob("items-*.parquet"))
    if not files:
        raise ModelError(f"{folder} holds no items-*.parquet; it was not exported by python -m jobs.finetune")
    rows = pa.concat_tables([pq.read_table(file) for file in files])
    is_new = rows["interactions"].to_numpy() == 0
    shape = replace(Shape.read(folder / "config.json"), items=0)
    width = len(shape.item_numbers["mean"])
    none = np.zeros(0, np.int64)
    texts = np.zeros((0, shape.text_width), np.float32) if shape.text_width else None
    model = Recommender(shape, Facts(none, none, np.zeros((0, width), np.float32), none, texts))
    try:
        missing, other = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ModelError(f"{folder / WEIGHTS} does not fit its config.json: {told}") from error
    if wrong := [*other, *(name for name in missing if not name.startswith(ELSEWHERE))]:
        raise ModelError(f"{folder / WEIGHTS} does not fit its config.json: {', '.join(wrong)}")
    joined = rows["vector"].combine_chunks()
    vectors = joined.flatten().to_numpy().reshape(len(rows), -1).copy()  # torch wants to own what it reads
    return Predictor(
        info,
        model.eval(),
        rows.drop_columns(["vector", "bias"]),
        vectors,
        rows["bias"].to_numpy() + info.new_bias * is_new.astype(np.float32),
        folder,
        serving,
    )
