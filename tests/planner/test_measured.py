"""The planner beside real DeepSpeed engines on two Ray Train workers: what they keep, send and write."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.planner import memory, timing
from lib.planner.architecture import llama
from lib.planner.memory import Layout
from tests.bench.memory import measure

# 5.5 M parameters, of which hardly any are padding or stay whole in ZeRO-3 (those below 1e5 elements do).
SHAPE = llama("small", 2, 384, 6, 6, 1536, 1024)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(0, "fp32", marks=pytest.mark.long),
        pytest.param(2, "bf16", marks=pytest.mark.long),
        (3, "bf16"),
    ],
)
def test_states_messages_and_checkpoints_are_as_planned(stage: int, precision: str, tmp_path: Path) -> None:
    layout = Layout(stage, 2, 2, precision=precision, tokens=32, sequence=32, gpu=False)
    measured = measure(SHAPE, layout, str(tmp_path))
    assert len(measured) == 2
    kept, _ = memory.states(SHAPE, layout)
    kept.pop("libraries")
    planned = sum(kept.values())
    if stage == 3:  # the bucket, and what is below the threshold of partitioning, which stays whole
        planned += layout.p * memory.sizes(SHAPE, layout).bucket
    for one in measured:
        assert one.between == pytest.approx(planned, rel=0.03)
        assert one.sent == pytest.approx(sum(timing.volume(SHAPE, layout).values()), rel=0.03)
    assert sum(m.checkpoint for m in measured) == pytest.approx(timing.checkpoint(SHAPE, layout), rel=0.03)
