"""Wrong labels that were planted are found; right ones are left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.preprocess import report as tell
from lib.data import noise
from lib.data.plan import plan
from lib.errors import ConfigError
from lib.settings import DataSettings, Settings

LABELS = ["bad", "fine", "good"]
# Words that a text of each class is likely to have, and words of all.
OWN = [[f"{stem}{i}" for i in range(12)] for stem in ("awful", "medium", "lovely")]
COMMON = [f"word{i}" for i in range(60)]


def planted(rows: int, share: float, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, given classes, and which of these are wrong."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, rows, p=[0.2, 0.3, 0.5])
    texts = []
    for label in truth:
        own = rng.choice(OWN[label], rng.integers(2, 5))
        stray = rng.choice(OWN[rng.integers(3)], rng.integers(0, 2))
        texts.append(" ".join(rng.permutation([*own, *stray, *rng.choice(COMMON, 8)])))
    wrong = rng.random(rows) < share
    given = np.where(wrong, (truth + rng.integers(1, 3, rows)) % 3, truth)
    return texts, given, wrong


def test_planted_labels_are_ranked_first_and_their_share_is_estimated() -> None:
    folds = np.arange(2000) % 5
    estimates = []
    for share in (0.02, 0.1, 0.2):
        texts, given, wrong = planted(2000, share)
        likely = noise.out_of_fold(texts, given, folds, 3)
        assert likely is not None
        assert likely.sum(1) == pytest.approx(1)
        found = noise.suspects(likely, given)
        assert wrong[found.rows].mean() >= 0.95
        assert wrong[found.rows].sum() >= 0.55 * wrong.sum()
        estimates.append(found.share)
    assert estimates == pytest.approx([0.02, 0.1, 0.2], abs=0.02)
    texts, given, _ = planted(2000, 0)
    likely = noise.out_of_fold(texts, given, folds, 3)
    assert likely is not None
    assert noise.suspects(likely, given).share < 0.01


def test_the_counts_are_those_of_the_papers_definition() -> None:
    # Class 0 is given with 0.9, 0.8, 0.1 on average 0.6; class 1 with 0.2, 0.9, 0.7: 0.6.
    first = np.array([0.9, 0.8, 0.1, 0.8, 0.1, 0.3])
    likely = np.stack([first, 1 - first], axis=1)
    given = np.array([0, 0, 0, 1, 1, 1])
    found = noise.suspects(likely, given)
    # The third is confidently of class 1, the fourth of class 0; margins -0.8 and -0.6.
    assert found.rows.tolist() == [2, 3]
    assert found.share == pytest.approx(1 / 3)
    assert found.suggested.tolist() == [1, 1, 1, 0, 0, 0]


def test_what_tells_nothing_is_none() -> None:
    folds = np.arange(4) % 2
    assert noise.out_of_fold(["!", "?", "", " "], np.array([0, 1, 0, 1]), folds, 2) is None
    assert noise.out_of_fold(["a", "b", "c", "d"], np.array([0, 1, 0, 1]), folds, 2) is None


def settings(base: Path, source: Path, **data: Any) -> Settings:
    section = {"source": str(source), "labels": LABELS, "rows_per_shard": 700, **data}
    values = {"name": "test", "task": "sentiment", "data": section}
    return Settings.model_validate({**values, "model": {"base": str(base), "max_length": 12}})


def test_the_sample_is_of_training_rows_and_the_same_for_any_blocks(tiny_base: Path) -> None:
    data = DataSettings.model_validate(
        {"source": "x", "labels": LABELS, "label_noise": {"report": True, "sample": 200}}
    )
    rng = np.random.default_rng(0)
    rows, hashes = 3000, rng.integers(-(2**63), 2**63 - 1, 3000)
    table = pa.table(
        {"id": [f"{h:x}" for h in hashes], "text": [f"text {i}" for i in range(rows)], "label": [1] * rows}
    )
    splits, positions = (np.arange(rows) % 2).astype(np.int8), np.arange(rows)

    def sampled(size: int) -> list[Any]:
        found: list[Any] = []
        for start in range(0, rows, size):
            part = slice(start, start + size)
            found = noise.kept(
                found + noise.sample(table[part], splits[part], hashes[part], positions[part], data, rows),
                data,
            )
        return found

    found = sampled(3000)
    assert 70 < len(found) < 130  # half of the rows are for training
    assert all(row[1] % 2 == 0 for row in found)
    assert sampled(77) == found
    off = data.model_copy(update={"label_noise": data.label_noise.model_copy(update={"report": False})})
    assert noise.sample(table, splits, hashes, positions, off, rows) == []


def test_only_a_task_of_one_label_for_a_text_has_it(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("word O\n")
    section = {"source": str(tmp_path / "a.conll"), "labels": ["PER"], "label_noise": {"report": True}}
    values = {"name": "test", "task": "tagging", "data": section, "model": {"base": str(tiny_base)}}
    with pytest.raises(ConfigError, match=r"data\.label_noise: tagging has no one label for a text"):
        plan(Settings.model_validate(values))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_the_manifest_lists_them_and_people_are_asked(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lib.data.build import build

    texts, given, wrong = planted(1500, 0.1, seed=3)
    texts = [f"{text} to me{i}@example.com" for i, text in enumerate(texts)]
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": t, "label": LABELS[c]}) for t, c in zip(texts, given.tolist(), strict=True)]
    source.write_text("\n".join(lines))
    wanted = {"report": True, "rows": 30, "tasks": True}
    planned = plan(settings(tiny_base, source, label_noise=wanted, leakage="off"))
    manifest = build(planned)
    found = manifest["label_noise"]["label"]
    assert found["rows"] == manifest["splits"]["train"]["rows"]
    assert found["share"] == pytest.approx(0.1, abs=0.03)
    rows = [int(listed["row"].rpartition(" ")[2]) - 1 for listed in found["listed"]]
    assert len(rows) == 30
    assert wrong[rows].mean() >= 0.95
    for row, listed in zip(rows, found["listed"], strict=True):
        assert listed["row"] == f"{source} row {row + 1}"
        assert listed["given"] == LABELS[given[row]]
        assert listed["suggested"] != listed["given"]
        assert listed["suggested_probability"] > listed["probability"]
        assert texts[row].startswith(listed["text"].partition(" <EMAIL_1>")[0])
        assert "example.com" not in listed["text"]
    folder = Path(planned.ref.uri.removeprefix("file://")) / "label_noise"
    tasks = json.loads((folder / "tasks.json").read_text())
    assert [task["data"]["text"][:120] for task in tasks] == [listed["text"] for listed in found["listed"]]
    assert tasks[0]["predictions"][0]["result"][0]["value"]["choices"] == [found["listed"][0]["suggested"]]
    assert tasks[0]["data"]["why"] == f"given: {found['listed'][0]['given']}"
    assert '<Choice value="fine"/>' in (folder / "labelling.xml").read_text()
    # Blocks are nothing to it, and the report changes no row.
    other = plan(settings(tiny_base, source, label_noise=wanted, leakage="off", rows_per_shard=200))
    assert build(other)["label_noise"] == manifest["label_noise"]
    plain = build(plan(settings(tiny_base, source, leakage="off")))
    assert "label_noise" not in plain
    assert {s: c["rows"] for s, c in plain["splits"].items()} == {
        s: c["rows"] for s, c in manifest["splits"].items()
    }
    tell(planned, manifest)
    said = capsys.readouterr().out
    assert (
        f"label noise  label: of {found['rows']:,} training rows an estimated {found['share']:.1%} have"
        in said
    )
    assert f"for people: {folder}, tasks" in said
