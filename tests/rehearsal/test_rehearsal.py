"""The whole rehearsal: no request fails while pods are killed, and the training of which a worker was lost ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cluster import machines
from lib import storage
from tests.k8s.building import KUBECTL

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl to build the manifests"),
    pytest.mark.skipif(
        not machines.available(), reason="this host lets no network namespaces be made (root is needed)"
    ),
]


def test_nothing_that_was_asked_is_lost() -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WHORL_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.rehearsal.rehearse", "--rate", "3"], env=clean, timeout=3500
    )
    assert done.returncode == 0
    rows = storage.read_json(str(storage.PROJECT / ".whorl/bench/rehearsal.json"))["rows"]
    figures = {row["case"]: row["ours"] for row in rows}
    failed = {case: ours for case, ours in figures.items() if case.endswith(": failed")}
    assert len(failed) == 4, json.dumps(figures)
    assert set(failed.values()) == {0}, failed
    assert min(ours for case, ours in figures.items() if case.endswith(": requests")) > 20
