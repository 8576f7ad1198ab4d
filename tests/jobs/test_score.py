"""`python -m jobs.score`: files through the predictor that serves, on a real Ray Data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.score import score
from lib import registry, tracking
from lib.artifacts import ModelRef
from lib.command import run
from lib.settings import Settings
from lib.tasks import sentiment
from tests.serve.conftest import publish_index
from tests.serve.test_chat import chat_settings, crown, greedy, publish_chat
from tests.trained import evaluated, make_dataset, make_run, use


@pytest.fixture
def settings(database: Path, tiny_base: Path) -> Settings:
    """A use with a champion."""
    made = use(tiny_base)
    dataset = make_dataset(made)
    trained = make_run(made, dataset)
    registry.set_alias(registry.register(trained, evaluated(trained, dataset, 0.8)), registry.CHAMPION)
    return made


def engines(session: int) -> list[psutil.Process]:
    """vLLM's processes of a session; they end with who started them, or stay."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if process.name().startswith("VLLM::") and os.getsid(process.pid) == session:
                found.append(process)
    return found


def texts(number: int) -> list[str]:
    return [f"the dress {i} is {'great' if i % 2 else 'awful'}" for i in range(number)]


@pytest.mark.ray
def test_files_are_scored_once_by_the_champion(
    settings: Settings, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [{"text": text, "id": i} for i, text in enumerate(texts(50))]
    rows[7]["text"] = "  "
    rows[9]["text"] = "great, says ada@example.com"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:30])))
    (tmp_path / "in" / "b.csv").write_text(
        "id,text\n" + "".join(f"{r['id']},{r['text']}\n" for r in rows[30:])
    )
    config = tmp_path / "shop.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_defaults=True)))
    words = [
        "--config",
        str(config),
        "--score.source",
        str(tmp_path / "in"),
        "--score.output",
        str(tmp_path / "out"),
    ]
    words += ["--score.keep", "{number: id}", "--score.rows_per_shard", "20", "--score.redact", "true"]
    assert run(score, words) == 0
    said = capsys.readouterr().out
    assert "model        shop@1 (torch fp32)" in said
    assert "1 bad\n" in said
    assert "redacted     EMAIL 1, in 1 rows\n" in said
    assert f"{tmp_path / 'in' / 'a.jsonl'} row 8 has no text" in said

    out = tmp_path / "out"
    manifest = json.loads((out / "_manifest.json").read_text())
    assert (manifest["model"], manifest["rows"], manifest["bad"]["rows"]) == ("shop@1", 50, 1)
    assert [(Path(s["uri"]).name, s["rows"]) for s in manifest["sources"]] == [("a.jsonl", 30), ("b.csv", 20)]
    assert sum(manifest["figures"]["label"].values()) == 49
    assert sorted(path.name for path in out.glob("*.parquet")) == manifest["shards"]
    assert len(manifest["shards"]) == 3
    scored = {int(row["number"]): row for row in pq.read_table(out).to_pylist()}
    assert [scored[i]["row"] for i in range(50)] == [*range(1, 31), *range(1, 21)]
    assert scored[7]["problem"] == "has no text"
    with registry.open_version(ModelRef("shop", 1)) as folder:
        predictor = sentiment.load(folder, settings.serving)
    rows[9]["text"] = "great, says <EMAIL_1>"
    assert scored[9]["text"] == rows[9]["text"]
    good = [i for i in range(50) if i != 7]
    request = sentiment.Request(inputs=[rows[i]["text"] for i in good])
    for i, answer in zip(good, sentiment.predict(predictor, request).results, strict=True):
        assert scored[i]["label"] == answer.label
        assert scored[i]["scores"] == pytest.approx(answer.scores, abs=1e-3)

    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(score, words) == 0
    assert "are there already, of the same input and model: skipped" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written

    few = [*words, "--score.bad_rows", "0.01", "--score.output", str(tmp_path / "few")]
    assert run(score, few) == 2
    error = capsys.readouterr().err
    assert "1 of 50 rows cannot be scored, more than score.bad_rows allows (0.01): " in error
    assert "row 8 has no text" in error
    assert not (tmp_path / "few").exists()


def test_a_model_that_is_not_there_or_of_another_task_is_one_line(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fits", "tokens": ["fits"]}\n')
    values = settings.model_dump(mode="json", exclude_defaults=True)
    config = tmp_path / "shop.yaml"
    config.write_text(yaml.safe_dump(values | {"task": "tagging"}))
    words = ["--config", str(config), "--score.source", str(tmp_path / "a.jsonl")]
    for override, says in (
        ([], "shop@1 is a sentiment model, but task is tagging; choose another score.model"),
        (["--score.model", "shop"], "model 'shop' must look like reviews@champion or reviews@3"),
        (["--score.model", "shop@7"], "no model version shop@7 in storage (there are: 1)"),
    ):
        assert run(score, [*words, *override]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.long
def test_dialogues_are_answered_grounded_by_vllm_as_by_transformers(
    database: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.client().create_registered_model("helper")
    ref = publish_chat(1)
    crown(ref)
    asked = ["my phone does not ring", "my car does not start", "my phone does not ring", "where is it?", ""]
    publish_index(tiny_base, {"Phones": asked[0], "Cars": asked[1]}, "a")
    knowledge = {"index": "shop", "threshold": 0.999, "instructions": "Read.", "unknown": "I do not know."}
    dialogues = [[{"role": "user", "content": text}] for text in asked]
    dialogues[2].insert(0, {"role": "system", "content": "x" * 400})
    rows = [{"messages": turns, "id": i} for i, turns in enumerate(dialogues)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = tmp_path / "chat.yaml"
    config.write_text(
        yaml.safe_dump(chat_settings(knowledge=knowledge).model_dump(mode="json", exclude_defaults=True))
    )
    words = [
        "--config",
        str(config),
        "--score.source",
        str(tmp_path / "a.jsonl"),
        "--score.keep",
        "{number: id}",
    ]
    words += ["--score.max_tokens", "8", "--score.rows_per_shard", "2", "--score.bad_rows", "0.5"]
    found: dict[str, list[dict[str, Any]]] = {}
    # Where a cluster of `ray start` was killed, its address is left behind: nobody is to join it.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # Ray's socket paths may have 107 characters
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:6399")
        monkeypatch.setenv("RAY_TMPDIR", folder)
        for engine in ("vllm", "transformers"):
            out = tmp_path / engine
            chosen = ["--score.engine", engine, "--score.output", str(out), "--serving.precision", "fp32"]
            # A process of its own, as for a user: Ray Data's LLM support takes hold of a driver's output.
            command = [sys.executable, "-m", "jobs.score", *words, *chosen]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
            ) as driver:
                said, _ = driver.communicate(timeout=300)
            assert driver.returncode == 0, said
            assert not engines(driver.pid)
            manifest = json.loads((out / "_manifest.json").read_text())
            assert engine.replace("transformers", "torch") in manifest["engine"]
            assert (manifest["rows"], manifest["bad"]["rows"], len(manifest["shards"])) == (5, 2, 3)
            found[engine] = sorted(pq.read_table(out).to_pylist(), key=lambda row: row["row"])
    assert found["vllm"] == found["transformers"]
    assert [row["number"] for row in found["vllm"]] == ["0", "1", "2", "3", "4"]
    assert "tokens for passages of the knowledge base" in found["vllm"][2]["problem"]
    assert "has no text" in found["vllm"][4]["problem"]
    told = {"role": "system", "content": f"Read.\n\n[1] Phones\n{asked[0]}"}
    assert found["vllm"][0]["answer"] == greedy(ref, 8, told)
    assert found["vllm"][0]["messages"] == dialogues[0], "as the source has it"
    assert [row["citations"] for row in found["vllm"]] == [["Phones.md"], ["Cars.md"], [], [], []]
    assert (found["vllm"][3]["answer"], found["vllm"][3]["prompt_tokens"]) == ("I do not know.", 0)
