"""Trials of new versions: sums from several replicas, one verdict."""

from __future__ import annotations

import pytest

from lib import canary
from lib.canary import Compared
from lib.settings import CanarySettings

LIMITS = CanarySettings(requests=10, max_disagreement=0.2, max_drift=0.1, max_latency_ratio=2.0)


def test_what_several_replicas_compared_is_summed_up(database) -> None:
    canary.begin("reviews", 3)
    canary.add("reviews", 3, Compared(4, 0, 8, 1, 0.5, 0.2, 0.1))
    canary.begin("reviews", 3)  # another replica, later
    canary.add("reviews", 3, Compared(2, 1, 2, 0, 0.25, 0.1, 0.1))
    found = canary.find("reviews", 3)
    assert found is not None
    assert found.passed is None
    assert vars(found.compared) == pytest.approx(vars(Compared(6, 1, 10, 1, 0.75, 0.3, 0.2)))
    assert canary.find("reviews", 4) is None
    assert canary.find("orders", 3) is None


def test_the_first_verdict_is_the_one(database) -> None:
    canary.begin("reviews", 3)
    assert canary.settle("reviews", 3, False, "too slow")
    assert not canary.settle("reviews", 3, True, "as good")
    found = canary.find("reviews", 3)
    assert found is not None
    assert (found.passed, found.why) == (False, "too slow")


@pytest.mark.parametrize(
    ("compared", "verdict"),
    [
        (Compared(9, 9, 0, 0, 0.0, 0.0, 0.0), None),
        (
            Compared(10, 0, 20, 4, 2.0, 2.0, 1.0),
            "errors 0, disagreement 0.2, drift 0.1, latency_ratio 2 over",
        ),
        (Compared(10, 1, 18, 0, 0.0, 1.0, 1.0), "errors above 0 (errors 0.1,"),
        (Compared(10, 0, 20, 5, 0.0, 1.0, 1.0), "disagreement above 0.2 (errors 0, disagreement 0.25,"),
        (Compared(10, 0, 20, 0, 2.2, 1.0, 1.0), "drift above 0.1 (errors 0, disagreement 0, drift 0.11,"),
        (Compared(10, 0, 20, 0, 0.0, 2.1, 1.0), "latency_ratio above 2 ("),
        (Compared(10, 10, 0, 0, 0.0, 0.0, 0.0), "errors above 0 (errors 1,"),
    ],
)
def test_a_version_passes_when_it_is_above_no_limit(compared: Compared, verdict: str | None) -> None:
    found = canary.judge(compared, LIMITS)
    if verdict is None:
        assert found is None
        return
    assert found is not None
    assert found[1].startswith(verdict)
    assert found[0] is ("above" not in verdict)
