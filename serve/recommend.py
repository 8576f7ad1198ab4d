"""Recommendations over HTTP, following the champion.

    python -m serve.deploy --config jobs/configs/movies.yaml

POST /v1/recommendations           what to show a user next, with reasons
POST /v1/recommendations/search    items by words, blended with the user's taste
GET  /v1/items/{id}/similar        items like one
POST /v1/interactions              what users do: the same user's next answer knows it, on every replica
POST /v1/items                     new items, recommendable at once by what is said of them, and changed ones

Interactions and items lie in the database (lib/recommender/store.py). A user's are read for each request; each replica looks for
changed items twice a second.
"""

# Without `from __future__ import annotations`: Ray Serve and FastAPI read the annotations as types.

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, ValidationError
from ray import serve as ray_serve
from sqlalchemy.exc import SQLAlchemyError

from lib.errors import ConfigError, RequestError, StorageError
from lib.recommender import forms, store
from lib.recommender.forms import Did, Found, Named, Reason, Recommended, Refused, Similar
from lib.recommender.items import JOINT, Scale
from lib.recommender.predictor import History, Predictor
from lib.recommender.shelf import Filters, Item, Pick, Shelf
from lib.recommender.store import Interaction
from lib.settings import ServingSettings
from lib.tasks import recommend as task
from serve import metrics
from serve.access import guard
from serve.admission import Places, admit
from serve.batching import LengthBatcher
from serve.http import create_app, request_id
from serve.observing import observe
from serve.recording import record
from serve.replica import Replica, bind

logger = logging.getLogger("ray.serve")

LOOK_EVERY_S = 0.5
# A clock may be fast; what is dated later than that is a mistake.
AHEAD_S = 86_400
# Users that are computed at a time, by the interactions that are read of them.
INTERACTIONS_AT_ONCE = 4096

F = TypeVar("F", bound=BaseModel)


class UnknownItemError(RequestError):
    """No such item."""

    http_status = 404


@dataclass(frozen=True)
class Known:
    """Whom an answer is for."""

    history: list[int]
    """Rows of the shelf, the earliest first."""
    vector: np.ndarray
    """float32 [W]."""
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
        self.look()
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
            try:
                self.look()
            except (SQLAlchemyError, StorageError) as error:
                logger.warning("new items are taken when the database is back: %s", type(error).__name__)
            except Exception:
                logger.exception("taking new items failed; it is tried again")

    def look(self) -> None:
        """Take items that came or changed."""
        found, self._seen = store.changed_items(self._application, self._seen)
        changed = {item: said for item, said in found.items() if self._told.get(item) != said}
        if not changed:
            return
        self.put([forms.ItemForm.model_validate({"item": item, **said}) for item, said in changed.items()])
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
            vectors, bias = self.predictor.new_items(rows)
        for place, item in enumerate(items):
            row = self.shelf.row.get(item.id)
            if row is not None and self._says_the_same(
                row, item
            ):  # its id has learned more than its text says
                vectors[place], bias[place] = self.shelf.vectors[row], self.shelf.bias[row]
        self.shelf.put(items, vectors, bias)

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

    def _users(self, waiting: Sequence[Any]) -> list[np.ndarray]:
        with self._computing:
            return list(self.predictor.users([one.history for one in waiting], self.shelf.vectors))

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
            (vector,) = await self.batcher.results([Waiting(history)])  # type: ignore[list-item]
        else:
            vector = await asyncio.to_thread(self._of_nobody, history)
        return Known([row for row, _ in kept], vector, list(dict.fromkeys(unknown)))

    def _of_nobody(self, history: History) -> np.ndarray:
        """Of a user who has done nothing: what is known besides. Then popularity, which the biases hold, decides."""
        with self._computing:
            return self.predictor.nobody(history)

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
        scores = self.shelf.scores(known.vector[None])[0]
        allowed = self._allowed(body, known, len(scores))
        wanted = self.rules.diversity if body.diversity is None else body.diversity
        picks = self.shelf.pick(scores, body.k, self.rules, allowed, wanted, np.random.default_rng())
        return [self._recommended(pick, known.history) for pick in picks]

    def _allowed(self, body: forms.Who, known: Known, count: int) -> np.ndarray:
        out = [*self.blocked, *(known.history if body.exclude_seen else ())]
        return self.shelf.allowed(self.filters(body.filters), out, count)

    def _recommended(self, pick: Pick, history: list[int]) -> Recommended:
        because, words = self.shelf.reason(pick.row, history)
        reason = Reason(because=[self.named(row) for row in because], words=words)
        return Recommended(
            **self.named(pick.row).model_dump(),
            score=pick.score,
            probability=pick.probability,
            propensity=pick.propensity,
            reason=reason,
        )

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
        count = len(self.shelf)
        vectors = self.shelf.vectors[:count]
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(words)
        cosines = vectors @ words / np.maximum(norms, 1e-12)
        scores = (1 - body.taste) * _standard(cosines) + body.taste * _standard(
            self.shelf.scores(known.vector[None])[0][:count]
        )
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

    def __len__(self) -> int:
        return len(self.history.items)


def _standard(values: np.ndarray) -> np.ndarray:
    return np.asarray((values - values.mean()) / max(float(values.std()), 1e-9))


def _items(rows: pa.Table) -> list[Item]:
    columns = [rows[name].to_pylist() for name in ("item", "title", "text", "categories", "numbers")]
    return [
        Item(item, title, text, tuple(categories), tuple(numbers))
        for item, title, text, categories, numbers in zip(*columns, strict=True)
    ]


@ray_serve.deployment(name="Recommend")
@ray_serve.ingress()
class Recommend(Replica[Any]):
    """A replica that recommends."""

    response = forms.Response

    def __init__(self, serving: ServingSettings) -> None:
        self.application: str = ray_serve.get_replica_context().app_name
        super().__init__(serving, functools.partial(Model, application=self.application))  # type: ignore[arg-type]

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app("Whorl recommend", "What your users turn to next, by a model of your data.", self)
        answer_with(app, self)
        serving = self.serving
        admit(app, serving, Places(serving.max_ongoing_requests, serving.max_queued_requests))
        record(app, serving.events)
        guard(app, serving.access)
        observe(app, self, serving)
        return app


def answer_with(app: FastAPI, replica: Recommend) -> None:
    """Add the routes."""

    async def of(model: Model, who: forms.Who) -> Known:
        if who.user_id is not None:
            most = model.shape.recommender.history
            done = await _of_database(store.history, replica.application, who.user_id, most)
        else:
            done = _told(who.history or [])
        return await model.known(who, done)

    def head(request: Request, loaded: Any) -> dict[str, Any]:
        request.state.model = str(loaded.ref)
        return {"model": loaded.ref.name, "version": loaded.ref.version, "request_id": request_id(request)}

    @app.post("/v1/recommendations", tags=["recommend"], summary="What to show a user next")
    async def recommendations(request: Request, body: forms.Request) -> forms.Response:
        with replica.models.using() as loaded:
            told = head(request, loaded)
            known = await of(loaded.model, body)
            results = await asyncio.to_thread(loaded.model.pick, body, known)
            return forms.Response(results=results, unknown=known.unknown, **told)

    @app.post("/v1/recommendations/search", tags=["recommend"], summary="Items by words, and by taste")
    async def search(request: Request, body: forms.SearchRequest) -> forms.SearchResponse:
        with replica.models.using() as loaded:
            told = head(request, loaded)
            if not loaded.model.shape.text_width:
                raise RequestError("this model knows no texts, and cannot search by words", code="no_texts")
            known = await of(loaded.model, body)
            results = await asyncio.to_thread(loaded.model.search, body, known)
            return forms.SearchResponse(results=results, unknown=known.unknown, **told)

    @app.get("/v1/items/{item:path}/similar", tags=["recommend"], summary="Items like one")
    async def similar(
        request: Request, item: str, k: Annotated[int, Query(ge=1, le=forms.MOST_ITEMS)] = 10
    ) -> forms.SimilarResponse:
        with replica.models.using() as loaded:
            told = head(request, loaded)
            row = loaded.model.shelf.row.get(item)
            if row is None:
                raise UnknownItemError(f"no item {item[:200]!r} here", param="item", code="item_not_found")
            results = await asyncio.to_thread(loaded.model.similar, row, k)
            return forms.SimilarResponse(results=results, **told)

    @app.post("/v1/interactions", tags=["recommend"], summary="What users do, in batches")
    async def interactions(request: Request, body: forms.InteractionsRequest) -> forms.InteractionsResponse:
        with replica.models.using() as loaded:
            told, model = head(request, loaded), loaded.model
            now = int(time.time())
            good, refused = _each(
                body.interactions,
                forms.InteractionForm,
                lambda form: _interaction(form, now, model.shape.events),
            )
            new = await _of_database(store.add, replica.application, good)
            unknown = list(dict.fromkeys(one.item for one in good if one.item not in model.shelf.row))
            return forms.InteractionsResponse(
                taken=len(good), new=new, unknown=unknown, refused=refused, request_id=told["request_id"]
            )

    @app.post("/v1/items", tags=["recommend"], summary="New items, and what changed of others")
    async def items(request: Request, body: forms.ItemsRequest) -> forms.ItemsResponse:
        with replica.models.using() as loaded:
            told, model = head(request, loaded), loaded.model
            good, refused = _each(body.items, forms.ItemForm, lambda form: _known_numbers(form, model))
            content = {form.item: form.model_dump(mode="json", exclude={"item"}) for form in good}
            if content:
                await _of_database(store.put_items, replica.application, content)
                await asyncio.to_thread(model.look)
            return forms.ItemsResponse(taken=len(good), refused=refused, request_id=told["request_id"])


T = TypeVar("T")


def _each(given: list[Any], form: type[F], take: Callable[[F], T]) -> tuple[list[T], list[Refused]]:
    """The good ones of a batch, and what is wrong with the others."""
    good: list[T] = []
    refused: list[Refused] = []
    for index, one in enumerate(given):
        try:
            good.append(take(form.model_validate(one)))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            refused.append(Refused(index=index, message=f"{place}: {first['msg'].lower()}".lstrip(": ")))
        except ValueError as error:
            refused.append(Refused(index=index, message=str(error)))
    return good, refused


def _interaction(form: forms.InteractionForm, now: int, events: list[str]) -> Interaction:
    """Raises ValueError for a time that cannot be and an event that is none."""
    if form.event and events != [""] and form.event not in events:
        raise ValueError(f"event: {form.event[:60]!r} is none of {', '.join(events)}")
    at = now if form.time is None else int(form.time.timestamp())
    if not 0 <= at <= now + AHEAD_S:
        raise ValueError(f"time is {'before 1970' if at < 0 else 'more than a day ahead'}")
    return Interaction(
        _clean(form.user_id), _clean(form.item), form.event or events[0], at, _clean(form.id or "")
    )


def _known_numbers(form: forms.ItemForm, model: Model) -> forms.ItemForm:
    for name in form.numbers:
        if name not in model.shape.item_number_names:
            raise ValueError(f"numbers.{name}: the model knows no such column")
    return forms.ItemForm.model_validate(_clean_all(form.model_dump()))


def _clean_all(value: Any) -> Any:
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, dict):
        return {_clean_all(k): _clean_all(v) for k, v in value.items()}
    return [_clean_all(v) for v in value] if isinstance(value, (list, tuple)) else value


def _clean(value: str) -> str:
    """As a database can hold it: neither NUL nor half of a surrogate pair."""
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _told(history: list[str | Did]) -> list[Interaction]:
    """A history as interactions; one without a time follows the one before it at once."""
    found: list[Interaction] = []
    latest = time.time() + AHEAD_S
    for place, one in enumerate(history):
        did = Did(item=one) if isinstance(one, str) else one
        at = found[-1].time if found else 0
        if did.time is not None:
            at = int(did.time.timestamp())
            if not 0 <= at <= latest:
                what = "before 1970" if at < 0 else "more than a day ahead"
                name = f"history.{place}.time"
                raise RequestError(f"{name} is {what}", param=name, code="invalid_time")
        found.append(Interaction("", did.item, did.event or "", at))
    return found


async def _of_database(call: Any, *arguments: Any) -> Any:
    """Database work, off the event loop. Raises StorageError when the database is away."""
    try:
        return await asyncio.to_thread(call, *arguments)
    except SQLAlchemyError as error:
        raise StorageError("the database of interactions does not answer now; try again") from error


def application(args: ServingSettings) -> ray_serve.Application:
    """Builder for `serve deploy`: `args` in the file are the keys of the configuration's `serving`."""
    if args.canary is not None:
        raise ConfigError("serving.canary: lists of items are not compared yet; leave it out for recommend")
    return bind(Recommend, args)
