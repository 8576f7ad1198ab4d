"""From probabilities to the report, and the report as JSON, HTML and text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import f1_score

from lib.artifacts import EvalReport
from lib.errors import StorageError
from lib.evaluation import report as files
from lib.evaluation.classification import in_order, lead
from lib.evaluation.text import render, table
from tests.trained import LABELS, make_measured


@pytest.fixture(scope="module")
def measured():
    return make_measured("1234", "0123456789abcdef", right=0.8)


def test_headline_slices_and_confusion_agree(measured):
    report = measured.report
    assert report.metrics["accuracy"] == pytest.approx(0.8)
    assert report.baselines["tfidf"]["accuracy"] == pytest.approx(0.5)
    assert np.trace(report.confusion) == 320
    assert sum(part["rows"] for part in report.slices["length"].values()) == report.rows == 400
    assert sum(one["rows"] for one in report.per_class.values()) == 400


def test_predictions_reproduce_the_headline(measured):
    rows = measured.predictions
    score = f1_score(rows["label"].to_numpy(), rows["predicted"].to_numpy(), average="macro")
    assert measured.report.metrics["macro_f1"] == pytest.approx(score)
    assert np.sum(rows["probabilities"][0].as_py()) == pytest.approx(1)


def test_intervals_enclose_the_values_and_the_lead_excludes_zero(measured):
    report = measured.report
    low, high = report.intervals["model"]
    assert low < report.metrics["macro_f1"] < high
    value, low, high = report.differences["majority"]
    assert 0 < low < value < high


def test_mistakes_are_wrong_and_the_surest_first(measured):
    mistakes = measured.report.mistakes
    assert len(mistakes) == 20
    assert all(m["label"] != m["predicted"] for m in mistakes)
    confidences = [m["confidence"] for m in mistakes]
    assert confidences == sorted(confidences, reverse=True)


def test_labels_in_another_order_are_put_right():
    probabilities = np.array([[0.7, 0.2, 0.1]])
    ordered = in_order(probabilities, ["positive", "negative", "neutral"], LABELS)
    assert ordered.tolist() == [pytest.approx([0.2, 0.1, 0.7])]


def test_labels_that_one_side_lacks():
    ordered = in_order(np.array([[0.5, 0.3, 0.2], [0, 0, 1.0]]), ["negative", "positive", "mixed"], LABELS)
    assert ordered[0].tolist() == pytest.approx([0.625, 0, 0.375])
    assert ordered[1].tolist() == pytest.approx([1 / 3] * 3)  # all of it on a label that is not asked for


def test_lead_over_another_model_on_the_same_rows(measured):
    better = make_measured("5678", "0123456789abcdef", right=0.9)
    ahead = lead(better, measured, 200)
    assert ahead.macro_f1 == pytest.approx(
        better.report.metrics["macro_f1"] - measured.report.metrics["macro_f1"]
    )
    assert 0 < ahead.interval[0] < ahead.macro_f1 < ahead.interval[1]
    assert (ahead.only_ours, ahead.only_theirs) == (40, 0)
    assert ahead.p is not None
    assert ahead.p < 0.05
    assert ahead.mcnemar_p == pytest.approx(2 * 0.5**40)
    assert "p 0.0" in str(ahead)
    without = lead(better, measured, 0)
    assert (without.interval, without.p) == ([], None)
    assert lead(measured, measured, 50).p == 1


def test_lead_on_different_rows_is_refused(measured):
    fewer = dataclasses.replace(measured, predictions=measured.predictions.slice(0, 10))
    with pytest.raises(ValueError, match="different rows"):
        lead(measured, fewer, 10)


def test_written_and_read_again(measured, tmp_path):
    files.write(measured, tmp_path)
    again = files.read(str(tmp_path))
    assert again.report == measured.report
    assert again.predictions.equals(measured.predictions)
    for figure in ("confusion.png", "reliability.png", "baselines.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_report_of_an_unknown_format_is_one_line(measured, tmp_path):
    dataclasses.replace(measured.report, format=2).write(tmp_path)
    with pytest.raises(StorageError, match=r"run python -m jobs.evaluate again"):
        EvalReport.read(str(tmp_path))


def test_page_is_self_contained_and_shows_the_figures(measured):
    page = files.page(measured.report, files.figures(measured.report))
    assert page.count("data:image/png;base64,") == 3
    assert "http://" not in page
    assert "https://" not in page
    assert f"{measured.report.metrics['macro_f1']:.3f}" in page
    assert "95% interval" in page


def test_page_shows_what_users_wrote_and_never_runs_it(measured):
    evil = "<script>alert(1)</script>"
    mistake = {**measured.report.mistakes[0], "text": evil}
    page = files.page(dataclasses.replace(measured.report, mistakes=[mistake]), {})
    assert evil not in page
    assert "&lt;script&gt;" in page


def test_text_lines_up():
    lines = table(["name", "rows"], [["a", "1"], ["longer", "1,000"]]).splitlines()
    assert lines == ["name     rows", "-------------", "a           1", "longer  1,000"]


def test_text_names_classifiers_classes_and_slices(measured):
    text = render(measured.report)
    for word in ("model", "tfidf", "majority", *LABELS, "length", "400 test rows"):
        assert word in text


def test_text_without_a_bootstrap(measured):
    text = render(dataclasses.replace(measured.report, intervals={}, differences={}))
    assert "not drawn" in text
    assert "macro-F1 above" not in text
