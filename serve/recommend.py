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
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, ValidationError
from ray import serve as ray_serve

from lib.errors import ConfigError, RequestError
from lib.recommender import forms, store
from lib.recommender.forms import Did, Refused
from lib.recommender.store import Interaction
from lib.settings import ServingSettings
from serve.access import guard
from serve.admission import Places, admit
from serve.http import UnknownError, create_app, of_database, request_id
from serve.observing import observe
from serve.recommending import Known, Model
from serve.recording import record
from serve.replica import Replica, bind

logger = logging.getLogger("ray.serve")

# A clock may be fast; what is dated later than that is a mistake.
AHEAD_S = 86_400

F = TypeVar("F", bound=BaseModel)


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
        take_with(app, self)
        serving = self.serving
        admit(app, serving, Places(serving.max_ongoing_requests, serving.max_queued_requests))
        record(app, serving.events)
        guard(app, serving.access)
        observe(app, self, serving)
        return app


def head(request: Request, loaded: Any) -> dict[str, Any]:
    """What every answer says of itself."""
    request.state.model = str(loaded.ref)
    return {"model": loaded.ref.name, "version": loaded.ref.version, "request_id": request_id(request)}


def answer_with(app: FastAPI, replica: Recommend) -> None:
    """Add the routes that answer."""

    async def of(model: Model, who: forms.Who) -> Known:
        if who.user_id is not None:
            # All of them, of which the model reads the latest: what was had long ago is not shown again either.
            asked = (replica.application, who.user_id, forms.MOST_HISTORY)
            done = await of_database("interactions", store.history, *asked)
        else:
            done = _told(who.history or [])
        return await model.known(who, done)

    @app.post(
        "/v1/recommendations",
        tags=["recommend"],
        summary="What to show a user next",
        response_model=forms.Response,
    )
    async def recommendations(request: Request, body: forms.Request) -> Response:
        with replica.models.using() as loaded:
            told = head(request, loaded)
            known = await of(loaded.model, body)
            results = await asyncio.to_thread(loaded.model.pick, body, known)
            return _json(forms.Response(results=results, unknown=known.unknown, **told))

    @app.post(
        "/v1/recommendations/search",
        tags=["recommend"],
        summary="Items by words, and by taste",
        response_model=forms.SearchResponse,
    )
    async def search(request: Request, body: forms.SearchRequest) -> Response:
        with replica.models.using() as loaded:
            told = head(request, loaded)
            if not loaded.model.shape.text_width:
                raise RequestError("this model knows no texts, and cannot search by words", code="no_texts")
            known = await of(loaded.model, body)
            results = await asyncio.to_thread(loaded.model.search, body, known)
            return _json(forms.SearchResponse(results=results, unknown=known.unknown, **told))

    @app.get(
        "/v1/items/{item:path}/similar",
        tags=["recommend"],
        summary="Items like one",
        response_model=forms.SimilarResponse,
    )
    async def similar(
        request: Request, item: str, k: Annotated[int, Query(ge=1, le=forms.MOST_ITEMS)] = 10
    ) -> Response:
        with replica.models.using() as loaded:
            told = head(request, loaded)
            row = loaded.model.shelf.row.get(item)
            if row is None:
                raise UnknownError(f"no item {item[:200]!r} here", param="item", code="item_not_found")
            results = await asyncio.to_thread(loaded.model.similar, row, k)
            return _json(forms.SimilarResponse(results=results, **told))


def take_with(app: FastAPI, replica: Recommend) -> None:
    """Add the routes by which the application is told things."""

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
            new = await of_database("interactions", store.add, replica.application, good)
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
                await of_database("interactions", store.put_items, replica.application, content)
                await asyncio.to_thread(model.look)
            return forms.ItemsResponse(taken=len(good), refused=refused, request_id=told["request_id"])


def _json(answer: BaseModel) -> Response:
    """It is of the right form already: FastAPI need not look at it again."""
    return Response(answer.model_dump_json(), media_type="application/json")


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


def application(args: ServingSettings) -> ray_serve.Application:
    """Builder for `serve deploy`: `args` in the file are the keys of the configuration's `serving`."""
    if args.canary is not None:
        raise ConfigError("serving.canary: lists of items are not compared yet; leave it out for recommend")
    return bind(Recommend, args)
