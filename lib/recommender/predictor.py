"""A trained recommender in use: a model directory, loaded, that ranks a catalogue for histories.

    config.json, model.safetensors     the shape and the weights, but for those of single items (lib.recommender.model)
    items-*.parquet                    the catalogue: item, title, text, categories, numbers, interactions, vector, bias
    signals.safetensors, texts.npy     what the ranker reads of items (lib.recommender.signals)
    ranker.json                        the ranker, where there is one (lib.recommender.ranker)
    index.safetensors, index.json      of a large catalogue, what its best are found by (lib.recommender.index)
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

from lib import storage
from lib.artifacts import PICKLES, DatasetRef, TaskFile, check_model_directory
from lib.errors import ModelError
from lib.recommender import index, queries, ranker, signals
from lib.recommender import items as catalogue
from lib.recommender.items import Scale
from lib.recommender.model import TEXT_SCALE, Facts, Recommender, Shape, gap_codes
from lib.recommender.ranker import Ranker
from lib.recommender.signals import Signals, Timeline, Told
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


def history_of(one: dict[str, Any]) -> History:
    """Of what `lib.recommender.queries.asked` knows."""
    return History(one["items"], one["times"], one["events"], one["user_categories"], one["user_numbers"])


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
    signals: Signals | None = None
    ranker: Ranker | None = None
    """None: the retrieval's order is the answer."""

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

    def scores_of(self, known: Sequence[dict[str, Any]]) -> np.ndarray:
        """float32 [B, N] for what `lib.recommender.queries.asked` knows, in this model's numbers."""
        users = np.zeros((len(known), self.vectors.shape[1]), np.float32)
        some = [i for i, one in enumerate(known) if len(one["items"])]
        if some:
            users[some] = self.users([history_of(known[i]) for i in some])
        return self.scores(users)

    def rank(
        self,
        history: History,
        time: int,
        candidates: np.ndarray,
        scores: np.ndarray,
    ) -> np.ndarray:
        """The ranker's scores [P] of candidates int64 [P], of which none is there twice, with these retrieval scores, for who
        asks at a time."""
        assert self.signals is not None
        assert self.ranker is not None
        return self.ranker.scores(
            self.signals.features(history.items, time, candidates, scores, history.numbers)
        )

    @torch.inference_mode()
    def new_items(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray, list[Told]]:
        """Vectors [K, W] and biases [K] of items that training has not seen, from what is known of them: `text`,
        `categories` and `numbers`; and the same for the ranker."""
        if not len(rows):
            return self.vectors[:0], self.bias[:0], []
        codes, starts = catalogue.coded(rows["categories"], self.shape.item_categories)
        scale = Scale(**self.shape.item_numbers)
        texts = self.embedder.vectors(rows["text"].to_pylist()) if self.shape.text_width else None
        numbers = scale.apply(catalogue.numbers(rows["numbers"]))
        facts = Facts(codes, starts, numbers, np.zeros(len(rows), np.int64), texts)
        vectors, bias = self.model.with_facts(facts).item_vectors(torch.arange(len(rows)))
        told = [
            Told(None if texts is None else texts[row], of, numbers[row])
            for row, of in enumerate(np.split(codes, starts[1:]))
        ]
        return vectors.numpy(), bias.numpy() + np.float32(self.info.new_bias), told

    def over(self, rows: pa.Table) -> Predictor:
        """The same model over another catalogue: items that it knows keep their vectors."""
        place = pc.fill_null(pc.index_in(rows["item"], self.rows["item"].combine_chunks()), -1).to_numpy()
        if np.array_equal(place, np.arange(len(self.rows))):
            return replace(self, rows=rows)
        known = place >= 0
        vectors, bias = self.vectors[place], self.bias[place]
        vectors[~known], bias[~known], told = self.new_items(rows.filter(pa.array(~known)))
        signals = self.signals and self.signals.over(
            place, dict(zip(np.flatnonzero(~known).tolist(), told, strict=True))
        )
        return replace(self, rows=rows, vectors=vectors, bias=bias, signals=signals)


def save(model: Any, base: Path, info: TaskFile, folder: Path) -> None:
    """Write a model directory."""
    model.eval()
    write(model, base, info, folder)
    rows = catalogue.read(model.dataset).drop_columns(["input_ids", "length"])
    texts = []
    with torch.inference_mode():
        for number, start in enumerate(range(0, len(rows), ROWS_PER_FILE)):
            part = rows.slice(start, ROWS_PER_FILE)
            chosen = torch.arange(start, start + len(part))
            vectors, bias = model.item_vectors(chosen)
            if model.config.text_width:
                texts.append(model.texts_of(chosen).float().numpy())
            flat = pa.array(vectors.float().numpy().ravel())
            part = part.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
            part = part.append_column("bias", pa.array(bias.float().numpy()))
            pq.write_table(part, folder / f"items-{number:05d}.parquet", compression="zstd")
    if model.config.recommender.ranker != "none":
        _save_ranker(model, np.concatenate(texts) if texts else None, folder)
    if len(rows) > model.config.recommender.exact_items:
        _save_index(model.dataset, folder)


def write(model: Any, base: Path, info: TaskFile, folder: Path) -> None:
    """What of a model directory is of no single item."""
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


def _save_ranker(model: Any, texts: np.ndarray | None, folder: Path) -> None:
    """Signals, and the ranker that validation teaches or that another model directory has."""
    dataset, shape = model.dataset, model.config
    facts = (model.fact_categories.numpy(), model.fact_starts.numpy(), len(shape.item_categories))

    def counted(validation: bool) -> tuple[Signals, Timeline]:
        taken, times = (queries.sequences_of(dataset, name, validation) for name in ("items", "times"))
        return Signals.of(taken, times, shape.items, facts, model.fact_numbers.numpy(), texts)

    # In use all is counted that is known before the test; the ranker learns from what was known before validation.
    counted(validation=True)[0].write(folder)
    if shape.recommender.ranker_from is not None:
        with storage.open_file(storage.join(shape.recommender.ranker_from, ranker.FILE)) as file:
            (folder / ranker.FILE).write_bytes(file.read())
        return
    own, timeline = counted(validation=False)
    predictor = load(folder, ServingSettings())

    def features(one: dict[str, Any], chosen: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return own.features(
            one["items"], int(one["times"][-1]), chosen, scores, one["user_numbers"], timeline
        )

    known, targets, _ = queries.asked(queries.read_split(dataset, "validation"))
    names = signals.names(shape.item_number_names, shape.user_number_names)
    fitted = ranker.fit(ranker.questions(known, targets, predictor.scores_of, features, names))
    if fitted is None:
        print(
            f"no ranker: fewer than {ranker.LEAST_QUESTIONS} validation interactions are among the retrieval's best; "
            "its order is the answer",
            flush=True,
        )
    else:
        fitted.write(folder)


def _save_index(dataset: DatasetRef, folder: Path) -> None:
    """As good as validation's users need it."""
    predictor = load(folder, ServingSettings())
    rows = queries.read_split(dataset, "validation")
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[: index.ASKED])
    known = [one for one in queries.asked(rows.take(pa.array(chosen)))[0] if len(one["items"])][: index.ASKED]
    if not known:
        print(
            "no index: nobody in validation has a history to measure it by; all items are looked at",
            flush=True,
        )
        return
    users = predictor.users([history_of(one) for one in known])
    had = [one["items"] for one in known]
    print(index.make(predictor.vectors, predictor.bias, users, had, folder), flush=True)


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
        Signals.read(folder) if (folder / signals.FILE).exists() else None,
        _ranker(folder, shape),
    )


def _ranker(folder: Path, shape: Shape) -> Ranker | None:
    """Raises ModelError for one of other features, and for one without what it reads."""
    if not (folder / ranker.FILE).exists():
        return None
    if not (folder / signals.FILE).exists():
        raise ModelError(f"{folder} has {ranker.FILE} but no {signals.FILE}, which it reads; export it again")
    found = Ranker.read(folder / ranker.FILE)
    wanted = signals.names(shape.item_number_names, shape.user_number_names)
    if found.names != wanted:
        raise ModelError(
            f"{folder / ranker.FILE} is of the features {', '.join(found.names)} and not {', '.join(wanted)}; fit it with "
            "this version of Whorl (python -m jobs.finetune)"
        )
    return found
