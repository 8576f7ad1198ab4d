"""How many replicas there are to be."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve.scaling import TOKENS, size
from tests.serve.conftest import make_settings


def desired(tokens: list[float], requests: float, queued: float, target: int = 1000) -> float:
    """What the policy says, as the controller has it made and asks it."""
    serving = make_settings(min_replicas=0, max_replicas=8).serving
    config = AutoscalingConfig.model_validate(size(serving, target)["autoscaling_config"])
    engine = DeploymentID(name="Engine", app_name="support")
    given: dict[str, Any] = dict.fromkeys(
        name for name in AutoscalingContext.__init__.__annotations__ if name != "return"
    )
    given |= {
        "deployment_id": engine,
        "config": config,
        "total_num_requests": requests,
        "total_queued_requests": queued,
        "aggregated_metrics": {
            TOKENS: {ReplicaID(str(i), engine): float(count) for i, count in enumerate(tokens)}
        },
    }
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    replicas, state = policy(AutoscalingContext(**given))
    assert state == {}
    return replicas


@pytest.mark.parametrize(
    ("tokens", "requests", "queued", "replicas"),
    [
        ([], 0, 0, 0),
        ([0.0], 0, 0, 0),
        ([999.0], 1, 0, 1),
        ([1001.0], 1, 0, 2),
        # Ten short ones are less than a long one.
        ([500.0], 10, 0, 1),
        ([900.0, 900.0, 900.0], 3, 0, 3),
        # Four run with 250 tokens each, and as many wait.
        ([1000.0], 8, 4, 2),
        # Nothing runs yet, and two wait.
        ([], 2, 2, 2),
    ],
)
def test_a_replica_for_so_many_tokens(tokens: list[float], requests: int, queued: int, replicas: int) -> None:
    assert desired(tokens, requests, queued) == replicas


def test_a_fixed_number_is_not_scaled() -> None:
    fixed = make_settings(min_replicas=2, max_replicas=2, drain_timeout_s=9).serving
    assert size(fixed) == {"num_replicas": 2, "graceful_shutdown_timeout_s": 9}
    found = size(make_settings(max_replicas=3, downscale_delay_s=7).serving)["autoscaling_config"]
    assert (found["min_replicas"], found["max_replicas"], found["downscale_delay_s"]) == (1, 3, 7)
    assert "policy" not in found
