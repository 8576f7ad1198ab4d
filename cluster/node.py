"""What a node of a cluster has in its environment, whoever starts it: cluster.local, the image, `ray up`.

eval "$(python -m cluster.node)"        # in the shell that then calls `ray start`
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from cluster import ingress
from lib import storage


def environment() -> dict[str, str]:
    """Where files and rows are kept (lib/tracking.py) is not among it: that is the cluster's, not the node's."""
    scripts = str(Path(sys.executable).parent)
    return {
        "RAY_AUTH_MODE": "token",
        **ingress.environment(),
        "VLLM_LOGGING_LEVEL": "ERROR",
        # `serve deploy` imports serve.sentiment on the head, outside any job's working directory.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(storage.PROJECT), os.environ.get("PYTHONPATH")])),
        # A job's `python` is the first on the head's path.
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
        # A worker's process group dies with it: a killed replica leaves no vLLM engine that holds its memory.
        "RAY_process_group_cleanup_enabled": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # MLflow's page only shows what jobs wrote: its own workers would be ten processes more.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "DO_NOT_TRACK": "true",
    }


def main() -> None:
    for key, value in environment().items():
        print(f"export {key}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
