"""CoNLL-2003 named entities: the figures that the mission's paper prints, beside those of this project.

    make bench-ner DATA=DIR        DIR holds eng.train, eng.testa and eng.testb

Runs the jobs as a user would, with jobs/configs/ner.yaml, and measures the 46,435 words of the test split. The
paper prints F1 over words: micro-average (which is accuracy), macro-average and weighted by class.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.report import Report

CONFIG = "jobs/configs/ner.yaml"
PAPER = {"accuracy": 0.973, "macro_f1": 0.909, "weighted_f1": 0.973}
NAMES = {"accuracy": "micro F1", "macro_f1": "macro F1", "weighted_f1": "weighted F1"}
FILES = {"source": "eng.train", "validation_source": "eng.testa", "test_source": "eng.testb"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ner", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of eng.train, eng.testa, eng.testb")
    folder = parser.parse_args().data
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        sys.exit(
            f"error: {folder} holds no {missing[0]}; give CoNLL-2003's folder with make bench-ner DATA=DIR"
        )
    words = [word for key, name in FILES.items() for word in (f"--data.{key}", str(folder / name))]
    os.environ["WHORL_PIPELINE"] = f"bench-ner-{time.time_ns()}"
    for stage in ("preprocess", "finetune", "evaluate"):
        command = [sys.executable, "-m", f"jobs.{stage}", "--config", CONFIG, *words]
        if code := subprocess.run(command).returncode:
            sys.exit(code)

    from lib import tracking
    from lib.settings import load_settings

    run = tracking.find_run(load_settings(CONFIG, words), "finetune", tag="evaluated")
    found = run.ref.evaluation()
    report = Report("ner")
    for metric, theirs in PAPER.items():
        case = f"{NAMES[metric]}, {found.rows:,} words"
        report.row(case, found.metrics[metric], unit="", rival="paper", theirs=theirs, target=1.0)
    for name in ("lookup", "majority"):
        figures = found.baselines[name]
        report.row(
            "macro F1, words", found.metrics["macro_f1"], unit="", rival=name, theirs=figures["macro_f1"]
        )
        report.row(
            "F1, entities", found.metrics["entity_f1"], unit="", rival=name, theirs=figures["entity_f1"]
        )
    for label, figures in found.per_class.items():
        report.row(f"{label}: F1 of {int(figures['rows']):,} words", figures["f1"], unit="")
    for metric in ("entity_precision", "entity_recall", "entity_f1"):
        report.row(metric.replace("_", " "), found.metrics[metric], unit="")
    report.finish()


if __name__ == "__main__":
    main()
