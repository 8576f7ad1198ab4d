"""The learning rate's course."""

from __future__ import annotations

import pytest

from lib.settings import TrainingSettings
from lib.training.loop import learning_rate


@pytest.mark.parametrize(
    ("schedule", "progress", "share"),
    [
        ("linear", 0.0, 0.0),
        ("linear", 0.05, 0.5),
        ("linear", 0.1, 1.0),
        ("linear", 0.55, 0.5),
        ("linear", 1.0, 0.0),
        ("cosine", 0.55, 0.5),
        ("cosine", 1.0, 0.0),
        ("constant", 0.05, 0.5),
        ("constant", 1.0, 1.0),
    ],
)
def test_learning_rate(schedule: str, progress: float, share: float) -> None:
    training = TrainingSettings.model_validate({"learning_rate": 2e-4, "warmup": 0.1, "schedule": schedule})
    assert learning_rate(training, progress) == pytest.approx(share * 2e-4, abs=1e-12)


def test_without_warmup_it_starts_at_the_top() -> None:
    assert learning_rate(TrainingSettings(learning_rate=1e-3, warmup=0), 0.0) == pytest.approx(1e-3)
