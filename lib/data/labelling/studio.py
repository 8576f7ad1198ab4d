"""Label Studio: rows as tasks for people, and what people have said of them.

Tasks are JSON as Label Studio imports it, each with what the machine thinks filled in (`predictions`); the labelling
configuration (XML) goes into the project's settings. Exports come in full (JSON) or flat (JSON_MIN), with any number of
annotations to a task. A row is known again by `row_id`, the hash of its text without personal data, which is its id in a
dataset too; a task of somebody's own without it, by its text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from lib import storage
from lib.data.labelling.agreement import MISSING, agreement
from lib.errors import ConfigError, DataError, StorageError, nearest
from lib.heads import Head

TEXT, ROW = "text", "row_id"
WHY = "why"
TASKS, CONFIG = "tasks.json", "labelling.xml"
MODEL = "whorl"


def control(head: Head) -> str:
    """The name of the head's choices in the labelling configuration, and so in exports."""
    return head.name or "label"


def labelling_config(heads: Sequence[Head]) -> str:
    """XML for the project's labelling interface: the text, and one choice for each head."""
    lines = ["<View>", f'  <Text name="{TEXT}" value="${TEXT}"/>']
    for head in heads:
        if head.name:
            lines.append(f"  <Header value={quoteattr(head.name)}/>")
        lines.append(
            f'  <Choices name={quoteattr(control(head))} toName="{TEXT}" choice="single" required="true">'
        )
        lines += [f"    <Choice value={quoteattr(label)}/>" for label in head.labels]
        lines.append("  </Choices>")
    return "\n".join([*lines, "</View>", ""])


def task(
    row_id: str, text: str, why: str, predicted: Sequence[tuple[Head, str, float]], **more: Any
) -> dict[str, Any]:
    """A row as a task: `predicted` are the labels that are filled in, and how probable they are. `more` is shown beside them."""
    found: dict[str, Any] = {"data": {TEXT: text, ROW: row_id, WHY: why, **more}}
    if predicted:
        results = [
            {
                "from_name": control(head),
                "to_name": TEXT,
                "type": "choices",
                "value": {"choices": [label]},
                "score": round(score, 4),
            }
            for head, label, score in predicted
        ]
        least = min(round(score, 4) for _, _, score in predicted)
        found["predictions"] = [{"model_version": MODEL, "score": least, "result": results}]
    return found


@dataclass(frozen=True)
class Said:
    """One person's answer about one row."""

    row: str
    who: str
    classes: tuple[int, ...]
    """Of each head; MISSING where nothing was chosen."""


@dataclass
class Annotations:
    """All answers, the last of each person about each row."""

    heads: Sequence[Head]
    answers: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """Row → person → classes."""
    tasks: int = 0
    cancelled: int = 0
    """Tasks that somebody has skipped."""
    unanswered: int = 0
    """Annotations that choose nothing."""

    def add(self, said: Said) -> None:
        mine = self.answers.setdefault(said.row, {})
        mine[said.who] = said.classes

    def votes(self, row: str, head: int) -> Counter[int]:
        """Class → people."""
        chosen = (classes[head] for classes in self.answers.get(row, {}).values())
        return Counter(label for label in chosen if label != MISSING)

    def decided(self) -> dict[str, list[tuple[int, float]]]:
        """Row → of each head, the class of most people and their share; TIED where no class has most, MISSING where
        nobody has chosen."""
        return {
            row: [_majority(self.votes(row, place)) for place in range(len(self.heads))]
            for row in sorted(self.answers)
        }

    def agreement(self) -> dict[str, dict[str, Any]]:
        """Head → what `lib.data.labelling.agreement` says; people are called A1, A2 and so on."""
        people = sorted({who for answers in self.answers.values() for who in answers}, key=_by_number)
        names = [f"A{number}" for number in range(1, len(people) + 1)]
        rows = sorted(self.answers)
        found = {}
        for place, head in enumerate(self.heads):
            ratings = np.full((len(people), len(rows)), MISSING)
            for column, row in enumerate(rows):
                for line, who in enumerate(people):
                    if who in self.answers[row]:
                        ratings[line, column] = self.answers[row][who][place]
            found[control(head)] = agreement(ratings, names)
        return found


TIED = -3


def _majority(votes: Counter[int]) -> tuple[int, float]:
    if not votes:
        return MISSING, 0.0
    (label, most), *others = votes.most_common()
    if others and others[0][1] == most:
        return TIED, most / votes.total()
    return label, most / votes.total()


def _by_number(who: str) -> tuple[int, str]:
    return (int(who), "") if who.isdigit() else (1 << 62, who)


def files_of(uris: Sequence[str]) -> list[str]:
    """The JSON files of `label.annotations`. Raises ConfigError where there are none."""
    found = []
    for given in uris:
        files = [uri for uri in storage.find(given) if uri.lower().endswith(".json")]
        if not files:
            raise ConfigError(
                f"label.annotations: no JSON file at {storage.display(storage.uri(given))}; give an export of Label Studio"
            )
        found += files
    return found


def read(
    uris: Sequence[str], heads: Sequence[Head], row_ids: Callable[[list[str]], list[str]]
) -> Annotations:
    """All annotations of exports, later ones going before earlier ones of the same person. `row_ids` tells the ids of
    texts whose tasks have none.

    Raises DataError, in one line that names file and task, for what is no export or has labels that the heads have not.
    """
    found = Annotations(heads)
    for uri in uris:
        _read_file(uri, found, row_ids)
    return found


def _read_file(uri: str, found: Annotations, row_ids: Callable[[list[str]], list[str]]) -> None:
    name = storage.display(uri)
    try:
        tasks = storage.read_json(uri)
    except StorageError as error:
        raise DataError(f"{name} is no export of Label Studio: {error}") from None
    if not isinstance(tasks, list) or not tasks:
        raise DataError(
            f"{name} is no export of Label Studio: it should hold a list of tasks; export as JSON or JSON_MIN"
        )
    without = [item for item in tasks if isinstance(item, dict) and not _datum(item, ROW)]
    texts = [str(_datum(item, TEXT) or "") for item in without]
    ids = dict(zip(map(id, without), row_ids(texts), strict=True)) if without else {}
    answered = controls = 0
    for number, item in enumerate(tasks, 1):
        place = f"{name} task {item['id'] if isinstance(item, dict) and 'id' in item else f'number {number}'}"
        if not isinstance(item, dict) or not (_datum(item, ROW) or _datum(item, TEXT)):
            raise DataError(
                f"{place} has neither {ROW} nor {TEXT}: it is no task of Label Studio, or damaged"
            )
        row = str(_datum(item, ROW) or ids[id(item)])
        found.tasks += 1
        for who, chosen in _annotations(item, place, found):
            controls += len(chosen)
            classes = tuple(_class(chosen.get(control(head)), head, place) for head in found.heads)
            if all(label == MISSING for label in classes):
                found.unanswered += 1
                continue
            answered += 1
            found.add(Said(row, who, classes))
    if controls and not answered:
        wanted = ", ".join(repr(control(head)) for head in found.heads)
        raise DataError(
            f"{name}: no annotation answers {wanted}; the choices of the labelling configuration must be called so"
        )


def _datum(item: dict[str, Any], name: str) -> Any:
    """Of a task's data, which JSON_MIN has beside everything else."""
    data = item.get("data")
    return data.get(name) if isinstance(data, dict) else item.get(name)


def _annotations(
    item: dict[str, Any], place: str, found: Annotations
) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """Who has annotated a task, and what was chosen under which name."""
    if not isinstance(item.get("data"), dict):  # JSON_MIN: an object for each annotation
        chosen = {control(head): item[control(head)] for head in found.heads if control(head) in item}
        yield _who(item.get("annotator")), {name: _choices(value, place) for name, value in chosen.items()}
        return
    annotations = item.get("annotations")
    if not isinstance(annotations, list):
        raise DataError(f"{place} has no annotations; export the project as JSON or JSON_MIN")
    for annotation in annotations:
        results = annotation.get("result") if isinstance(annotation, dict) else None
        if not isinstance(results, list):
            raise DataError(f"{place} has an annotation without a result: the export is damaged")
        if annotation.get("was_cancelled"):
            found.cancelled += 1
            continue
        choices = [r for r in results if isinstance(r, dict) and r.get("type") == "choices"]
        yield (
            _who(annotation.get("completed_by")),
            {str(r.get("from_name")): _choices(r.get("value"), place) for r in choices},
        )


def _who(value: Any) -> str:
    """A person's number; what else an export tells of people is not read."""
    if isinstance(value, dict):
        value = value.get("id", value.get("email"))
    return "" if value is None else str(value)


def _choices(value: Any, place: str) -> list[Any]:
    """`positive`, `{"choices": ["positive"]}` and `["positive"]` as lists."""
    if isinstance(value, dict):
        value = value.get("choices")
    if isinstance(value, str):
        return [value] if value else []
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{place} has choices that are no list: the export is damaged")
    return value


def _class(chosen: list[Any] | None, head: Head, place: str) -> int:
    if not chosen:
        return MISSING
    if len(chosen) > 1:
        raise DataError(
            f'{place} has {len(chosen)} choices for {control(head)!r}; a row has one label: set choice="single"'
        )
    label = str(chosen[0])
    if label not in head.labels:
        raise DataError(
            f"{place}: no label {label!r} of {control(head)!r}{nearest(label, head.labels)} "
            f"(known: {', '.join(head.labels)})"
        )
    return head.labels.index(label)
