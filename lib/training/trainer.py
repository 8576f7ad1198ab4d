"""Ray's TorchTrainer with our `cleaner` in the place of its own."""

from __future__ import annotations

from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback

from lib.training.cleaner import Guard


class Trainer(TorchTrainer):
    """Ray's, with this cleaner in the place of its own."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [Cleaner() if isinstance(c, PlacementGroupCleanerCallback) else c for c in callbacks]


class Cleaner(ControllerCallback):
    """In the controller: starts a `Guard` that outlives it, and ends it when the run ends in order."""

    def __init__(self) -> None:
        self.guard: Any = None

    def after_controller_start(self, train_run_context: Any) -> None:
        controller = ray.get_runtime_context().get_actor_id()
        self.guard = (
            ray.remote(Guard)
            .options(
                num_cpus=0,
                lifetime="detached",
                resources={HEAD_NODE_RESOURCE_NAME: 0.001},
                # Of a trial's own placement group it would otherwise become a part.
                scheduling_strategy="DEFAULT",
            )
            .remote()
        )
        self.guard.watch.remote(controller)

    async def before_controller_shutdown(self) -> None:
        self._dismiss()

    def before_controller_abort(self) -> None:
        self._dismiss()

    def _dismiss(self) -> None:
        if self.guard is not None:
            ray.kill(self.guard)
            self.guard = None
