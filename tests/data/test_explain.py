"""`jobs.preprocess --explain` tells what would be done, without Ray and without reading rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.data.explain import explain
from lib.data.plan import plan
from lib.settings import Settings, load_settings
from tests.data.test_build import settings


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {i}", "label": 1 + i % 2}) for i in range(20)))
    return path


def told(given: Settings) -> dict[str, str]:
    """What the plan says of each step, whatever its number."""
    lines = [line.split(maxsplit=1) for line in explain(plan(given))]
    said = [rest.split(maxsplit=1) if first.isdigit() else (first, rest) for first, rest in lines]
    return dict(said)


@pytest.mark.usefixtures("storage")
def test_what_is_configured_is_told_and_nothing_else(tiny_base: Path, source: Path) -> None:
    plainly = told(settings(tiny_base, str(source)))
    assert f"{source}, jsonl, " in plainly["read"]
    assert "would be made" in plainly["dataset"]
    assert plainly["columns"] == "text ← 'text', label ← 'label'"
    assert plainly["duplicates"] == "the first of equal texts stays"
    assert "train 80%, validation 10%, test 10%" in plainly["split"]
    assert not {"clean", "near", "undersample"} & set(plainly)
    more = told(
        settings(
            tiny_base,
            str(source),
            test_source=str(source),
            redact=False,
            leakage="off",
            clean={"html": True, "length": {"words": {"least": 2}}},
            near={"duplicates": "drop", "threshold": 0.7},
            undersample={"good": 0.25},
        )
    )
    assert more["redact"] == "nothing: personal data stays"
    assert more["clean"].startswith("html, length {")
    assert "from 0.7 on" in more["near"]
    assert "25% of the training rows labelled good" in more["undersample"]
    assert "train 89%, validation 11%" in more["split"]
    assert more["split"].endswith("test given by files")
    assert "leakage" not in more


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ({"group": "label"}, "train 80%, validation 10%, test 10%, rows with one 'label' together"),
        ({"time": "label"}, "the latest by 'label' test"),
        ({"time": "label", "test_from": "2024-03-01"}, "test from 2024-03-01, the latest by 'label' test"),
        ({"stratified": True}, "each label in its share"),
    ],
)
@pytest.mark.usefixtures("storage")
def test_how_rows_are_split_is_told(tiny_base: Path, source: Path, split: dict[str, Any], said: str) -> None:
    assert said in told(settings(tiny_base, str(source), split=split))["split"]


@pytest.mark.usefixtures("storage")
def test_what_is_made_for_training_is_told(tiny_base: Path, source: Path) -> None:
    augment = {"swap": True, "delete": {"n_aug": 2}, "balance": {"to": "largest"}}
    found = told(settings(tiny_base, str(source), augment=augment))["augment"]
    assert found == "training rows alone: swap (1 a row), delete (2 a row); labels filled up to largest"


@pytest.mark.usefixtures("storage")
def test_how_a_source_is_read_is_told(tiny_base: Path, source: Path) -> None:
    given = settings(
        tiny_base,
        [{"uri": str(source), "weight": 0.5}],
        templates={"text": "{text} ({label})"},
        quarantine={"share": 0.01},
    )
    lines = explain(plan(given))
    assert any("'text' is made of '{text} ({label})'" in line for line in lines)
    assert any(f"{source}, jsonl" in line and "in training 0.5 times" in line for line in lines)
    assert told(given)["quarantine"].startswith("at most 1.00% of the rows")


@pytest.mark.usefixtures("storage")
def test_a_long_list_of_files_is_summed_up(tiny_base: Path, tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.jsonl").write_text('{"text": "fits", "label": 1}\n')
    lines = explain(plan(settings(tiny_base, str(tmp_path / "*.jsonl"))))
    assert sum(".jsonl, jsonl" in line for line in lines) == 5
    assert any("and 3 more files" in line for line in lines)


@pytest.mark.parametrize("config", ["reviews", "movies"])
def test_it_is_told_of_configurations_that_ship(config: str, storage: Path) -> None:
    given = load_settings(f"jobs/configs/{config}.yaml")
    lines = explain(plan(given))
    assert any(line.startswith("dataset") and given.name in line for line in lines)
    assert lines[-1].startswith("written to")
    assert not (storage / "datasets").exists()


def test_the_command_starts_nothing(tiny_base: Path, source: Path, storage: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings(tiny_base, str(source)).model_dump(mode="json")))
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "jobs.preprocess",
        "--explain",
        "--config",
        str(config),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dataset")
    assert "| ray" not in done.stderr  # it was not imported
    assert not (storage / "datasets").exists()
