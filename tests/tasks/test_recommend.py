"""The recommend task: windows, loss, draws, a model directory's round trip."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lib.artifacts import DatasetRef, TaskFile
from lib.errors import ConfigError, ModelError
from lib.evaluation import rankings, rankings_report
from lib.evaluation.classification import Subject
from lib.recommender import index, ranks
from lib.recommender.predictor import ENCODER, WEIGHTS, History, Predictor
from lib.settings import DataSettings, ServingSettings, Settings
from lib.tasks import recommend
from tests.recommending import ITEMS, dataset_of, item_rows, sequences, settings_for, walked

ROWS = [([3, 1, 4, 1, 5, 9, 2, 6], 7), ([5, 3], 1), ([8, 9, 7, 9, 3], 2), ([7], 0)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, r"data\.items is missing"),
        (
            {"items": {"source": "x"}, "interactions": {"least_value": 4}},
            r"least_value needs data\.columns\.value",
        ),
        (
            {"items": {"source": "x"}, "interactions": {"weights": {"buy": 2}}},
            r"weights needs data\.columns\.event",
        ),
    ],
)
def test_data_that_cannot_be_recommended_from_is_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recommend.columns(DataSettings.model_validate({"source": "x", **data}))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5), st.integers(2, 12)
)
def test_windows_ask_each_once_and_know_enough_before_it(rows: list[tuple[int, int]], history: int) -> None:
    lengths = np.array([length for length, _ in rows])
    asked = np.array([min(start, length) for length, start in rows])
    found: list[list[int]] = [[] for _ in rows]
    for row, start, size, first in zip(*recommend.windows(lengths, asked, history), strict=True):
        assert size <= history
        assert 0 <= start <= start + size <= lengths[row]
        for place in range(first, size):
            assert place >= history // 2 or start == 0
            found[row].append(int(start + place))
    for places, length, start in zip(found, lengths, asked, strict=True):
        assert sorted(places) == list(range(start, length))


def made(base: Path, seen: int | list[int] = 5, **recommender: Any) -> tuple[Settings, DatasetRef]:
    settings = settings_for(base, **recommender)
    return settings, dataset_of(
        item_rows(base, seen=seen), {"train": sequences(ROWS), "validation": sequences(ROWS)}
    )


def test_loss_is_the_weighted_choice_among_all_and_batches_add_up(storage: Path, tiny_base: Path) -> None:
    settings, ref = made(tiny_base, id_dropout=0.0, item_dropout=0.0, user_dropout=0.0)
    model, rows = recommend.build(tiny_base, settings, ref), sequences(ROWS)
    total, outputs = recommend.loss(model, recommend.collate(rows, 0), settings, {})
    assert outputs == {}
    parts = [recommend.loss(model, recommend.collate(rows.slice(i, 1), 0), settings, {})[0] for i in range(4)]
    assert total.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-5)

    expected, weights = 0.0, 0.0
    for row in rows.to_pylist():
        for place in range(len(row["items"]) - row["targets"], len(row["items"])):
            known = rows.slice(int(row["id"], 16), 1)
            batch = recommend.collate(known, 0)
            users, items, bias = model(
                **{name: batch[name][:, :place] for name in ("items", "gaps", "events")},
                **{name: batch[name] for name in ("user_categories", "user_starts", "user_numbers")},
            )
            chosen = torch.log_softmax(users[0, -1] @ items.T + bias, 0)[row["items"][place]]
            expected -= chosen.item() * row["weights"][place]
            weights += row["weights"][place]
    assert total.item() == pytest.approx(expected, rel=1e-4)
    assert recommend.weight(rows, settings, {}) == pytest.approx(weights)
    with torch.no_grad():
        whole, _ = recommend.loss(model, recommend.collate(rows, 0), settings, {})
    assert float(whole) == pytest.approx(total.item(), rel=1e-5)


def test_training_learns_from_the_latest_of_a_long_history(storage: Path, tiny_base: Path) -> None:
    settings, ref = made(tiny_base, history=4, id_dropout=0.0, item_dropout=0.0, user_dropout=0.0)
    model = recommend.build(tiny_base, settings, ref).eval()
    rows = sequences([(list(range(12)), 11)])
    assert recommend.weight(rows, settings, {}) == pytest.approx(sum(rows["weights"][0].as_py()[-4:]))
    loss, _ = recommend.loss(model, recommend.collate(rows, 0), settings, {})
    # Each of the four knows at least two before it: the first of them is the eighth.
    row = sequences([(list(range(12))[2:], 9)], seed=0)
    for name in ("times", "events", "weights"):
        values = rows[name][0].as_py()[2:]
        row = row.set_column(row.column_names.index(name), name, pa.array([values], row[name].type))
    same, _ = recommend.loss(model, recommend.collate(row, 0), settings, {})
    assert float(loss.detach()) == pytest.approx(float(same.detach()), rel=1e-5)
    with torch.no_grad():
        whole, outputs = recommend.loss(model, recommend.collate(rows, 0), settings, {})
    assert len(outputs["own"]) == 11
    assert float(whole) > float(loss.detach())


def test_items_that_nobody_took_are_no_choice_while_it_learns(storage: Path, tiny_base: Path) -> None:
    seen = [5] * (ITEMS - 4) + [0] * 4
    settings, ref = made(tiny_base, seen=seen, id_dropout=0.0)
    model = recommend.build(tiny_base, settings, ref)
    loss, _ = recommend.loss(model, recommend.collate(sequences(ROWS), 0), settings, {})
    loss.backward()
    assert not model.id.weight.grad[-4:].any()
    assert not model.id_bias.weight.grad[-4:].any()
    assert model.id.weight.grad[:-4].any(-1).all()


def test_ranks_leave_out_what_was_had(storage: Path, tiny_base: Path) -> None:
    settings, ref = made(tiny_base)
    model, rows = recommend.build(tiny_base, settings, ref).eval(), sequences(ROWS)
    batch = recommend.collate(rows, 0)
    with torch.no_grad():
        _, outputs = recommend.loss(model, batch, settings, {})
    found = []
    for number, row in enumerate(rows.to_pylist()):
        one = recommend.collate(rows.slice(number, 1), 0)
        for place in range(len(row["items"]) - row["targets"], len(row["items"])):
            with torch.no_grad():
                users, items, bias = model(
                    **{name: one[name][:, :place] for name in ("items", "gaps", "events")},
                    **{name: one[name] for name in ("user_categories", "user_starts", "user_numbers")},
                )
            scores = (users[0, -1] @ items.T + bias).numpy()
            found.append(ranks.rank(scores, row["items"][place], np.array(row["items"][:place])))
    assert ranks.ranked(outputs, 0.0).tolist() == pytest.approx(found)
    figures = recommend.metrics(outputs)
    assert figures.pop("new_bias") == 0  # there is no new item
    assert figures == ranks.figures(np.array(found))


def test_drawn_items_hold_the_labels_and_are_corrected_by_how_likely_they_were(
    storage: Path, tiny_base: Path
) -> None:
    seen = [100, 50, *[2] * (ITEMS - 3), 0]
    settings, ref = made(tiny_base, seen=seen, sampled=6)
    model = recommend.build(tiny_base, settings, ref)
    torch.manual_seed(0)
    labels = torch.tensor([4, 4, 9])
    times, corrections = np.zeros(ITEMS), np.zeros(ITEMS)
    rounds = 3000
    for _ in range(rounds):
        # The labels of a batch are drawn too: by how often items are turned to.
        drawn = torch.multinomial(model.shares, len(labels), replacement=True)
        wanted, correction = recommend.draw(model, drawn, 6)
        assert torch.isin(drawn, wanted).all()
        assert (wanted[1:] > wanted[:-1]).all()
        times[wanted.numpy()] += 1
        corrections[wanted.numpy()] = correction.numpy()
    assert times[-1] == 0
    measured = times[:-1] / rounds
    assert np.exp(corrections[:-1]) == pytest.approx(measured, abs=0.03)
    loss, _ = recommend.loss(model, recommend.collate(sequences(ROWS), 0), settings, {})
    loss.backward()
    assert torch.isfinite(loss)


def export(base: Path, folder: Path, **recommender: Any) -> tuple[Any, Predictor]:
    settings, ref = made(base, seen=[0, *[5] * (ITEMS - 1)], **recommender)
    model = recommend.build(base, settings, ref).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    folder.mkdir()
    recommend.save(model, base, TaskFile("recommend", [], 16, str(base), ref.fingerprint), folder)
    return model, recommend.load(folder, settings.serving)


@pytest.mark.parametrize("text", ["none", "tuned"])
def test_a_model_directory_answers_as_the_model_did(
    storage: Path, tiny_base: Path, tmp_path: Path, text: str
) -> None:
    model, predictor = export(tiny_base, tmp_path / "model", text=text)
    rows = sequences(ROWS)
    batch = recommend.collate(rows, 0)
    with torch.no_grad():
        users, vectors, bias = model(
            **{
                name: batch[name]
                for name in ("items", "gaps", "events", "user_categories", "user_starts", "user_numbers")
            }
        )
    histories = [
        History(
            np.array(row["items"]),
            np.array(row["times"]),
            np.array(row["events"], np.int64),
            np.array(row["user_categories"], np.int64),
            np.array(row["user_numbers"], np.float32),
        )
        for row in rows.to_pylist()
    ]
    last = users[torch.arange(4), batch["lengths"] - 1]
    found = predictor.users(histories)
    np.testing.assert_allclose(found, last.numpy(), atol=1e-5)
    np.testing.assert_allclose(predictor.scores(found), (last @ vectors.T + bias).numpy(), atol=1e-4)
    assert predictor.rows["item"].to_pylist() == [f"film-{i}" for i in range(ITEMS)]


def test_a_ranker_is_fitted_or_taken(storage: Path, tiny_base: Path, tmp_path: Path) -> None:
    settings = settings_for(tiny_base)
    ref = dataset_of(item_rows(tiny_base), walked(80))
    info = TaskFile("recommend", [], 16, str(tiny_base), ref.fingerprint)
    model = recommend.build(tiny_base, settings, ref)
    (tmp_path / "one").mkdir()
    recommend.save(model, tiny_base, info, tmp_path / "one")
    first = recommend.load(tmp_path / "one", settings.serving)
    assert first.ranker is not None
    # Who goes from one item to the next tells more than weights that learned nothing.
    left_out, alone = (first.ranker.measured[name]["ndcg_10"] for name in ("left_out", "retrieval"))
    assert left_out > alone + 0.3
    taking = settings_for(tiny_base, ranker_from=str(tmp_path / "one"))
    (tmp_path / "two").mkdir()
    recommend.save(recommend.build(tiny_base, taking, ref), tiny_base, info, tmp_path / "two")
    assert recommend.load(tmp_path / "two", settings.serving).ranker == first.ranker
    (tmp_path / "one" / "ranker.json").unlink()
    with pytest.raises(ModelError, match=r"ranker_from: .*one has no ranker\.json"):
        recommend.build(tiny_base, taking, ref)
    changed = dataclasses.replace(first.ranker, names=["score"])
    changed.write(tmp_path / "two")
    with pytest.raises(ModelError, match="is of the features score and not score, transitions"):
        recommend.load(tmp_path / "two", settings.serving)
    values = settings.model_dump(mode="json")
    values["data"]["interactions"]["refit"] = True
    with pytest.raises(ValidationError, match="refit: validation teaches no ranker"):
        Settings.model_validate(values)


def test_a_large_catalogue_gets_an_index_and_the_report_tells_of_it(
    storage: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = walked(80)
    ref = dataset_of(item_rows(tiny_base), splits | {"test": splits["validation"]})
    info = TaskFile("recommend", [], 16, str(tiny_base), ref.fingerprint)
    subject = Subject("films", "run", "recommend", ref.fingerprint, [])
    told = {}
    for most in (ITEMS - 1, ITEMS):
        settings = settings_for(tiny_base, exact_items=most, ranker="none")
        folder = tmp_path / str(most)
        folder.mkdir()
        recommend.save(recommend.build(tiny_base, settings, ref), tiny_base, info, folder)
        report = rankings.measure(subject, str(folder), ref, settings).report
        told[most] = index.told(str(folder)), report.methods.get("index"), capsys.readouterr().out
        assert ("served through an index" in rankings_report.render(report)) == (most < ITEMS)
    measured, said, printed = told[ITEMS - 1]
    assert measured is not None
    assert (measured.items, measured.recall, measured.recall_alike) == (ITEMS, 1.0, 1.0)
    assert said == str(measured)
    assert said in printed
    assert told[ITEMS][:2] == (None, None)
    nobody = dataset_of(
        item_rows(tiny_base), {**splits, "validation": splits["validation"].slice(0, 0)}, "f" * 16
    )
    (tmp_path / "nobody").mkdir()
    settings = settings_for(tiny_base, exact_items=0, ranker="none")
    recommend.save(recommend.build(tiny_base, settings, nobody), tiny_base, info, tmp_path / "nobody")
    assert index.told(str(tmp_path / "nobody")) is None
    assert "no index: nobody in validation has a history" in capsys.readouterr().out


def test_new_items_have_the_bias_that_validation_told(storage: Path, tiny_base: Path, tmp_path: Path) -> None:
    _, predictor = export(tiny_base, tmp_path / "model")
    info = TaskFile.read(tmp_path / "model")
    dataclasses.replace(info, new_bias=-1.5).write(tmp_path / "model")
    changed = recommend.load(tmp_path / "model", ServingSettings())
    np.testing.assert_allclose(changed.bias[0], predictor.bias[0] - 1.5, atol=1e-5)  # training never saw it
    np.testing.assert_array_equal(changed.bias[1:], predictor.bias[1:])
    rows = item_rows(tiny_base).slice(3, 2)
    np.testing.assert_allclose(changed.new_items(rows)[1], predictor.new_items(rows)[1] - 1.5, atol=1e-5)


def test_another_catalogue_keeps_what_is_known_and_reads_what_is_new(
    storage: Path, tiny_base: Path, tmp_path: Path
) -> None:
    _, predictor = export(tiny_base, tmp_path / "model", text="tuned")
    rows = item_rows(tiny_base)
    changed = rows.set_column(0, "item", pa.array(["fresh", *rows["item"].to_pylist()[:0:-1]]))
    other = predictor.over(changed)
    # Reversed but for the first; that one says what film-0 says, which training never saw either.
    np.testing.assert_array_equal(other.vectors[1:], predictor.vectors[:0:-1])
    np.testing.assert_allclose(other.vectors[0], predictor.vectors[0], atol=1e-4)
    np.testing.assert_allclose(other.bias[0], predictor.bias[0], atol=1e-4)


def test_a_directory_that_is_no_recommender_is_refused(
    storage: Path, tiny_base: Path, tmp_path: Path
) -> None:
    export(tiny_base, tmp_path / "model")
    serving = ServingSettings()
    (tmp_path / "model" / "items-00000.parquet").rename(tmp_path / "items")
    with pytest.raises(ModelError, match=r"holds no items-\*\.parquet"):
        recommend.load(tmp_path / "model", serving)
    (tmp_path / "items").rename(tmp_path / "model" / "items-00000.parquet")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model" / WEIGHTS)
    for change, said in (
        ({"out.weight": torch.zeros(3, 3)}, "does not fit its config.json: .*out.weight"),
        ({"other": torch.zeros(1)}, "does not fit its config.json: other"),
    ):
        save_file({**weights, **change}, tmp_path / "model" / WEIGHTS)
        with pytest.raises(ModelError, match=said):
            recommend.load(tmp_path / "model", serving)
    assert not (tmp_path / "model" / ENCODER).exists()  # of texts this one knows nothing
