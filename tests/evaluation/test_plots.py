"""The figures: that they are PNG images which show what they are given."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.image import imread

from lib.evaluation import metrics, plots


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return imread(io.BytesIO(png))


@pytest.mark.parametrize("classes", [2, 3, 30])
def test_confusion_plot_for_few_and_many_classes(classes):
    image = pixels(
        plots.confusion_plot(np.eye(classes, dtype=int) * 9, [f"class {i}" for i in range(classes)], "t")
    )
    assert 300 < image.shape[0] < 2500


def test_confusion_plot_changes_with_the_counts():
    names = ["a", "b"]
    first = plots.confusion_plot(np.array([[9, 1], [2, 8]]), names, "t")
    assert first == plots.confusion_plot(np.array([[9, 1], [2, 8]]), names, "t")
    assert first != plots.confusion_plot(np.array([[1, 9], [8, 2]]), names, "t")


def test_confusion_plot_of_a_class_without_rows():
    assert pixels(plots.confusion_plot(np.array([[5, 0], [0, 0]]), ["a", "b"], "t")).std() > 0.05


def red_share(png: bytes) -> float:
    red, green, blue = (pixels(png)[..., i] for i in range(3))
    return float(((red > 0.7) & (green < 0.4) & (blue < 0.5)).mean())


def test_reliability_plot_shows_the_gap_in_red():
    labels = np.array([0] * 5 + [1] * 5)
    sure = np.tile([0.95, 0.05], (10, 1))  # right half of the time, but 95% sure
    honest = np.tile([1.0, 0.0], (5, 1))
    wrong = metrics.calibration(labels, sure)
    right = metrics.calibration(labels[:5], honest)
    assert red_share(plots.reliability_plot(wrong, 0.45, "t")) > 0.002
    assert red_share(plots.reliability_plot(right, 0.0, "t")) == 0


def test_comparison_plot_without_intervals():
    assert pixels(plots.comparison_plot({"ours": 0.7, "majority": 0.3}, {}, "t")).std() > 0.05
