"""Nothing of a run outlives its controller: what frees the cluster's slots when a run is ended from outside.

Workers die with Ray Train's controller, but the placement group that holds their slots lives as long as the
job, and a search ends many runs in one job. Ray Train has a cleaner of its own for this. It finds out whether
the controller lives through the dashboard, which a local Ray has not, and on a machine with several clusters
it asks the one that was started last: it then warns every few seconds, frees nothing, or frees what a run of
the other cluster is using. This one asks the cluster that it is in (`trainer.Trainer` puts it in place).

Imports neither torch nor Ray Train: each run has such a process.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._private.state import actors, state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group
from ray.util.placement_group import PlacementGroup, remove_placement_group

INTERVAL_SECONDS = 1.0


class Guard:
    """An actor of its own, on the head node, that waits for a controller's end."""

    def watch(self, controller: str) -> None:
        """Free the placement groups of the actor `controller` once it is dead, and end."""
        while is_alive(controller):
            time.sleep(INTERVAL_SECONDS)
        for group in groups():
            if group.creator_actor_id.hex() == controller:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
        ray.actor.exit_actor()


def is_alive(actor: str) -> bool:
    """Whether an actor of this cluster, by its id in hex, is not dead."""
    found = actors(actor_id=actor)
    return bool(found) and found["State"] != "DEAD"


def groups() -> list[Any]:
    """Ray's records of the placement groups that hold slots of this cluster, or wait for them."""
    table = state._connect_and_get_accessor().get_placement_group_table()
    found = [Group.FromString(record) for record in table]
    return [group for group in found if group.state != Group.REMOVED]


def wait_until_freed(seconds: float = 30.0) -> bool:
    """Wait until this job holds no placement group; False when it still does after `seconds`."""
    job = ray.get_runtime_context().get_job_id()
    deadline = time.monotonic() + seconds
    while any(group.creator_job_id.hex() == job for group in groups()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
