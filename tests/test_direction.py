"""Which way metrics count."""

from __future__ import annotations

import pytest

from lib.direction import gain, lower_is_better
from lib.evaluation.chat import COMPARED
from lib.evaluation.metrics import DECIDING


def test_losses_count_down_and_scores_up():
    assert gain("loss", 1.0, than=1.5) == 0.5
    assert gain("perplexity", 12.0, than=10.0) == -2
    assert gain("macro_f1", 0.75, than=0.5) == 0.25
    assert not any(lower_is_better(metric) for metric in DECIDING)
    assert {m for m in COMPARED if lower_is_better(m)} == {"perplexity", "bits_per_byte", "repetition", "cut"}


@pytest.mark.parametrize(("metric", "above"), [("macro_f1", True), ("perplexity", False)])
def test_the_gate_goes_by_it(metric, above):
    from lib.registry import Condition

    assert Condition("x", 2.0, 1.0, metric).holds is above
    assert Condition("x", 1.0, 2.0, metric).holds is not above
    assert not Condition("x", 1.0, 1.0, metric).holds
