"""Preference tuning on real Ray Train workers: the reference is computed once, margins start at 0 and rise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.evaluate import evaluate
from lib import tracking
from lib.artifacts import TaskFile
from lib.evaluation import report as files
from lib.settings import override
from lib.tasks import load_task, preference
from lib.training import reference
from lib.training.fit import fit
from tests.chatting import make_dataset, use

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]


def rows_of(dataset, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(s.removeprefix("file://")) for s in dataset.shards(split)])


@pytest.mark.long
def test_preference_tuning_from_pairs_to_a_measured_chat_model(database: Path, tiny_chat_base: Path, capsys):
    training = {
        "workers": 2,
        "cpus_per_worker": 0.5,
        "epochs": 6,
        "learning_rate": 2e-3,
        "tokens_per_batch": 256,
        "precision": "fp32",
        "log_every": 1,
        "patience": None,
        "preference": {"beta": 0.5},
    }
    settings = use(tiny_chat_base, "preference", training=training)
    dataset = make_dataset(settings)
    with tracking.start_run("finetune", settings) as run:
        result = fit(settings, dataset, run)

    # The reference is the base's own, for every training and validation row and for no other.
    known = reference.named(settings, dataset)
    assert known.exists()
    assert known.shards("test") == []
    model = preference.build(tiny_chat_base, settings).eval()
    for split in ("train", "validation"):
        rows, plain = rows_of(known, split), rows_of(dataset, split)
        assert rows.select(plain.column_names) == plain
        with torch.no_grad():
            expected, _ = preference.log_probabilities(model, preference.collate(plain, 0))
        ours = np.stack([rows[name].to_numpy() for name in preference.REFERENCES.values()])
        assert ours == pytest.approx(expected.numpy(), abs=1e-3)

    # A model that is still its reference has the loss log 2 in its first step, and no margin.
    history, validations = result.summary["history"], result.summary["validations"]
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert history[-1]["loss"] < 0.3
    assert validations[-1]["preference_accuracy"] > 0.9
    assert validations[-1]["margin"] > validations[0]["margin"] > 0
    assert validations[-1]["loss"] < validations[0]["loss"]

    # A second run finds the reference there.
    capsys.readouterr()
    again = reference.with_reference(override(settings, {"training.learning_rate": 1e-5}, "test"), dataset)
    assert again == known
    assert "log-probabilities" not in capsys.readouterr().out
    assert reference.named(override(settings, {"training.precision": "bf16"}, "test"), dataset) != known

    # What comes out is a chat model, measured as one, on the dataset's own test split.
    folder = Path(result.model_uri.removeprefix("file://"))
    assert TaskFile.read(folder, "chat").dataset == dataset.fingerprint
    assert (
        load_task("chat")
        .load(folder, settings.serving)
        .answers([[{"role": "user", "content": "the dress?"}]], max_tokens=4)
    )
    evaluate(settings)
    report = files.read(run.ref.evaluation_uri).report
    assert report.metrics["preference_accuracy"] > 0.9
    assert report.rows == 24
    assert report.metrics["ranking_accuracy"] >= report.baselines["base"]["ranking_accuracy"]
    low, high = report.answers.intervals["preference_accuracy"]["model"]
    assert low <= report.metrics["preference_accuracy"] <= high
