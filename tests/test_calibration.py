"""Temperature scaling: it finds the scale that scores were made with, and makes them mean what they say."""

from __future__ import annotations

import numpy as np
import pytest

from lib.calibration import HIGHEST, LOWEST, fit_temperature
from lib.encoders import softmax
from lib.evaluation.metrics import calibration, expected_calibration_error


def drawn(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [rows, 4], and classes drawn with exactly the probabilities that they say."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (rows, 4))
    labels = (softmax(logits).cumsum(-1) > random.random((rows, 1))).argmax(-1)
    return logits, labels


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_it_finds_the_scale(scale: float) -> None:
    logits, labels = drawn(20_000, 0)
    assert fit_temperature((logits * scale).astype(np.float32), labels) == pytest.approx(scale, rel=0.05)


def test_what_is_fitted_on_one_split_calibrates_another() -> None:
    fitted, held_out = drawn(4000, 1), drawn(4000, 2)
    temperature = fit_temperature(fitted[0] * 3, fitted[1])

    def error(logits: np.ndarray) -> float:
        return expected_calibration_error(calibration(held_out[1], softmax(logits)))

    assert error(held_out[0] * 3 / temperature) < 0.03 < 0.1 < error(held_out[0] * 3)


def test_a_split_without_a_mistake_or_without_rows() -> None:
    logits = np.eye(3)
    assert LOWEST * 0.99 < fit_temperature(logits, np.arange(3)) < LOWEST * 1.1
    assert HIGHEST * 0.9 < fit_temperature(logits * 50, np.array([1, 2, 0])) < HIGHEST * 1.01
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, np.int64)) == 1.0


def test_logits_that_are_large_stay_finite() -> None:
    logits, labels = drawn(500, 3)
    assert np.isfinite(fit_temperature(logits * 1e4, labels))
