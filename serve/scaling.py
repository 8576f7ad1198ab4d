"""How many replicas a deployment has, by `serving`: a fixed number, or as many as the load asks for.

The load is ongoing and waiting requests; for a chat engine with `serving.chat.target_tokens` it is the tokens that its
sequences hold, because one long conversation is as much work as many short ones.
"""

# Ray Serve pickles this module by value and runs its policy in the controller: no import of ours at run time.

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

    from lib.settings import ServingSettings

UNBOUNDED = 1_000_000
"""`max_ongoing_requests` of a deployment that bounds requests by itself."""
TOKENS = "tokens_in_flight"
"""What an engine reports: tokens of the prompts and answers it is at work on."""


class ByTokens:
    """Ray Serve's autoscaling policy (`AutoscalingPolicy.policy_function`): `target` tokens in flight a replica."""

    def __init__(self, target: int) -> None:
        self._target = target

    def __call__(self, context: "AutoscalingContext") -> tuple[float, dict[str, Any]]:
        """Replicas that the load asks for; Ray Serve keeps delays and bounds."""
        reported = (context.aggregated_metrics or {}).get(TOKENS, {})
        tokens, running = sum(reported.values()), context.total_running_requests
        # What waits outside the engines has told no tokens yet: as many as what runs has on average.
        each = tokens / running if running else self._target
        return math.ceil((tokens + context.total_queued_requests * each) / self._target), {}


def size(serving: "ServingSettings", target_tokens: int | None = None) -> dict[str, Any]:
    """Options of a deployment."""
    options: dict[str, Any] = {"graceful_shutdown_timeout_s": serving.drain_timeout_s}
    if serving.min_replicas == serving.max_replicas:
        return options | {"num_replicas": serving.max_replicas}
    found: dict[str, Any] = {
        "min_replicas": serving.min_replicas,
        "max_replicas": serving.max_replicas,
        "target_ongoing_requests": serving.target_ongoing_requests,
        "upscale_delay_s": serving.upscale_delay_s,
        "downscale_delay_s": serving.downscale_delay_s,
        "look_back_period_s": serving.look_back_s,
    }
    if target_tokens is not None:
        found["policy"] = {
            "policy_function": "serve.scaling:ByTokens",
            "policy_kwargs": {"target": target_tokens},
        }
    return options | {"autoscaling_config": found}


def ingresses(serving: "ServingSettings") -> int:
    """Replicas of what stands before chat's engines: where one engine may go and another answers, one of them may too."""
    return min(max(serving.min_replicas, 1), 2)
