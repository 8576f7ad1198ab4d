"""Financial PhraseBank: accuracy and macro-F1 beside TF-IDF and the published FinBERT.

    make bench-phrasebank DATA=DIR        DIR holds Sentences_50Agree.txt (Malo et al. 2014)
    python -m tests.bench.phrasebank --data DIR --seeds 0 1 2

Runs the jobs as a user would, with jobs/configs/finance.yaml, on a fixed split: 80, 10 and 10 percent of the
different sentences, each class in its share, drawn with seed 0. A seed is one training run; with several their mean is
shown, and the mean of their probabilities as an ensemble. FinBERT's figures (Araci 2019, table 2: all sentences with
at least 50% agreement) are of a BERT-base that read financial news before, and of another split.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.bench.report import Report

CONFIG = "jobs/configs/finance.yaml"
FILE = "Sentences_50Agree.txt"
LABELS = ("negative", "neutral", "positive")
FINBERT = {"accuracy": 0.86, "macro_f1": 0.84}
NAMES = {"accuracy": "accuracy", "macro_f1": "macro F1"}
SPLIT_SEED = 0
TARGET = 0.86


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.phrasebank", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {FILE}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training.seed of each run")
    arguments, overrides = parser.parse_known_args()
    if not (arguments.data / FILE).is_file():
        sys.exit(
            f"error: {arguments.data} holds no {FILE}; give its folder with make bench-phrasebank DATA=DIR"
        )
    folder = Path(".whorl/bench/phrasebank").resolve()  # workers have folders of their own
    sizes = write_splits(read(arguments.data / FILE), folder)
    print(
        f"sentences: {', '.join(f'{rows:,} {split}' for split, rows in sizes.items())} (split seed {SPLIT_SEED})"
    )
    found = [train(folder, seed, overrides) for seed in arguments.seeds]
    tell(arguments.seeds, found)


def read(path: Path) -> dict[str, str]:
    """Sentence → label. A sentence that is there twice counts once, one with two labels not at all."""
    labels: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            sentence, _, label = line.rpartition("@")
            labels.setdefault(sentence.strip(), set()).add(label.strip())
    return {sentence: next(iter(given)) for sentence, given in labels.items() if len(given) == 1}


def write_splits(sentences: dict[str, str], folder: Path) -> dict[str, int]:
    """train.csv, validation.csv and test.csv; the rows of each."""
    from sklearn.model_selection import train_test_split

    rows = list(sentences.items())
    train, rest = train_test_split(
        rows, test_size=0.2, random_state=SPLIT_SEED, stratify=[label for _, label in rows]
    )
    validation, test = train_test_split(
        rest, test_size=0.5, random_state=SPLIT_SEED, stratify=[label for _, label in rest]
    )
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": train, "validation": validation, "test": test}
    for split, part in splits.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("sentence", "sentiment"), *part])
    return {split: len(part) for split, part in splits.items()}


def train(folder: Path, seed: int, overrides: list[str]) -> tuple[dict[str, float], object]:
    """One run: the best validation's figures, and what evaluation measured (`Measured`)."""
    sources = {"source": "train", "validation_source": "validation", "test_source": "test"}
    words = [word for key, name in sources.items() for word in (f"--data.{key}", str(folder / f"{name}.csv"))]
    words += ["--training.seed", str(seed), *overrides]
    os.environ["WHORL_PIPELINE"] = f"bench-phrasebank-{time.time_ns()}"
    for stage in ("preprocess", "finetune", "evaluate"):
        if code := subprocess.run(
            [sys.executable, "-m", f"jobs.{stage}", "--config", CONFIG, *words]
        ).returncode:
            sys.exit(code)

    from lib import storage, tracking
    from lib.evaluation import report as files
    from lib.settings import load_settings

    run = tracking.find_run(load_settings(CONFIG, words), "finetune", tag="evaluated")
    best = storage.read_json(storage.join(run.artifacts_uri(), "training.json"))["best"]
    return best, files.read(run.ref.evaluation_uri)


def tell(seeds: list[int], found: list[tuple[dict[str, float], object]]) -> None:
    from lib.evaluation import metrics

    report = Report("phrasebank")
    reports = [measured.report for _, measured in found]  # type: ignore[attr-defined]
    rows = reports[0].rows
    for name, title in NAMES.items():
        ours = float(np.mean([one.metrics[name] for one in reports]))
        case = f"{title}, {rows:,} sentences, mean of seeds {', '.join(map(str, seeds))}"
        report.row(case, ours, unit="", target=TARGET if name == "accuracy" else None)
        report.row(case, ours, unit="", rival="FinBERT, published", theirs=FINBERT[name])
        for rival, figures in reports[0].baselines.items():
            report.row(case, ours, unit="", rival=rival, theirs=figures[name])
    for seed, (best, _), one in zip(seeds, found, reports, strict=True):
        for name, title in NAMES.items():
            report.row(f"seed {seed}: {title} on validation", best[name], unit="")
            report.row(f"seed {seed}: {title} on test", one.metrics[name], unit="")
        report.row(f"seed {seed}: calibration error on test", one.metrics["calibration_error"], unit="")
        before = one.uncalibrated.get("calibration_error", one.metrics["calibration_error"])
        report.row(f"seed {seed}: calibration error before temperature scaling", before, unit="")
    if len(found) > 1:
        tables = [measured.predictions for _, measured in found]  # type: ignore[attr-defined]
        mean = np.mean([np.array(table["probabilities"].to_pylist()) for table in tables], axis=0)
        together = metrics.summary(tables[0]["label"].to_numpy().astype(np.int64), mean)
        for name, title in NAMES.items():
            report.row(f"ensemble of {len(found)} runs: {title} on test", together[name], unit="")
    report.finish()


if __name__ == "__main__":
    main()
