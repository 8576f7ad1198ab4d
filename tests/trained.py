"""What the stages before evaluation leave behind, made in a moment: a dataset, a run with a model, a report."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage, tracking
from lib.artifacts import SPLITS, DatasetRef, EvalReport, TaskFile
from lib.evaluation.baselines import Baseline
from lib.evaluation.classification import Measured, Subject, measure
from lib.evaluation.report import PREDICTIONS
from lib.evaluation.scoring import Scored
from lib.settings import EvaluationSettings, Settings
from lib.tasks import load_task
from tests.tiny import WORDS

LABELS = ["negative", "neutral", "positive"]


def use(base: Path, name: str = "shop") -> Settings:
    """The settings of a small use of the tiny base model."""
    return Settings.model_validate(
        {
            "name": name,
            "task": "sentiment",
            "data": {"source": "unused.csv", "labels": LABELS, "slices": {"department": "department"}},
            "model": {"base": str(base), "max_length": 32},
            "evaluation": {"bootstrap": 200},
            "serving": {"engine": "torch", "precision": "fp32", "threads": 1},
        }
    )


def make_dataset(
    settings: Settings,
    fingerprint: str = "0123456789abcdef",
    rows: int = 60,
    seed: int = 0,
    test: bool = True,
) -> DatasetRef:
    """A dataset of random sentences with random labels, in three splits of `rows` rows."""
    random = np.random.default_rng(seed)
    task = load_task(settings.task)
    ref = DatasetRef(settings.name, fingerprint)
    counts = {}
    with storage.publish(ref.uri) as folder:
        for split in SPLITS:
            wanted = rows if split != "test" or test else 0
            texts = [
                f"{' '.join(random.choice(WORDS, random.integers(3, 20)))} {split} {i}" for i in range(wanted)
            ]
            counts[split] = {"rows": wanted}
            if wanted:
                table = pa.table(
                    {
                        "id": [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts],
                        "text": texts,
                        "label": pa.array(random.integers(0, len(LABELS), wanted), pa.int32()),
                        "department": random.choice(["tops", "dresses"], wanted).tolist(),
                    }
                )
                (folder / split).mkdir()
                encoded = task.encode(table, settings.model)
                half = wanted // 2
                pq.write_table(encoded.slice(0, half), folder / split / "part-00000.parquet")
                pq.write_table(encoded.slice(half), folder / split / "part-00001.parquet")
        manifest = {"name": ref.name, "fingerprint": fingerprint, "labels": LABELS, "splits": counts}
        storage.write_json(str(folder / "manifest.json"), manifest)
    return ref


def make_run(settings: Settings, dataset: DatasetRef, labels: list[str] = LABELS) -> tracking.Run:
    """A finished fine-tuning run whose model is the base with a random head."""
    named = settings.model_copy(update={"data": settings.data.model_copy(update={"labels": labels})})
    task, base = load_task(settings.task), Path(settings.model.base)
    info = TaskFile(
        settings.task, labels, settings.model.max_length, settings.model.base, dataset.fingerprint
    )
    with tracking.start_run("finetune", named) as run, storage.publish(run.ref.model_uri) as folder:
        task.save(task.build(base, named), base, info, folder)
    return run


def make_measured(run: str, dataset: str, right: float, rows: int = 400) -> Measured:
    """Figures of a model that is right on a share of the rows, beside baselines that are on half of them."""
    random = np.random.default_rng(5)
    truth = random.integers(0, len(LABELS), rows)
    table = pa.table(
        {
            "id": [f"{i:016x}" for i in range(rows)],
            "text": [f"text {i}" for i in range(rows)],
            "label": pa.array(truth, pa.int32()),
            "length": pa.array(random.integers(3, 30, rows), pa.int32()),
        }
    )

    def answers(share: float) -> np.ndarray:
        hit = np.arange(rows) < share * rows
        return np.eye(len(LABELS))[np.where(hit, truth, (truth + 1) % len(LABELS))] * 0.9 + 0.1 / len(LABELS)

    return measure(
        Subject("shop", run, "sentiment", dataset, LABELS),
        Scored(table, answers(right), LABELS, "torch fp32", 100.0),
        {name: Baseline(answers(0.5), 0.1, "made up") for name in ("tfidf", "majority")},
        EvaluationSettings(bootstrap=200),
    )


def evaluated(run: tracking.Run, dataset: DatasetRef, right: float) -> EvalReport:
    """Leave such figures as the run's evaluation, as `jobs.evaluate` does."""
    measured = make_measured(run.ref.id, dataset.fingerprint, right)
    with storage.publish(run.ref.evaluation_uri, replace=True) as folder:
        measured.report.write(folder)
        pq.write_table(measured.predictions, folder / PREDICTIONS)
    run.tag(evaluated=dataset.fingerprint)
    return measured.report
