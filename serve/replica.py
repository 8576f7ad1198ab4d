"""What every application that follows a registered model shares: the replica's life, and its size by `serving`."""

# Without `from __future__ import annotations`: Ray Serve reads the annotations of what inherits this.

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ray import serve as ray_serve

from lib.settings import ServingSettings
from serve.following import Following
from serve.http import Ready


class Engine(Protocol):
    """A loaded model version."""

    @property
    def name(self) -> str:
        """Engine and precision."""

    def close(self) -> None:
        """Called once, when no request uses the model any more."""


E = TypeVar("E", bound=Engine)


class Replica(Generic[E]):
    """One model version at a time, swapped while it serves."""

    def __init__(self, serving: ServingSettings, load: Callable[[Path], E]) -> None:
        self.serving = serving
        self.models: Following[E] = Following(load)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await self.models.follow(user_config["model"])

    def ready(self) -> Ready:
        loaded = self.models.current
        return Ready(
            model=loaded.ref.name,
            version=loaded.ref.version,
            engine=loaded.model.name,
            failed=self.models.failed,
        )


def bind(deployment: Any, serving: ServingSettings) -> ray_serve.Application:
    """The deployment as an application of the size that `serving` asks for."""
    if serving.min_replicas == serving.max_replicas:
        size: dict[str, Any] = {"num_replicas": serving.max_replicas}
    else:
        size = {
            "autoscaling_config": {
                "min_replicas": serving.min_replicas,
                "max_replicas": serving.max_replicas,
                "target_ongoing_requests": serving.target_ongoing_requests,
            }
        }
    return deployment.options(
        **size,
        max_ongoing_requests=serving.max_ongoing_requests,
        max_queued_requests=serving.max_queued_requests,
        ray_actor_options={"num_cpus": serving.cpus_per_replica, "num_gpus": serving.gpus_per_replica},
    ).bind(serving)
