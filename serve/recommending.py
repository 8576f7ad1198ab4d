"""A recommender in a replica: the loaded version, the items that came since, and how an answer is put together."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from sqlalchemy.exc import SQLAlchemyError

from lib.errors import RequestError, StorageError
from lib.recommender import forms, index, store
from lib.recommender.forms import Found, Named, Reason, Recommended, Similar
from lib.recommender.items import JOINT, Scale
from lib.recommender.predictor import History, Predictor
from lib.recommender.shelf import Filters, Item, Shelf
from lib.recommender.store import Interaction
from lib.settings import OfferSettings, ServingSettings
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
    count: int
    """N: how many items the shelf had then."""
    scores: np.ndarray | None
    """float32 [N] of them; None where an index finds the best without all of them."""
    unknown: list[str]


class Model:
    """A loaded model version with the items that came since, and the thread that looks for more."""

    def __init__(self, folder: Path, serving: ServingSettings, application: str) -> None:
        self.predictor: Predictor = task.load(folder, serving)
        self.name = "torch fp32"
        self.rules, self._application = serving.recommend, application
        self.shape = self.predictor.shape
        vectors, bias = self.predictor.vectors, self.predictor.bias
        self.shelf = Shelf(
            _items(self.predictor.rows), vectors, bias, usable_index(folder, self.predictor, self.rules)
        )
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

    def _users(self, waiting: Sequence[Waiting]) -> list[tuple[np.ndarray, int, np.ndarray | None]]:
        """Of each user the vector, and the shelf's size and scores then: where there is no index the catalogue is read once for
        all of them."""
        with self._computing:
            vectors = self.predictor.users([one.history for one in waiting], self.shelf.vectors)
        return self._scored(vectors)

    def _scored(self, users: np.ndarray) -> list[tuple[np.ndarray, int, np.ndarray | None]]:
        if self.shelf.index is not None:
            count = len(self.shelf)
            return [(user, count, None) for user in users]
        scores = self.shelf.scores(users)
        return [(user, scores.shape[1], own) for user, own in zip(users, scores, strict=True)]

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

    def _of_nobody(self, history: History) -> tuple[np.ndarray, int, np.ndarray | None]:
        """Of a user who has done nothing: what is known besides. Then popularity, which the biases hold, decides."""
        with self._computing:
            vector = self.predictor.nobody(history)
        return self._scored(vector[None])[0]

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
        (allowed, had), most = self._allowed(body, known), max(self.rules.pool, body.k)
        # Who has done nothing is shown what the retrieval says: the ranker goes by what was done.
        ranker = self.predictor.ranker if len(known.did.items) else None
        if known.scores is None:
            pool = self.shelf.near(known.vector, allowed, most, had, chances=ranker is None)
        else:
            pool = self.shelf.pool(known.scores, allowed, most, chances=ranker is None)
        if ranker is not None and len(pool.rows):
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

    def _allowed(self, body: forms.Who, known: Known) -> tuple[np.ndarray, int]:
        """bool [N], and how many are not because the user had them."""
        had = set(known.did.items.tolist() if body.exclude_seen else ())
        return self.shelf.allowed(self.filters(body.filters), self.blocked | had, known.count), len(had)

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
        allowed, had = self._allowed(body, known)
        found = self.shelf.search(words, known.vector, body.taste, allowed, body.k, had)
        return [
            Found(**self.named(row).model_dump(), score=score, similarity=cosine)
            for row, score, cosine in found
        ]


@dataclass(frozen=True)
class Waiting:
    """A history in the batcher's queue, as long as what is read of it."""

    history: History
    most: int

    def __len__(self) -> int:
        return min(len(self.history.items), self.most)


def usable_index(folder: Path, predictor: Predictor, rules: OfferSettings) -> index.Index | None:
    """Of a model directory, where it finds as many of the best as are asked of it."""
    measured, count = index.told(str(folder)), len(predictor.rows)
    if measured is None:
        if count > predictor.shape.recommender.exact_items:
            logger.warning(
                "no index of %s items: each request looks at all; export the model again", f"{count:,}"
            )
        return None
    if measured.least_recall < rules.least_recall:
        key = f"serving.recommend.least_recall {rules.least_recall:g}"
        logger.warning("%s: below %s, each request looks at all items", measured, key)
        return None
    logger.info("%s", measured)
    return index.read(folder, predictor.vectors, predictor.bias)


def _items(rows: pa.Table) -> list[Item]:
    columns = [rows[name].to_pylist() for name in ("item", "title", "text", "categories", "numbers")]
    return [
        Item(item, title, text, tuple(categories), tuple(numbers))
        for item, title, text, categories, numbers in zip(*columns, strict=True)
    ]
