"""The first pass: how rules fare, and what a sample of rows teaches of rules and models."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from lib.calibration import fit_temperature
from lib.data import blocks, stream
from lib.data.labelling import rules, studio
from lib.data.labelling.deciding import Decided, decide
from lib.data.labelling.models import models_of
from lib.data.labelling.plan import Planned
from lib.data.labelling.rows import Fitted, actors, ask, gold_of, opinions, seen
from lib.data.labelling.rules import Tally, Voters
from lib.errors import DataError, WhorlError
from lib.labels import MISSING, Unknown

# Rows with a label that models are asked about, to correct their temperatures and to tell how right they are.
GOLD_ROWS = 1_000
# Fewer correct no temperature.
LEAST_GOLD = 30


@dataclass
class Sampled:
    """The rows of least hash, up to a number: the same whatever blocks they come in."""

    most: int
    rows: list[tuple[str, Any]] = field(default_factory=list)

    def add(self, rows: Sequence[Sequence[Any]]) -> None:
        found = heapq.nsmallest(self.most, [*self.rows, *rows], key=lambda row: row[0])
        self.rows = [(key, value) for key, value in found]


@dataclass
class Surveyed:
    """What the first pass found."""

    rows: int = 0
    empty: int = 0
    unknown: dict[int, Unknown] = field(default_factory=dict)
    gold: Counter[int] = field(default_factory=Counter)
    """Head → rows that have a label."""
    tallies: dict[int, Tally] = field(default_factory=dict)
    spoken: Sampled = field(default_factory=lambda: Sampled(0))
    """Which rules speak of a row, as their numbers."""
    examples: Sampled = field(default_factory=lambda: Sampled(0))
    """Text and labels of each head, of rows that have one."""


def survey(planned: Planned, packed: ray.data.Dataset) -> Surveyed:
    """First pass, over packed blocks."""
    found = Surveyed(
        spoken=Sampled(planned.label.sample if planned.label.accuracies == "agreement" else 0),
        examples=Sampled(min(GOLD_ROWS, planned.label.sample) if planned.gold else 0),
    )
    counts = packed.map_batches(
        survey_block,
        fn_kwargs={"planned": planned, "most": (found.spoken.most, found.examples.most)},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=stream.parallel_tasks()),
    )
    problems: list[tuple[int, int, str]] = []
    for row in stream.rows_of(counts):
        if row["problem"]:
            problems.append((row["fragment"], row["number"], row["problem"]))
            continue
        block = json.loads(row["counts"])
        found.rows += block["rows"]
        found.empty += block["empty"]
        found.gold.update({int(place): n for place, n in block["gold"].items()})
        for place, unknown in block["unknown"].items():
            before, after = found.unknown.get(int(place), Unknown()), Unknown(**unknown)
            earlier = (before.first or 0) <= (after.first or 0) or not after.rows
            found.unknown[int(place)] = before.merge(after) if earlier else after.merge(before)
        for place, tally in block["tallies"].items():
            found.tallies.setdefault(int(place), Tally()).add(Tally(**tally))
        found.spoken.add(block["spoken"])
        found.examples.add(block["examples"])
    if problems:  # the first in source order
        raise DataError(min(problems)[2])
    return found


def survey_block(row: pa.Table, planned: Planned, most: tuple[int, int]) -> pa.Table:
    """Runs in a task: counts of one block, and its rows of least hash."""
    block = blocks.from_row(row, list(planned.reading.columns))
    texts, ids, empty = seen(block.rows)
    keys = [f"{name}-{position}" for name, position in zip(ids, _positions(block), strict=True)]
    gold = gold_of(planned, block.rows)
    speaks = rules.spoken(texts, planned.label.rules)
    speaks[empty] = False
    counts: dict[str, Any] = {"rows": len(ids), "empty": int(empty.sum()), "gold": {}, "unknown": {}}
    counts["tallies"], counts["examples"] = {}, []
    for place, head in enumerate(planned.heads):
        voters = Voters.of(planned.label.rules, head)
        own = np.where(empty, MISSING, gold[:, place])
        counts["gold"][place] = int((own >= 0).sum())
        if place in planned.gold:
            values = blocks.flat(block.rows[planned.gold[place][0]])
            counts["unknown"][place] = asdict(Unknown.among(values, gold[:, place], _positions(block)))
        counts["tallies"][place] = asdict(Tally.of(speaks[:, voters.places], voters.votes, own))
    chosen = Sampled(most[0])
    chosen.add([(keys[i], np.flatnonzero(speaks[i]).tolist()) for i in np.flatnonzero(~empty).tolist()])
    examples = Sampled(most[1])
    known = np.flatnonzero((gold >= 0).any(1) & ~empty).tolist() if most[1] else []
    examples.add([(keys[i], [texts[i].as_py(), gold[i].tolist()]) for i in known])
    counts |= {"spoken": chosen.rows, "examples": examples.rows}
    scalars = {name: blocks.flat(row[name]) for name in ("fragment", "number", "problem")}
    return pa.table({**scalars, "counts": pa.array([json.dumps(counts)])})


def _positions(block: blocks.Block) -> np.ndarray:
    positions: np.ndarray = block.rows[blocks.POSITION].to_numpy()
    return positions


def check(planned: Planned, surveyed: Surveyed) -> None:
    name = planned.reading.files[0].name
    if surveyed.rows == surveyed.empty:
        raise DataError(f"the source {name} holds no text: {surveyed.rows:,} rows, all of them empty")
    for place, unknown in sorted(surveyed.unknown.items()):
        if unknown.first is not None:
            head = planned.heads[place].name
            key = f"data.heads.{head}.labels" if head else "data.labels"
            values = ", ".join(repr(value) for value in unknown.values)
            raise DataError(
                f"{key}: {unknown.rows:,} rows hold a label outside the mapping ({values}); first: "
                f"{planned.reading.place(unknown.first)}; add the values, correct the source, or name a column of "
                f"labels that it has not"
            )


def fit(planned: Planned, surveyed: Surveyed) -> tuple[Fitted, dict[str, dict[str, Any]]]:
    """Accuracies of rules and temperatures of models; and, of each head, how right they are on rows that have a label."""
    label = planned.label
    accuracies = []
    sampled = np.zeros((len(surveyed.spoken.rows), len(label.rules)), bool)
    for line, (_, numbers) in enumerate(surveyed.spoken.rows):
        sampled[line, numbers] = True
    for place, head in enumerate(planned.heads):
        voters, tally = Voters.of(label.rules, head), surveyed.tallies.get(place, Tally())
        match label.accuracies:
            case "agreement":
                found = voters.by_agreement(sampled[:, voters.places])
            case "gold":
                found = voters.by_gold(np.array(tally.right), np.array(tally.judged))
            case _:
                found = voters.given
        accuracies.append(found)
    fitted = Fitted(tuple(accuracies))
    examples = [value for _, value in surveyed.examples.rows]
    if not examples:
        return fitted, {}
    texts = pa.array([text for text, _ in examples], pa.string())
    gold = np.array([classes for _, classes in examples])
    logits = _tried(planned, texts)
    for (name, place), values in logits.items():
        usable = (gold[:, place] >= 0) & ~np.isnan(values).any(1)
        if usable.sum() >= LEAST_GOLD:
            fitted.temperatures[name, place] = fit_temperature(values[usable], gold[usable, place])
    trial: dict[str, dict[str, Any]] = {}
    nobody = np.full(len(examples), MISSING)
    for place, head in enumerate(planned.heads):
        said = opinions(planned, fitted, place, rules.spoken(texts, label.rules), logits)
        decided = decide(said, nobody, nobody, np.zeros(len(examples)), label.threshold)
        trial[studio.control(head)] = _trial(decided, gold[:, place])
    return fitted, trial


def _trial(decided: Decided, gold: np.ndarray) -> dict[str, Any]:
    judged, right = gold >= 0, decided.label == gold
    sure = judged & decided.sure
    spoken = judged & (decided.label != MISSING)
    return {
        "rows": int(judged.sum()),
        "labelled": int(sure.sum()),
        "right": int((sure & right).sum()),
        "right_without_threshold": int((spoken & right).sum()),
    }


def _tried(planned: Planned, texts: pa.Array) -> dict[tuple[str, int], np.ndarray]:
    """Logits of each model and head for some texts, asked where models run."""
    if planned.label.embedding is None and planned.label.chat is None:
        return {}
    rows = ray.data.from_arrow(pa.table({"text": texts}))
    answered = rows.map_batches(Trial, fn_constructor_args=(planned,), **actors(planned))
    (row,) = stream.rows_of(answered)
    if row["problem"]:
        raise DataError(row["problem"])
    return {(name, place): np.array(values, float) for name, place, values in json.loads(row["logits"])}


class Trial:
    """An actor: all models' logits of some texts, as JSON."""

    def __init__(self, planned: Planned) -> None:
        self._planned = planned

    def __call__(self, batch: pa.Table) -> pa.Table:
        models = models_of(self._planned.label, self._planned.heads, self._planned.key)
        try:
            said = ask(models, batch["text"].to_pylist())
        except WhorlError as error:
            return pa.table({"logits": [None], "problem": [str(error)]})
        found = [[name, place, values.tolist()] for (name, place), values in said.items()]
        return pa.table({"logits": [json.dumps(found)], "problem": pa.array([None], pa.string())})
