"""A ZeRO-3 run that spans two Ray nodes, one of which is killed: it goes on, on another node or on fewer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from lib import tracking
from lib.settings import Settings
from lib.training.fit import Fit, fit
from tests.trained import make_dataset
from tests.training.nodes import WORKER_CPUS
from tests.training.test_resume import assert_one_curve, assert_same, settings_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FINGERPRINT = "0123456789abcdef"


def on_nodes(settings: Settings, kind: str, folder: Path) -> dict[str, Any]:
    file = folder / "settings.json"
    file.write_text(json.dumps(settings.model_dump(mode="json")))
    with tempfile.TemporaryDirectory(prefix="whorl-", dir="/tmp") as ray_folder:
        environment = {
            **os.environ,
            "RAY_TMPDIR": ray_folder,
            "OMP_NUM_THREADS": "1",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.training.nodes", str(file), FINGERPRINT, kind],
            env=environment,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_killed_node_is_replaced_by_another(
    ray_cluster: None, storage: Path, tiny_base: Path, tmp_path: Path
) -> None:
    settings = settings_for(tiny_base, zero_stage=3, cpus_per_worker=WORKER_CPUS)
    dataset = make_dataset(settings, FINGERPRINT, rows=480)
    done = on_nodes(settings, "replace", tmp_path)
    assert done["before"] == [1, 1]
    assert done["after"] == [1, 1]
    assert len(done["summary"]["peak_memory_gib"]) == 2
    (at,) = done["summary"]["resumed"]
    assert at > 0
    # On one node and without a kill it comes to the same, bit for bit.
    with tracking.start_run("finetune", settings) as run:
        whole = fit(settings, dataset, run)
    assert_same(Fit(done["model"], done["summary"]), whole)


def test_an_elastic_run_goes_on_with_the_node_that_is_left(
    storage: Path, tiny_base: Path, tmp_path: Path
) -> None:
    settings = settings_for(tiny_base, zero_stage=3, cpus_per_worker=WORKER_CPUS, workers=[1, 2])
    make_dataset(settings, FINGERPRINT, rows=480)
    done = on_nodes(settings, "shrink", tmp_path)
    assert done["before"] == [1, 1]
    summary = done["summary"]
    assert len(summary["peak_memory_gib"]) == 1
    (at,) = summary["resumed"]
    assert 0 < at < summary["steps"]
    assert [v["epoch"] for v in summary["validations"]] == list(range(1, 7))
    assert summary["rows"] == 6 * 480
    assert_one_curve(tracking.find_run(settings, "finetune", done["run"]), summary)
