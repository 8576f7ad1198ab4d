"""The configuration: what ships parses, and every mistake is one line that names the key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lib.errors import ConfigError
from lib.settings import load_settings
from lib.tasks import load_task

CONFIGS = sorted(Path("jobs/configs").glob("*.yaml"))
REVIEWS = "jobs/configs/reviews.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    settings = load_settings(path)
    assert settings.name
    assert load_task(settings.task).columns(settings.data)


def test_overrides_and_types() -> None:
    settings = load_settings(REVIEWS, ["--training.learning_rate", "1e-3", "--data.limit=50"])
    assert settings.training.learning_rate == 1e-3
    assert settings.data.limit == 50


def test_workers_are_a_number_or_least_and_most() -> None:
    for given, least, most in (("3", 3, 3), ("[1, 4]", 1, 4)):
        training = load_settings(REVIEWS, ["--training.workers", given]).training
        assert (training.least_workers, training.most_workers) == (least, most)


def test_label_keys_compare_as_text_and_keep_their_order() -> None:
    words = ["--data.labels", "{2.0: good, 1: bad, '3': good}", "--data.undersample", "{}"]
    settings = load_settings(REVIEWS, words)
    assert settings.data.label_map == {"2": "good", "1": "bad", "3": "good"}
    assert settings.data.label_names == ["good", "bad"]


def test_near_duplicates_and_leakage() -> None:
    assert load_settings(REVIEWS).data.leakage == "check"
    data = load_settings(REVIEWS, ["--data.leakage", "off", "--data.near.duplicates", "drop"]).data
    assert (data.leakage, data.near.duplicates, data.checks_leakage) == ("off", "drop", False)
    alone = load_settings(REVIEWS, ["--data.split", "{train: 1, validation: 0, test: 0}"]).data
    assert not alone.checks_leakage  # there is nowhere to leak to


def test_dates_of_the_split_are_read_as_yaml_has_them() -> None:
    words = "{time: created, validation_from: 2024-01-01, test_from: 2024-03-01T09:00:00Z}"
    data = load_settings(REVIEWS, ["--data.split", words]).data
    assert data.split.dates == {"validation": "2024-01-01", "test": "2024-03-01T09:00:00+00:00"}
    assert data.split.by == "time"
    assert data.checks_leakage
    assert type(data).model_validate(data.model_dump(mode="json")) == data
    alone = load_settings(REVIEWS, ["--data.split", "{time: year, test_from: 2024}"]).data
    assert alone.shares == {"train": 0.5, "validation": 0, "test": 0.5}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (["--data.near.keep", "best"], "keep: best goes with column"),
        (["--data.near.duplicates", "drop", "--data.duplicates", "keep"], "set duplicates: drop too"),
        (["--data.clean.length.words", "{least: 5, most: 2}"], "5 is above 2"),
        (
            ["--training.lerning_rate", "1"],
            "unknown key 'training.lerning_rate'; did you mean 'learning_rate'?",
        ),
        (["--trainin.epochs", "1"], "unknown key 'trainin'; did you mean 'training'?"),
        (["--training.epochs", "three"], "training.epochs: input should be a valid integer"),
        (["--training.zero_stage", "7"], "training.zero_stage: input should be 0, 1, 2 or 3, got 7"),
        (["--task", "sentimnt"], "no task 'sentimnt'; did you mean 'sentiment'?"),
        (["--data.split.train", "0.5"], "train + validation + test must be 1, not 0.7"),
        (
            ["--data.split", "{group: user, time: created}"],
            "data.split: rows are split by group or by time, not by both; leave one out",
        ),
        (["--data.split", "{group: user, stratified: true}"], "by group or by stratified, not by both"),
        (["--data.split", "{test_from: 2024-03-01}"], "data.split: test_from needs time"),
        (
            ["--data.split", "{time: t, test_from: 2024-03-01, train: 0.9, validation: 0}"],
            "test_from says where a split begins, so that there are no shares; leave train, validation and test out",
        ),
        (
            ["--data.split", "{time: t, validation_from: 2024-03-01, test_from: 2024-02-01}"],
            "validation_from must be before test_from, and 2024-03-01 is not before 2024-02-01",
        ),
        (["--data.split", "{time: t, test_from: soon}"], "data.split.test_from: 'soon' is no time"),
        (
            ["--data.split", "{time: t, test_from: 2024-03-01}", "--data.test_source", "t.csv"],
            "split.test_from would leave nothing to test_source",
        ),
        (["--data.augment", "{}"], "data.augment: no method is named; give some of synonyms, swap"),
        (["--data.augment", "{swap: {aplha: 0.1}}"], "unknown key 'data.augment.swap.aplha'"),
        (["--data.augment", "{swap: {alpha: 0}}"], "data.augment.swap.alpha: "),
        (["--data.augment", "{paraphrase: true}"], "paraphrase needs writer.model, the model that writes"),
        (
            ["--data.augment", "{swap: true, writer: {model: a}}"],
            "writer: nothing is written without paraphrase",
        ),
        (
            ["--data.augment", "{paraphrase: {prompt: Again}, writer: {model: a}}"],
            "data.augment.paraphrase.prompt: a prompt needs {text}",
        ),
        (
            ["--data.augment", "{paraphrase: true, writer: {model: chat@champion}}"],
            "data.augment.writer.model: 'chat@champion' is no fixed version; give its number, such as chat@3",
        ),
        (["--data.augment", "{swap: true, balance: {to: 0}}"], "data.augment.balance.to"),
        (["--data.labels", "[]"], "data.labels: at least one label"),
        (
            ["--data.undersample", "{positve: 0.5}"],
            "undersample: no label 'positve'; did you mean 'positive'?",
        ),
        (["--data.source", "[]"], "data.source"),
        (["--data.slices", "{text: Title}"], "slice name 'text' is the name of a dataset column"),
        (["--training.class_weights", "{negativ: 2}"], "no label 'negativ'; did you mean 'negative'?"),
        (
            ["--monitoring", "{negative: negativ}"],
            "monitoring.negative: no label 'negativ'; did you mean 'negative'? (labels: negative, neutral, positive)",
        ),
        (
            ["--monitoring", "{windw_hours: 6}"],
            "unknown key 'monitoring.windw_hours'; did you mean 'window_hours'?",
        ),
        (
            ["--monitoring", "{bucket_minutes: 50}"],
            "monitoring: window_hours 6 must be a multiple of bucket_minutes 50",
        ),
        (["--monitoring", "{season_hours: 6}"], "window_hours 6 must be below season_hours 6"),
        (
            ["--monitoring", "{webhooks: [{url: example.com, secret_env: HOOK}]}"],
            "monitoring.webhooks.0.url: 'example.com' must be an http or https URL with a host",
        ),
        (
            ["--monitoring", "{webhooks: [{url: 'https://a.b'}]}"],
            "monitoring.webhooks.0.secret_env is missing",
        ),
        (["--serving.min_replicas", "9"], "min_replicas 9 is above max_replicas"),
        (["--training.workers", "[4, 2]"], "training.workers: [least, most] must rise, not fall from 4 to 2"),
        (["--training.checkpoint_every", "0"], "training.checkpoint_every: "),
        (["--training.max_failures", "-2"], "training.max_failures: "),
        (["--name", "Bad Name"], "name: "),
        (["--data.limit"], "--data.limit needs a value"),
        (["data.limit", "3"], "unexpected argument 'data.limit'"),
        (["--name.first", "x"], "'name' is a value, not a section"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(override: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(REVIEWS, override)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name: [", "line 1, column 8 is not valid YAML"),
        (b"- a\n", "must hold keys and values"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"name: x\ntask: sentiment\n", "data is missing; add it"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_settings(path)


def test_absent_file_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'reviews.yaml'\?"):
        load_settings("jobs/configs/review.yaml")


def test_loads_without_torch_or_ray() -> None:
    code = "import sys, lib.settings; print(sorted({'torch', 'ray', 'transformers', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
