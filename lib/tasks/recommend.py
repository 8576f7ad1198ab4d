"""Recommendation: the next item of a user, from what items say of themselves and what users do (`lib.recommender`).

A row is a stretch of a user's interactions in order; from each of the last `targets` of them, what came before
foretells it. The loss is that of a choice among all items, or, in large catalogues, among those of the batch and
some that are drawn.

Shapes: B rows, L interactions in the longest, N items, M that are foretold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from lib.artifacts import DatasetRef, TaskFile
from lib.errors import ConfigError
from lib.recommender import items as catalogue
from lib.recommender import ranker, ranks, vectors
from lib.recommender.forms import Request, Response
from lib.recommender.items import Scale
from lib.settings import DataSettings, ServingSettings, Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lib.recommender.model import Recommender
    from lib.recommender.predictor import Predictor
    from lib.tasks import Batch, Outputs

__all__ = ["Request", "Response"]

ROUTE = "/v1/recommendations"
PACKS = False
METRIC = "ndcg_10"
# Interactions of a history that a request of the demo sends, and items that it asks for.
SHOWN_HISTORY, SHOWN = 50, 5
LISTS: frozenset[str] = frozenset()
TEXTS: frozenset[str] = (
    frozenset()
)  # the catalogue's texts are read by themselves (lib/data/recommending/catalogue.py)
JUDGED: Literal["rankings"] = "rankings"


def columns(data: DataSettings, present: Collection[str] = ()) -> dict[str, str]:
    if data.items is None:
        raise ConfigError(
            "data.items is missing; name the table of what can be recommended, such as {source: items.csv, id: item}"
        )
    rules = data.interactions
    if rules.least_value is not None and data.columns.value is None:
        raise ConfigError("data.interactions.least_value needs data.columns.value, the column of the ratings")
    if rules.weights and data.columns.event is None:
        raise ConfigError("data.interactions.weights needs data.columns.event, the column of what was done")
    named = {name: getattr(data.columns, name) for name in ("user", "item", "time", "value", "event")}
    return {name: column for name, column in named.items() if column is not None}


def classes(data: DataSettings) -> list[str]:
    """None: what is chosen is an item."""
    return []


def counts(rows: pa.Table, classes: list[str]) -> dict[str, int]:
    return {}


def build(base: Path, settings: Settings, dataset: DatasetRef) -> Recommender:
    """A recommender of the items of a dataset, in fp32. Raises ModelError when their text vectors are missing, or the ranker
    that is to be taken."""
    from lib.recommender.model import Facts, Recommender, Shape

    own, manifest = settings.model.recommender, dataset.manifest()
    if own.ranker != "none" and own.ranker_from is not None:
        ranker.check(own.ranker_from)
    items = catalogue.read(dataset, catalogue.FEATURES)
    numbers = catalogue.numbers(items["numbers"])
    scale = Scale.of(numbers)
    names = catalogue.vocabulary(items["categories"])
    codes, starts = catalogue.coded(items["categories"], names)
    facts = Facts(codes, starts, scale.apply(numbers), items["interactions"].to_numpy())
    encoder, width = None, 0
    if own.text == "frozen":
        facts.texts = vectors.read(settings, dataset)
        width = facts.texts.shape[1]
    elif own.text == "tuned":
        facts.tokens = catalogue.tokens(items["input_ids"])
        encoder = _encoder(base, settings)
        width = int(encoder.config.hidden_size)
    users = manifest["users_known"]
    shape = Shape(
        items=len(items),
        text_width=width,
        item_categories=names,
        item_numbers=vars(scale),
        user_categories=users["categories"],
        user_numbers=users["numbers"],
        events=manifest["events"],
        settings=own.model_dump(mode="json"),
        item_number_names=settings.data.items.numbers if settings.data.items else [],
        user_number_names=settings.data.users.numbers if settings.data.users else [],
    )
    model = Recommender(shape, facts, encoder)
    model.dataset = dataset
    return model


def _encoder(base: Path, settings: Settings) -> Any:
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, trust_remote_code=settings.model.trust_remote_code
    )


def collate(rows: pa.Table, pad: int) -> Batch:
    """`items`, `gaps`, `events` int64 and `weights` float32 [B, L]; `lengths` and `targets` int64 [B]; of the users
    `user_categories` and `user_starts` as `lib.recommender.model` wants them, and `user_numbers` [B, F]."""
    import torch

    from lib.recommender.model import gap_codes

    lengths = rows["length"].to_numpy().astype(np.int64)
    mask = np.arange(lengths.max()) < lengths[:, None]

    def padded(values: np.ndarray) -> torch.Tensor:
        found = np.zeros(mask.shape, values.dtype)
        found[mask] = values
        return torch.from_numpy(found)

    flat = {name: _flat(rows[name]) for name in ("items", "times", "events", "weights")}
    ends = np.cumsum(lengths)[:-1]
    gaps = [gap_codes(times) for times in np.split(flat["times"], ends)]
    batch = {
        "items": padded(flat["items"].astype(np.int64)),
        "gaps": padded(np.concatenate(gaps)),
        "events": padded(flat["events"].astype(np.int64)),
        "weights": padded(flat["weights"]),
        "lengths": torch.from_numpy(lengths),
        "targets": torch.from_numpy(rows["targets"].to_numpy().astype(np.int64)),
    }
    categories = rows["user_categories"].combine_chunks()
    sizes = np.diff(categories.offsets.to_numpy()).astype(np.int64)
    numbers = catalogue.numbers(rows["user_numbers"]).astype(np.float32)
    return batch | {
        "user_categories": torch.from_numpy(categories.flatten().to_numpy().astype(np.int64)),
        "user_starts": torch.from_numpy(np.cumsum(sizes) - sizes),
        "user_numbers": torch.from_numpy(numbers),
    }


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.combine_chunks().flatten())


def balance(manifest: dict[str, Any], settings: Settings) -> dict[str, float]:
    """All count as their events do."""
    return {}


def weight(rows: pa.Table, settings: Settings, balance: dict[str, float]) -> float:
    lengths, targets = (rows[name].to_numpy().astype(np.int64) for name in ("length", "targets"))
    targets = _asked(lengths, targets, settings.model.recommender.history)
    sums = np.concatenate([[0.0], np.cumsum(_flat(rows["weights"]), dtype=np.float64)])
    ends = np.cumsum(lengths)
    return float((sums[ends] - sums[ends - targets]).sum())


def loss(
    model: nn.Module, batch: Batch, settings: Settings, balance: dict[str, float]
) -> tuple[torch.Tensor, Outputs]:
    """Weighted cross-entropy of the choice, summed over what is foretold; in evaluation
    what `lib.recommender.ranks.place` says of each that is foretold.

    Items that training never saw are no choice while it learns: that nobody took them says nothing of them.
    """
    import torch
    from torch.nn import functional

    own = settings.model.recommender
    learning = torch.is_grad_enabled()
    of = {name: batch[name].cpu().numpy() for name in ("lengths", "targets")}
    asked_from = of["lengths"] - 1 - _asked(of["lengths"], of["targets"], own.history if learning else None)
    row, start, size, first = windows(of["lengths"] - 1, asked_from, own.history)
    at = np.arange(max(int(size.max(initial=0)), 1))
    device = batch["items"].device
    rows, place = (
        torch.from_numpy(x).to(device) for x in (row, np.minimum(start[:, None] + at, _last(batch)))
    )
    asked = torch.from_numpy((at >= first[:, None]) & (at < size[:, None])).to(device)
    read = {name: batch[name][rows[:, None], place] for name in ("items", "gaps", "events")}
    labels = batch["items"][rows[:, None], place + 1][asked]
    weights = batch["weights"][rows[:, None], place + 1][asked]
    wanted = correction = None
    if learning and own.sampled:
        wanted, correction = draw(unwrapped(model), labels, own.sampled)
    categories, starts = _of_rows(batch, rows)
    users, items, bias = model(
        **read,
        user_categories=categories,
        user_starts=starts,
        user_numbers=batch["user_numbers"][rows],
        wanted=wanted,
    )
    logits = (users[asked] @ items.T + bias).float()
    if wanted is not None:
        logits, labels = logits - correction, torch.searchsorted(wanted, labels)
    elif learning:
        logits = logits.masked_fill(~unwrapped(model).known, -torch.inf)
    losses = functional.cross_entropy(
        logits,
        labels,
        reduction="none",
        label_smoothing=settings.training.label_smoothing if learning else 0.0,
    )
    total = (losses * weights).sum()
    if learning:
        return total, {}
    window, column = np.nonzero(asked.cpu().numpy())
    ends = zip(row[window].tolist(), (start[window] + column + 1).tolist(), strict=True)
    histories = [batch["items"][r, :end].cpu().numpy() for r, end in ends]
    known = unwrapped(model).known.cpu().numpy()
    places = [
        ranks.place(score, int(label), had, known)
        for score, label, had in zip(logits.cpu().numpy(), labels.cpu().numpy(), histories, strict=True)
    ]
    return total, ranks.stacked(places)


def _asked(lengths: np.ndarray, targets: np.ndarray, history: int | None) -> np.ndarray:
    """How many of each row's last interactions are learned from: what lies further back than a history is read no more
    of anybody."""
    return targets if history is None else np.minimum(targets, np.minimum(lengths - 1, history))


def _last(batch: Batch) -> int:
    """Number of the last interaction that another follows, in the longest row."""
    return max(int(batch["items"].shape[1]) - 2, 0)


def windows(
    lengths: np.ndarray, asked_from: np.ndarray, history: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `lengths` interactions, of which those from `asked_from` on are asked, in windows of at most `history`:
    `row`, `start`, `size` and `first`, the place in the window from which on it is asked; int64 each.

    Each is asked once, and knows at least half of `history` before it, or all there is.
    """
    found = []
    for row, (length, asked) in enumerate(zip(lengths.tolist(), asked_from.tolist(), strict=True)):
        end = length
        while end > asked:
            start = max(end - history, 0)
            first = max(asked, start + history // 2 if start else 0)
            found.append((row, start, end - start, first - start))
            end = first
    columns = np.array(found, np.int64).reshape(-1, 4).T
    return columns[0], columns[1], columns[2], columns[3]


def _of_rows(batch: Batch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is known of the users of those rows: `user_categories` and `user_starts`."""
    from lib.recommender.model import picked

    return picked(batch["user_categories"], batch["user_starts"], rows)


def unwrapped(model: Any) -> Recommender:
    """The module inside a DeepSpeed engine."""
    return getattr(model, "module", model)  # type: ignore[no-any-return]


def draw(model: Recommender, labels: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Items int64 [K], rising: those of `labels` and `count` that are drawn; and float32 [K] the log of how likely each
    was to be among them, which is taken from its logit (Yi et al. 2019, https://doi.org/10.1145/3298689.3346996)."""
    import torch

    drawn = torch.multinomial(model.draws, count, replacement=True)
    wanted = torch.unique(torch.cat([labels, drawn]))
    # Neither among the draws nor among those that users turned to in this batch.
    absent = torch.log1p(-model.draws[wanted]) * count + torch.log1p(-model.shares[wanted]) * len(labels)
    return wanted, torch.log(-torch.expm1(absent))


def metrics(outputs: Outputs) -> dict[str, float]:
    """Figures of the ranks, and the `new_bias` that they are with."""
    bias = ranks.fit_new_bias(outputs)
    return ranks.figures(ranks.ranked(outputs, bias)) | {"new_bias": bias}


def save(model: nn.Module, base: Path, info: TaskFile, folder: Path) -> None:
    """Write a model directory (`lib.recommender.predictor`)."""
    from lib.recommender import predictor

    predictor.save(model, base, info, folder)


def load(folder: Path, serving: ServingSettings) -> Predictor:
    from lib.recommender import predictor

    return predictor.load(folder, serving)


def request(row: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """With what a row knew before what it foretells last."""
    return ROUTE, {"history": row["item_names"][:-1][-SHOWN_HISTORY:], "k": SHOWN}


def tell(row: dict[str, Any], reply: dict[str, Any], classes: list[str]) -> str:
    before = " · ".join(row["item_titles"][:-1][-SHOWN:])
    said = [_with_reason(one) for one in reply["results"]]
    return f"{before}\n    → {'; '.join(said)}   (the data says: {row['item_titles'][-1]})"


def _with_reason(one: dict[str, Any]) -> str:
    reason = one["reason"]
    told = [named["title"] for named in reason["because"]] + reason["words"]
    return str(one["title"]) + (f" (as {', '.join(told)})" if told else "")


def gathered(application: str, begin: float, data: DataSettings) -> Iterator[dict[str, Any]]:
    """What users did since `begin`, as rows of the source that `data` names: one more file of it. What was sent to the
    application showed interest, so where there are ratings it has the least that does."""
    from lib.recommender import store

    named = data.columns
    for one in store.since(application, begin):
        row: dict[str, Any] = {named.user: one.user, named.item: one.item, named.time: one.time}
        if named.event is not None:
            row[named.event] = one.event
        if named.value is not None:
            row[named.value] = data.interactions.least_value
        yield row


def show(row: dict[str, Any], post: Callable[[str, dict[str, Any]], dict[str, Any]]) -> list[str]:
    """How what a user does next changes the answer: the row's user begins with its history, and takes the first item."""
    user, now = f"demo-{row['user']}", int(time.time())
    history = row["item_names"][:-1][-SHOWN_HISTORY:]

    def do(items: list[str], until: int) -> None:
        batch = [
            {
                "user_id": user,
                "item": item,
                "time": until - len(items) + place,
                "id": f"{user}-{item}-{until}",
            }
            for place, item in enumerate(items)
        ]
        post("/v1/interactions", {"interactions": batch})

    do(history, now - 1)
    before = post(ROUTE, {"user_id": user, "k": SHOWN})["results"]
    if not before:
        return []
    do([before[0]["item"]], now)
    after = post(ROUTE, {"user_id": user, "k": SHOWN})["results"]
    return [
        f"user {user}: {'; '.join(one['title'] for one in before)}",
        f"after {before[0]['title']}: {'; '.join(map(_with_reason, after))}",
    ]
