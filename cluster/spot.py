"""Nodes from a cloud's spare capacity, and at the full price where it has none.

Ray's autoscaler knows no such fallback. A node type whose launch the cloud refuses is asked for again, and again refused:
the second version, which `ray up` takes, marks it as unavailable only when a machine that it was given runs no Ray within
an hour (CloudResourceMonitor), and the first version writes down that it was refused without ever reading it. So the
provider itself asks a second time. `provider: {type: external, module: cluster.spot.Amazon}` in a cluster's file takes it;
everything else is Ray's own provider of that cloud. A node at the full price stays until it is idle.
"""

from __future__ import annotations

import logging
from typing import Any

from botocore.exceptions import ClientError
from googleapiclient.errors import HttpError
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

logger = logging.getLogger(__name__)

# What is said when there is no spare capacity, or no more of it for this account. Other errors are the configuration's.
AMAZON = {
    "InsufficientInstanceCapacity",
    "InsufficientHostCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "Unsupported",  # this instance type is not offered as spot in any of the zones
}
GOOGLE = ("ZONE_RESOURCE_POOL_EXHAUSTED", "STOCKOUT", "PREEMPTIBLE", "QUOTA_EXCEEDED", "quotaExceeded")


class Amazon(AWSNodeProvider):
    """Ray's provider has tried every subnet, so every zone, by the time it raises."""

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        made: dict[str, Any]
        try:
            made = super().create_node(node_config, tags, count)
        except (NodeLaunchException, ClientError) as error:
            code = (
                error.category if isinstance(error, NodeLaunchException) else error.response["Error"]["Code"]
            )
            if "InstanceMarketOptions" not in node_config or code not in AMAZON:
                raise
            logger.warning(
                "no spare capacity (%s): %d of %s on demand", code, count, node_config["InstanceType"]
            )
            full = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
            made = super().create_node(full, tags, count)
        return made


class Google(GCPNodeProvider):
    """One machine at a time: of several that are asked for together, Ray's provider does not say which were given."""

    def create_node(self, base_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for _ in range(count):
            made |= self._create_one(base_config, tags)
        return made

    def _create_one(self, base_config: dict[str, Any], tags: dict[str, str]) -> dict[str, Any]:
        made: dict[str, Any]
        try:
            made = super().create_node(base_config, tags, 1)
        # A failed operation is a bare Exception, whose argument is what the cloud said.
        except Exception as error:
            spare = base_config.get("scheduling", {}).get("provisioningModel") == "SPOT"
            if not spare or not any(code in said(error) for code in GOOGLE):
                raise
            logger.warning("no spare capacity (%s): one of %s on demand", error, base_config["machineType"])
            scheduling = {"onHostMaintenance": "TERMINATE"}  # machines with GPUs cannot be moved
            made = super().create_node({**base_config, "scheduling": scheduling}, tags, 1)
        return made


def said(error: Exception) -> str:
    """What the cloud says of a request that it refused, or of an operation that failed."""
    return str(error.content) if isinstance(error, HttpError) else str(error)
