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
from lib.training.fit import Fit
from tests.trained import make_dataset
from tests.training.nodes import WORKER_CPUS
from tests.training.test_resume import assert_one_curve, assert_same, settings_for

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

ROWS, EPOCHS = 240, 2


@pytest.fixture(scope="module")
def places() -> Any:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("WHORL_STORAGE", f"{folder}/whorl")
        patch.setenv("WHORL_DATABASE", f"sqlite:///{folder}/whorl.db")
        yield Path(folder)


@pytest.fixture(scope="module")
def cases(places: Path, tiny_base: Path) -> dict[str, Settings]:
    def on_nodes(workers: Any) -> Settings:
        return settings_for(
            tiny_base, zero_stage=3, cpus_per_worker=WORKER_CPUS, workers=workers, epochs=EPOCHS
        )

    return {"nothing": on_nodes(2), "replace": on_nodes(2), "shrink": on_nodes([1, 2])}


@pytest.fixture(scope="module")
def results(places: Path, cases: dict[str, Settings]) -> dict[str, Any]:
    """What came of each case, on one cluster in a process of its own."""
    dataset = make_dataset(cases["nothing"], rows=ROWS).fingerprint
    values = {
        name: {"settings": settings.model_dump(mode="json"), "dataset": dataset, "happens": name}
        for name, settings in cases.items()
    }
    (places / "cases.json").write_text(json.dumps(values))
    with tempfile.TemporaryDirectory(prefix="whorl-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        environment = {
            **os.environ,
            "RAY_TMPDIR": ray_folder,
            "OMP_NUM_THREADS": "1",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",  # as on any cluster of several nodes
            # An elastic run may count on a lost node for a moment, and waits that long for its slots.
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
        }
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "tests.training.nodes", "cases.json", "results.json"]
        command[3:] = [str(places / name) for name in command[3:]]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1000, check=False
        )
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, Any] = json.loads((places / "results.json").read_text())
    return found


def test_a_killed_node_is_replaced_by_another(results: dict[str, Any]) -> None:
    whole, done = results["nothing"], results["replace"]
    assert whole["before"] == [1, 1]
    assert whole["summary"]["resumed"] == []
    assert done["before"] == [1, 1]
    assert done["after"] == [1, 1]
    assert len(done["summary"]["peak_memory_gib"]) == 2
    (at,) = done["summary"]["resumed"]
    assert 0 < at < done["summary"]["steps"]
    assert_same(Fit(done["model"], done["summary"]), Fit(whole["model"], whole["summary"]))


def test_an_elastic_run_goes_on_with_the_node_that_is_left(
    results: dict[str, Any], cases: dict[str, Settings]
) -> None:
    done = results["shrink"]
    assert done["before"] == [1, 1]
    assert done["after"] == [1, 0]
    summary = done["summary"]
    assert len(summary["peak_memory_gib"]) == 1
    (at,) = summary["resumed"]
    assert 0 < at < summary["steps"]
    assert [v["epoch"] for v in summary["validations"]] == list(range(1, EPOCHS + 1))
    assert summary["rows"] == EPOCHS * ROWS
    assert_one_curve(tracking.find_run(cases["shrink"], "finetune", done["run"]), summary)
    # Until the kill it was the same run, and what the lost node had of it is in the checkpoint.
    whole = results["nothing"]["summary"]["history"]
    common = [record for record in whole if record["step"] <= at]
    assert common
    for one, other in zip(summary["history"], common, strict=False):
        assert (one["step"], one["loss"]) == (other["step"], other["loss"])
