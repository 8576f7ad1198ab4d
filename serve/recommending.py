"""A recommender in a replica: the loaded version, the items that came since, and how an answer is put together."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from sqlalchemy.exc import SQLAlchemyError

from lib.errors import RequestError, StorageError
from lib.recommender import forms, store
from lib.recommender.forms import Found, Named, Reason, Recommended, Similar
from lib.recommender.items import JOINT, Scale
from lib.recommender.predictor import History, Predictor
from lib.recommender.shelf import Filters, Item, Shelf
from lib.recommender.store import Interaction
from lib.settings import ServingSettings
from lib.tasks import recommend as task
from serve import metrics
from serve.batching import LengthBatcher

logger = logging.getLogger("ray.serve")

LOOK_EVERY_S = 0.5
# Users that are computed at a time, by the interactions that are read of them.
INTERACTIONS_AT_ONCE = 4096


@dataclass(frozen=True)
class Known:
    """Whom an answer is for."""

    did: History
    """In rows of the shelf."""
    vector: np.ndarray
    """float32 [W]."""
    scores: np.ndarray
    """float32 [N]: of the shelf's items, as it was then."""
    unknown: list[str]


class Model:
    """A loaded model version with the items that came since, and the thread that looks for more."""

    def __init__(self, folder: Path, serving: ServingSettings, application: str) -> None:
        self.predictor: Predictor = task.load(folder, serving)
        self.name = "torch fp32"
        self.rules, self._application = serving.recommend, application
        self.shape = self.predictor.shape
        self.shelf = Shelf(_items(self.predictor.rows), self.predictor.vectors, self.predictor.bias)
        blocked = [self.shelf.row[item] for item in self.rules.block if item in self.shelf.row]
        self.blocked = frozenset(blocked)
        self._computing = threading.Lock()
        self._seen = 0
        self._told: dict[str, dict[str, Any]] = {}
        self._looking = threading.Lock()
        if self.shape.text_width:
            # Now: the folder may be a copy that goes when this is loaded, and no client is to wait for it.
            _ = self.predictor.embedder.encoder
        self._try_to_look()
        self.batcher = LengthBatcher(
            self._users, INTERACTIONS_AT_ONCE, INTERACTIONS_AT_ONCE, metrics.current().batch
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="items", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(10)
        self.batcher.close()

    def _work(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            self.look()
        except (SQLAlchemyError, StorageError) as error:
            logger.warning("new items are taken when the database is back: %s", type(error).__name__)
        except Exception:
            logger.exception("taking new items failed; it is tried again")

    def look(self) -> None:
        """Take items that came or changed."""
        with self._looking:
            found, self._seen = store.changed_items(self._application, self._seen)
            changed = {item: said for item, said in found.items() if self._told.get(item) != said}
            if changed:
                items = changed.items()
                self.put([forms.ItemForm.model_validate({"item": item, **said}) for item, said in items])
                self._told |= changed

    def put(self, given: Sequence[forms.ItemForm]) -> None:
        items = [self._item(form) for form in given]
        rows = pa.table(
            {
                "text": [item.text for item in items],
                "categories": pa.array([list(item.categories) for item in items], pa.list_(pa.string())),
                "numbers": pa.array([list(item.numbers) for item in items], pa.list_(pa.float32())),
            }
        )
        with self._computing:
            vectors, bias, told = self.predictor.new_items(rows)
        changed = {}
        for place, item in enumerate(items):
            row = self.shelf.row.get(item.id)
            # Its id has learned more than its text says.
            if row is not None and self._says_the_same(row, item):
                vectors[place], bias[place] = self.shelf.vectors[row], self.shelf.bias[row]
            else:
                changed[item.id] = told[place]
        self.shelf.put(items, vectors, bias)
        if self.predictor.signals is not None:
            self.predictor.signals.told.update({self.shelf.row[item]: one for item, one in changed.items()})

    def _says_the_same(self, row: int, item: Item) -> bool:
        known = self.shelf.items[row]
        return (known.text, set(known.categories)) == (item.text, set(item.categories))

    def _item(self, form: forms.ItemForm) -> Item:
        return Item(
            id=form.item,
            title=form.title,
            text=JOINT.join(part.rstrip(".") for part in (form.title, form.text) if part),
            categories=tuple(f"{column}={v}" for column, values in form.categories.items() for v in values),
            numbers=tuple(form.numbers.get(name, float("nan")) for name in self.shape.item_number_names),
            available=form.available,
        )

    def _users(self, waiting: Sequence[Waiting]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Vector and scores of each user: the catalogue is read once for all of them."""
        with self._computing:
            vectors = self.predictor.users([one.history for one in waiting], self.shelf.vectors)
        return zip(vectors, self.shelf.scores(vectors), strict=True)

    async def known(self, who: forms.Who, interactions: list[Interaction]) -> Known:
        """Of a user's interactions, the earliest first."""
        rows, unknown = [], []
        for one in interactions:
            row = self.shelf.row.get(one.item)
            rows.append(row)
            if row is None:
                unknown.append(one.item)
        kept = [(row, one) for row, one in zip(rows, interactions, strict=True) if row is not None]
        categories, numbers = self._about(who.context)
        events = {name: place for place, name in enumerate(self.shape.events)}
        history = History(
            np.array([row for row, _ in kept], np.int64),
            np.array([one.time for _, one in kept], np.int64),
            np.array([events.get(one.event, 0) for _, one in kept], np.int64),
            categories,
            numbers,
        )
        if kept:
            (found,) = await self.batcher.results([Waiting(history, self.shape.recommender.history)])
        else:
            found = await asyncio.to_thread(self._of_nobody, history)
        return Known(history, *found, list(dict.fromkeys(unknown)))

    def _of_nobody(self, history: History) -> tuple[np.ndarray, np.ndarray]:
        """Of a user who has done nothing: what is known besides. Then popularity, which the biases hold, decides."""
        with self._computing:
            vector = self.predictor.nobody(history)
        return vector, self.shelf.scores(vector[None])[0]

    def _about(self, context: dict[str, str | float]) -> tuple[np.ndarray, np.ndarray]:
        """Categories and numbers of a user. Raises RequestError for what the model does not know."""
        number = {name: place for place, name in enumerate(self.shape.user_categories)}
        columns = {name.partition("=")[0] for name in number}
        values = np.full(len(self.shape.user_number_names), np.nan)
        codes = []
        for name, value in context.items():
            if name in self.shape.user_number_names and not isinstance(value, str):
                values[self.shape.user_number_names.index(name)] = value
            elif name in columns:
                codes += [number[key] for key in (f"{name}={value}",) if key in number]
            else:
                known = sorted(columns | set(self.shape.user_number_names))
                raise RequestError(
                    f"context.{name}: nothing of that name was learned of users (known: {', '.join(known) or 'nothing'})",
                    param=f"context.{name}",
                    code="unknown_context",
                )
        return np.array(codes, np.int64), Scale(**self.shape.user_numbers).apply(values)

    def filters(self, form: forms.FilterForm) -> Filters:
        """Raises RequestError for a column that the catalogue has not."""
        columns = {name.partition("=")[0] for name in self.shape.item_categories}
        for kind, known in (("categories", columns), ("numbers", set(self.shape.item_number_names))):
            for name in getattr(form, kind):
                if name not in known:
                    raise RequestError(
                        f"filters.{kind}.{name}: items have no such column (known: {', '.join(sorted(known)) or 'none'})",
                        param=f"filters.{kind}.{name}",
                        code="unknown_filter",
                    )
        ends = {
            self.shape.item_number_names.index(name): (
                -np.inf if least is None else least,
                np.inf if most is None else most,
            )
            for name, (least, most) in form.numbers.items()
        }
        return Filters(form.categories, ends)

    def pick(self, body: forms.Request, known: Known) -> list[Recommended]:
        """The answer, in a thread."""
        allowed = self._allowed(body, known, len(known.scores))
        pool = self.shelf.pool(known.scores, allowed, max(self.rules.pool, body.k))
        ranker = self.predictor.ranker
        # Who has done nothing is shown what the retrieval says: the ranker goes by what was done.
        if ranker is not None and len(pool.rows) and len(known.did.items):
            worth = self.predictor.rank(known.did, int(time.time()), pool.rows, pool.worth)
            pool = pool.reordered(worth, ranker.coverage)
        wanted = self.rules.diversity if body.diversity is None else body.diversity
        picks = self.shelf.pick(pool, body.k, self.rules, wanted, np.random.default_rng())
        reasons = self.shelf.reasons([pick.row for pick in picks], known.did.items.tolist())
        return [
            Recommended(
                item=item.id,
                title=item.title,
                score=pick.score,
                probability=pick.probability,
                propensity=pick.propensity,
                reason=Reason(because=[self.named(row) for row in because], words=words),
            )
            for pick, (because, words) in zip(picks, reasons, strict=True)
            for item in (self.shelf.items[pick.row],)
        ]

    def _allowed(self, body: forms.Who, known: Known, count: int) -> np.ndarray:
        out = [*self.blocked, *(known.did.items.tolist() if body.exclude_seen else ())]
        return self.shelf.allowed(self.filters(body.filters), out, count)

    def named(self, row: int) -> Named:
        item = self.shelf.items[row]
        return Named(item=item.id, title=item.title)

    def similar(self, row: int, k: int) -> list[Similar]:
        allowed = self.shelf.allowed(Filters(), self.blocked, len(self.shelf))
        return [
            Similar(**self.named(other).model_dump(), similarity=cosine)
            for other, cosine in self.shelf.similar(row, k, allowed)
        ]

    def search(self, body: forms.SearchRequest, known: Known) -> list[Found]:
        """By the product of what the words and the items' texts mean; taste and words on one scale, each standardised."""
        with self._computing:
            words = self.predictor.meaning(body.query)
        count = len(known.scores)
        vectors = self.shelf.vectors[:count]
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(words)
        cosines = vectors @ words / np.maximum(norms, 1e-12)
        scores = (1 - body.taste) * _standard(cosines) + body.taste * _standard(known.scores)
        rows = np.flatnonzero(self._allowed(body, known, count))
        best = rows[np.argsort(-scores[rows], kind="stable")[: body.k]]
        return [
            Found(**self.named(int(r)).model_dump(), score=float(scores[r]), similarity=float(cosines[r]))
            for r in best
        ]


@dataclass(frozen=True)
class Waiting:
    """A history in the batcher's queue, as long as what is read of it."""

    history: History
    most: int

    def __len__(self) -> int:
        return min(len(self.history.items), self.most)


def _standard(values: np.ndarray) -> np.ndarray:
    return np.asarray((values - values.mean()) / max(float(values.std()), 1e-9))


def _items(rows: pa.Table) -> list[Item]:
    columns = [rows[name].to_pylist() for name in ("item", "title", "text", "categories", "numbers")]
    return [
        Item(item, title, text, tuple(categories), tuple(numbers))
        for item, title, text, categories, numbers in zip(*columns, strict=True)
    ]
