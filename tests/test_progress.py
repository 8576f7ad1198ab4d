"""Progress in a log: lines, and not too many of them."""

from __future__ import annotations

import pytest

from lib import progress
from lib.progress import Progress


def test_a_log_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress(2000, "training", "rows", terminal=False, done=400)
    for done in range(500, 2001, 100):
        now[0] += 2
        bar.to(done, "loss 0.5")
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training: 1,200 of 2,000 rows, 50 rows/s, loss 0.5"
    assert len(lines) == 2
