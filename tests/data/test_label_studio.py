"""Label Studio's files: tasks and configuration out, exports of both kinds in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lib.data.labelling import studio
from lib.data.labelling.studio import MISSING, TIED, Annotations
from lib.errors import ConfigError, DataError
from lib.heads import laid_out

ONE = laid_out([("", ["bad", "good"], 1.0)])
TWO = laid_out([("mood", ["bad", "good"], 1.0), ("topic", ['size & "fit"', "price"], 1.0)])


def choice(label: str, name: str = "label") -> dict[str, Any]:
    return {"from_name": name, "to_name": "text", "type": "choices", "value": {"choices": [label]}}


def full(number: int, row: str, *said: tuple[Any, list[dict[str, Any]]], **more: Any) -> dict[str, Any]:
    """A task as Label Studio exports it as JSON."""
    annotations = [
        {"id": number * 10 + i, "completed_by": who, "result": results, "was_cancelled": False, **more}
        for i, (who, results) in enumerate(said)
    ]
    return {"id": number, "data": {"text": f"text {row}", "row_id": row}, "annotations": annotations}


def load(tmp_path: Path, exported: Any, heads: Any = ONE, name: str = "export.json") -> Annotations:
    path = tmp_path / name
    path.write_text(exported if isinstance(exported, str) else json.dumps(exported))
    return studio.read([str(path)], heads, lambda texts: [f"id of {text}" for text in texts])


def test_full_exports_with_several_people(tmp_path: Path) -> None:
    person = {"id": 7, "email": "ada@example.com", "first_name": "Ada"}
    found = load(
        tmp_path,
        [
            full(1, "a", (person, [choice("good")]), (2, [choice("good")]), (3, [choice("bad")])),
            full(2, "b", (7, [choice("good")]), (2, [choice("bad")])),
            full(3, "c", (7, []), (2, [choice("bad")])),
            full(4, "d", (7, [choice("bad")]), was_cancelled=True),
            # The same person about the same row again: the later answer.
            full(5, "a", (3, [choice("good")])),
        ],
    )
    assert found.decided() == {"a": [(1, 1.0)], "b": [(TIED, 0.5)], "c": [(0, 1.0)]}
    assert (found.tasks, found.cancelled, found.unanswered) == (5, 1, 1)
    said = found.agreement()["label"]
    assert (said["annotators"], said["rows"], said["labelled_by_several"]) == (3, 3, 2)
    assert "ada" not in json.dumps(said).lower()
    assert said["pairs"][0]["annotators"] == ["A1", "A2"]


def test_flat_exports_have_an_object_for_each_annotation(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 1, "text": "x", "row_id": "a", "label": "good", "annotator": 1, "annotation_id": 3},
        {"id": 1, "text": "x", "row_id": "a", "label": {"choices": ["good"]}, "annotator": 2},
        {"id": 1, "text": "x", "row_id": "a", "label": "bad", "annotator": 3},
        {"id": 2, "text": "y", "label": "bad", "annotator": 1},
        {"id": 3, "text": "z", "row_id": "c", "annotator": 1},
    ]
    found = load(tmp_path, rows)
    assert found.decided() == {"a": [(1, pytest.approx(2 / 3))], "id of y": [(0, 1.0)]}
    assert found.unanswered == 1


def test_every_head_is_asked_and_may_stay_unanswered(tmp_path: Path) -> None:
    both = [choice("good", "mood"), choice('size & "fit"', "topic")]
    found = load(tmp_path, [full(1, "a", (1, both)), full(2, "b", (1, both[:1]))], TWO)
    assert found.decided() == {"a": [(1, 1.0), (0, 1.0)], "b": [(1, 1.0), (MISSING, 0.0)]}
    assert set(found.agreement()) == {"mood", "topic"}


def test_tasks_and_configuration_fit_one_another(tmp_path: Path) -> None:
    view = ElementTree.fromstring(studio.labelling_config(TWO))
    names = {c.get("name"): [v.get("value") for v in c] for c in view.findall("Choices")}
    assert names == {"mood": ["bad", "good"], "topic": ['size & "fit"', "price"]}
    text = view.find("Text")
    assert text is not None
    assert {c.get("toName") for c in view.findall("Choices")} == {text.get("name")}
    made = studio.task("a", "It fits", "unsure", [(TWO[0], "good", 0.61234), (TWO[1], "price", 0.4)])
    assert text.get("value") == "$text"
    assert made["data"] == {"text": "It fits", "row_id": "a", "why": "unsure"}
    (predicted,) = made["predictions"]
    assert predicted["score"] == 0.4
    for result in predicted["result"]:
        assert result["value"]["choices"][0] in names[result["from_name"]]
        assert result["to_name"] == "text"
    assert "predictions" not in studio.task("a", "x", "no rule speaks", [])
    # What is predicted is what somebody who only submits has said.
    exported = {**made, "id": 9, "annotations": [{"completed_by": 1, "result": predicted["result"]}]}
    assert load(tmp_path, [exported], TWO).decided() == {"a": [(1, 1.0), (1, 1.0)]}


@pytest.mark.parametrize(
    ("exported", "said"),
    [
        ("{broken", r"export\.json is no export of Label Studio: .* not valid JSON"),
        ({"id": 1}, "should hold a list of tasks; export as JSON or JSON_MIN"),
        ([full(1, "a"), 7], "task number 2 has neither row_id nor text"),
        ([full(1, "a"), {"id": 17, "data": {"x": 1}, "annotations": []}], "task 17 has neither"),
        ([{"id": 4, "data": {"text": "x"}}], "task 4 has no annotations; export the project as JSON"),
        (
            [{"id": 4, "data": {"text": "x"}, "annotations": [{"id": 1}]}],
            "task 4 has an annotation without a",
        ),
        ([full(8, "a", (1, [choice("god")]))], r"task 8: no label 'god' of 'label'; did you mean 'good'\?"),
        (
            [full(8, "a", (1, [{**choice("bad"), "value": {"choices": ["bad", "good"]}}]))],
            "task 8 has 2 choices for 'label'; a row has one label",
        ),
        ([full(8, "a", (1, [{**choice("bad"), "value": {"choices": 3}}]))], "task 8 has choices that are no"),
        ([full(8, "a", (1, [choice("bad", "mood")]))], "no annotation answers 'label'; the choices of"),
    ],
)
def test_what_is_broken_is_one_line_that_names_the_task(tmp_path: Path, exported: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path, exported)
    assert "\n" not in str(caught.value)


def test_files_are_found(tmp_path: Path) -> None:
    for name in ("a.json", "b.json", "labels.xml"):
        (tmp_path / name).write_text("[]")
    assert [Path(f).name for f in studio.files_of([str(tmp_path)])] == ["a.json", "b.json"]
    with pytest.raises(ConfigError, match=r"label\.annotations: no JSON file at .*none"):
        studio.files_of([str(tmp_path / "none")])
