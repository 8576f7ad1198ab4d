"""`python -m jobs.preprocess`: what it prints, every bad input's one line, and that a kill leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.preprocess import preprocess
from lib.command import run
from lib.storage import PROJECT

pytestmark = pytest.mark.usefixtures("storage")
GOOD = "text,label\n" + "".join(f"fits {word} {i},{1 + i % 2}\n" for i in range(60) for word in ("a", "good"))


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path) -> Path:
    """A configuration file whose source is `source.csv` beside it."""
    values: dict[str, Any] = {
        "name": "mine",
        "task": "sentiment",
        "data": {"source": str(tmp_path / "source.csv"), "labels": {1: "bad", 2: "good"}},
        "model": {"base": str(tiny_base), "max_length": 16},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def fail(config: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line of a run that must fail with exit code 2 and leave no dataset."""
    assert run(preprocess, ["--config", str(config), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    datasets = Path(os.environ["WHORL_STORAGE"]) / "datasets" / "mine"
    assert not datasets.exists() or not any(datasets.iterdir())
    return error.removeprefix("error: ").strip()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_it_tells_what_it_made_and_skips_what_is_there(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source.csv").write_text(GOOD + "fits a 0,1\n" + ",2\n")
    assert run(preprocess, ["--config", str(config)]) == 0
    first = capsys.readouterr().out
    assert "rows read    122; dropped: 1 empty, 1 duplicate" in first
    fingerprint = next(line.split()[1] for line in first.splitlines() if line.startswith("fingerprint"))
    folder = Path(os.environ["WHORL_STORAGE"]) / "datasets" / "mine" / fingerprint
    assert f"written to   {folder}" in first
    assert (folder / "manifest.json").is_file()
    assert "next         python -m jobs.finetune" in first

    written = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run(preprocess, ["--config", str(config)]) == 0
    second = capsys.readouterr().out
    assert f"dataset {fingerprint} is there already" in second
    assert "skipped" in second
    assert second.splitlines()[-8:] == first.splitlines()[-8:]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == written


def test_mistakes_that_need_no_reading(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not even a Ray is started for these.
    monkeypatch.setattr("jobs.preprocess.connect", lambda: pytest.fail("Ray was started"))
    source = tmp_path / "source.csv"
    assert f"data.source: {source} does not exist" in fail(config, capsys)
    source.write_text(GOOD)
    line = fail(config, capsys, "--data.columns.text", "txet")
    assert line.endswith(
        "has no column 'txet' (data.columns.text); did you mean 'text'? (columns: 'text', 'label')"
    )
    assert "no column 'kind' (data.slices.kind)" in fail(config, capsys, "--data.slices.kind", "kind")
    assert "no file matches" in fail(config, capsys, "--data.source", f"{tmp_path}/*.parquet")
    assert "cannot open 'nosuch://x'" in fail(config, capsys, "--data.source", "nosuch://x")
    assert "no model directory" in fail(config, capsys, "--model.base", f"{tmp_path}/nowhere")
    source.write_text("")
    assert f"{source} is empty" in fail(config, capsys)
    source.write_bytes(b"PAR1" + bytes(100))
    assert "is not what its ending says: it should be CSV but is Parquet" in fail(config, capsys)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_mistakes_in_the_rows(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.csv"
    source.write_text("text,label\n")
    assert f"the source {source} holds no rows" in fail(config, capsys)
    source.write_text(GOOD + "fits,3\nfits,n/a\nfits,3\n")
    assert fail(config, capsys) == (
        "data.labels: 3 of 123 rows hold a label outside the mapping ('3', 'n/a'); "
        f"first: {source} row 121; add the values to data.labels or correct the source"
    )
    source.write_text("text,label\n,1\nfits,\n")
    assert "no usable row" in fail(config, capsys)
    assert "of 2, 1 have no text and 1 no label" in fail(config, capsys)
    source.write_text("text,label\nfits,1\ngood,2\n")
    assert "split would be empty: 2 rows are too few for a share of 0." in fail(config, capsys)
    source.write_bytes("text,label\nGröße,1\n".encode("latin-1"))
    assert f"{source} row 1, character 3 of 'text' (0xf6) is not valid UTF-8; convert" in fail(config, capsys)
    source.write_text(GOOD + "one,too,many\n")
    assert f"{source} row 121 has 3 columns where the header has 2 ('one,too,many')" in fail(config, capsys)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_first_mistake_in_source_order_is_told(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.csv").write_text(GOOD)
    lines = [json.dumps({"text": f"fits {i}", "label": 1}) for i in range(200)]
    (folder / "b.jsonl").write_text("\n".join([*lines[:150], "{broken", *lines[150:]]))
    (folder / "c.csv").write_bytes(GOOD.encode() + b"caf\xe9,1\n")
    line = fail(config, capsys, "--data.source", str(folder))
    assert f"{folder / 'b.jsonl'} line 151 is not valid JSON" in line
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"caf\xe9"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": text, "label": [1, 2]}), folder / "a.parquet")
    line = fail(config, capsys, "--data.source", str(folder))
    assert f"{folder / 'a.parquet'} row 2, byte 4 (0xe9) is not valid UTF-8" in line


def command(config: Path, *overrides: str) -> tuple[list[str], dict[str, str]]:
    """The real command line, on the tests' own Ray."""
    import ray

    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": str(PROJECT),
    }
    return [sys.executable, "-m", "jobs.preprocess", "--config", str(config), *overrides], environment


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            GOOD.replace("label", "labels"),
            "has no column 'label' (data.columns.label); did you mean 'labels'?",
        ),
        (GOOD + "fits,3\n", "1 of 121 rows hold a label outside the mapping ('3'); first: "),
    ],
)
def test_exit_code_and_one_line_of_the_real_command(
    config: Path, tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "source.csv").write_text(content)
    words, environment = command(config)
    done = subprocess.run(words, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_run_leaves_nothing_that_a_reader_can_see(
    config: Path, tmp_path: Path, storage: Path
) -> None:
    rows = [f"fits {i} {'good ' * 40}{i * 7919},{1 + i % 2}" for i in range(20_000)]
    (tmp_path / "source.csv").write_text("text,label\n" + "\n".join(rows))
    words, environment = command(config, "--data.rows_per_shard", "500")
    process = subprocess.Popen(words, env=environment, cwd=PROJECT, stdout=subprocess.DEVNULL)
    folder = storage / "datasets" / "mine"
    deadline = time.monotonic() + 120
    while not list(folder.rglob("*.parquet")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p.name for p in folder.iterdir() if not p.name.startswith(".")] == []

    done = subprocess.run(
        [*words, "--data.limit", "2000"],
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "rows read    2,000; dropped: none" in done.stdout
