"""The planner's command: what it prints, what it does not start, and the documentation it wrote."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import finetune, plan
from lib import storage as files
from lib.artifacts import DatasetRef
from lib.command import run
from lib.data.plan import plan as dataset_plan
from lib.planner import hardware
from lib.settings import load_settings
from tests.planner import documentation


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, storage: Path) -> Path:
    (tmp_path / "source.csv").write_text("text,label\ngood,1\nbad,2\n")
    values = {
        "name": "mine",
        "task": "sentiment",
        "data": {"source": str(tmp_path / "source.csv"), "labels": {1: "good", 2: "bad"}},
        "model": {"base": str(tiny_base), "max_length": 32},
        "plan": {"accelerator": ["this"], "workers": [1, 2]},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def make_dataset(config: Path) -> DatasetRef:
    """A published dataset with a manifest, which is all that the planner reads of it."""
    ref = dataset_plan(load_settings(config)).ref
    with files.publish(ref.uri) as folder:
        splits = {"train": {"rows": 9, "tokens": 54_321}}
        files.write_json(str(folder / "manifest.json"), {"splits": splits})
    return ref


def words(config: Path, *more: str) -> list[str]:
    return ["--config", str(config), *more]


def test_it_prints_every_stage_and_a_recommendation(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(plan.plan, words(config)) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\| +(\d) \| +(\d) \|", out, re.M)
    assert rows == [(w, s) for w in "12" for s in "0123"]
    assert "not known before python -m jobs.preprocess" in out
    assert "Recommended" in out


def test_tokens_come_from_the_dataset_unless_they_are_given(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(config)
    run(plan.plan, words(config))
    assert "training tokens: 54,321 in an epoch" in capsys.readouterr().out
    run(plan.plan, words(config, "--plan.tokens", "777"))
    assert "training tokens: 777 in an epoch" in capsys.readouterr().out
    # A named model has another tokeniser.
    run(plan.plan, words(config, "--plan.architecture", "llama-7b"))
    assert "training tokens: not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (["--plan.accelerator", "h10"], "plan.accelerator: no accelerator 'h10'; did you mean 'h100'?"),
        (["--plan.architecture", "lama-7b"], "plan.architecture: no architecture 'lama-7b'"),
        (["--plan.offload", "some"], "plan.offload"),
        (["--plan.worker", "1"], "unknown key 'plan.worker'; did you mean 'workers'?"),
        (["--model.base", "/nowhere"], "holds no config.json"),
    ],
)
def test_mistakes_are_one_line(
    config: Path, override: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(plan.plan, words(config, *override)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_neither_torch_nor_ray_is_loaded(config: Path) -> None:
    code = (
        "import sys; from lib.command import run; from jobs.plan import plan; "
        f"assert run(plan, {words(config)!r}) == 0; "
        "print(sorted({'torch', 'ray', 'deepspeed', 'transformers', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_documentation_covers_three_sizes() -> None:
    commands = " ".join(arguments for arguments, _ in documentation.shown())
    assert re.findall(r"llama-\w+", commands) == ["llama-7b", "llama-70b", "llama-405b"]


@pytest.mark.parametrize("number", range(3))
def test_the_documentation_is_what_the_command_prints(number: int) -> None:
    arguments, text = documentation.shown()[number]
    assert documentation.printed(arguments) == text, "python -m tests.planner.documentation renews it"


def test_finetune_refuses_what_this_machine_cannot_hold(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(config)
    monkeypatch.setattr(hardware, "host_memory", lambda: 1e8)
    monkeypatch.setattr(finetune, "connect", lambda: pytest.fail("Ray was started"))
    assert run(finetune.finetune, words(config)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: training would take ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("way", ["ignored", "remote", "large enough"])
def test_finetune_goes_on_otherwise(config: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class ConnectedError(Exception):
        pass

    def connect() -> None:
        raise ConnectedError

    make_dataset(config)
    monkeypatch.setattr(finetune, "connect", connect)
    if way != "large enough":
        monkeypatch.setattr(hardware, "host_memory", lambda: 1e8)
    if way == "remote":
        monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")
    more = ["--training.ignore_plan", "true"] if way == "ignored" else []
    with pytest.raises(ConnectedError):
        run(finetune.finetune, words(config, *more))
