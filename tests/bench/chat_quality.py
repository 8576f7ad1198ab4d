"""What fine-tuning does for a chat model: SmolLM2-135M-Instruct before, after full tuning, and after LoRA.

    make bench-chat-quality

Runs the jobs as a user would on two sets of dialogues that no model has seen the test questions of:

    tech-support   jobs/configs/support_chat.yaml as it is. 10 different questions, one of them the test: it shows
                   the line at work, and says little about quality.
    small-talk     715 short dialogues, each question once: some 70 different ones in the test.

Perplexity is over the answers of the whole test split, ROUGE-L and chrF over generated ones (lib.evaluation.chat).
Beside the table: learning curves of all runs as PNG, and a page of conversations with every model's answers. A run
whose fine-tuning fails is reported and left out, so that the others are not lost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import storage
from tests.bench.report import Report

CONFIG = "jobs/configs/support_chat.yaml"
DATA = {
    "tech-support": [],
    "small-talk": [
        "--name", "small-talk",
        "--data.source", "sample://small-talk",
        "--data.duplicates", "drop",
        "--training.epochs", "3",
        "--training.validate_every", "epoch",
    ],
}  # fmt: skip
# LoRA's matrices start at nothing and take ten times the learning rate of the weights (Schulman et al. 2025).
MODELS = {
    "full": [],
    "LoRA": ["--training.adapter", "{kind: lora, rank: 16, alpha: 32}", "--training.learning_rate", "1e-3"],
}
# Metric → whether more is better.
METRICS = {"perplexity": False, "rouge_l": True, "chrf": True}
TEMPLATE = Path(__file__).with_name("chat_quality.html.j2")


@dataclass(frozen=True)
class Tuned:
    """One evaluated run."""

    data: str
    model: str
    report: Any
    summary: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.chat_quality", description=__doc__)
    parser.add_argument("--data", choices=list(DATA), nargs="*", default=list(DATA))
    parser.add_argument("--models", choices=list(MODELS), nargs="*", default=list(MODELS))
    parser.add_argument(
        "words", nargs="*", help="overrides for all runs, behind --, such as -- --data.limit 40"
    )
    given = parser.parse_args()
    report, tuned = Report("chat-quality"), []
    for data in given.data:
        for model in given.models:
            print(f"{data}, {model}", flush=True)
            if found := tune(data, model, [*DATA[data], *MODELS[model], *given.words]):
                tuned.append(found)
    if not tuned:
        sys.exit("error: no run succeeded")
    for one in tuned:
        rows(report, one)
    report.finish()
    folder = Path(storage.PROJECT) / ".whorl" / "bench" / "chat-quality"
    folder.mkdir(parents=True, exist_ok=True)
    curves(tuned, folder / "curves.png")
    (folder / "answers.html").write_text(page(tuned), encoding="utf-8")
    print(f"written: {folder / 'curves.png'}\nwritten: {folder / 'answers.html'}")


def tune(data: str, model: str, words: list[str]) -> Tuned | None:
    """Preprocess, fine-tune and evaluate; None, with the end of its output, when a stage failed."""
    from lib import tracking
    from lib.settings import load_settings

    pipeline = f"bench-chat-quality-{time.time_ns()}"
    for stage in ("preprocess", "finetune", "evaluate"):
        command = [sys.executable, "-m", f"jobs.{stage}", "--config", CONFIG, *words]
        done = subprocess.run(
            command, env={**os.environ, "WHORL_PIPELINE": pipeline}, capture_output=True, text=True
        )
        if done.returncode:
            print(
                f"{data}, {model}: {stage} ended with {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}"
            )
            return None
    os.environ["WHORL_PIPELINE"] = pipeline
    run = tracking.find_run(load_settings(CONFIG, words), "finetune", tag="evaluated")
    del os.environ["WHORL_PIPELINE"]
    summary = json.loads(Path(run.client.download_artifacts(run.ref.id, "training.json")).read_text())
    return Tuned(data, model, run.ref.evaluation(), summary)


def rows(report: Report, one: Tuned) -> None:
    """The model beside its base, and beside looked-up answers where those have the metric."""
    found = one.report
    for metric, higher in METRICS.items():
        for rival in ("base", "nearest"):
            theirs = found.baselines[rival].get(metric)
            if theirs is None:
                continue
            case = f"{one.data}, {one.model}: {metric.replace('_', ' ')}"
            report.row(
                case, found.metrics[metric], unit="", rival=rival, theirs=theirs, higher_is_better=higher
            )
    for metric in ("exact_match", "distinct_2", "repetition", "cut", "tokens_mean"):
        report.row(f"{one.data}, {one.model}: {metric.replace('_', ' ')}", found.metrics[metric], unit="")
    report.row(f"{one.data}, {one.model}: training", one.summary["seconds"], unit="s")
    report.row(
        f"{one.data}, {one.model}: peak memory", max(one.summary["peak_memory_gib"]), unit="GiB a worker"
    )


def curves(tuned: list[Tuned], path: Path) -> None:
    """Training and validation loss of every run over its steps; a picture for each set of dialogues."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(one.data for one in tuned))
    figure = Figure(figsize=(6 * len(sets), 4), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        for one in tuned:
            if one.data != data:
                continue
            history, validations = one.summary["history"], one.summary["validations"]
            (line,) = axes.plot([r["step"] for r in history], [r["loss"] for r in history], alpha=0.5)
            axes.plot(
                [v["step"] for v in validations], [v["loss"] for v in validations],
                "o-", color=line.get_color(), label=f"{one.model}, validation",
            )  # fmt: skip
        axes.set(title=data, xlabel="step", ylabel="loss of an answer token (pale: training)")
        axes.legend()
    figure.savefig(path, dpi=110)


def page(tuned: list[Tuned]) -> str:
    """Conversations that all models of a set of dialogues answered, side by side."""
    from jinja2 import Environment, StrictUndefined

    sets = []
    for data in dict.fromkeys(one.data for one in tuned):
        runs = [one for one in tuned if one.data == data]
        said = {one.model: {t["id"]: t for t in one.report.answers.conversations} for one in runs}
        first = next(iter(said.values()))
        talks = [
            {
                **talk,
                "answers": {
                    "before": talk["answers"]["base"],
                    **{model: of[name]["answers"]["model"] for model, of in said.items()},
                },
            }
            for name, talk in first.items()
            if all(name in of for of in said.values())
        ]
        sets.append({"name": data, "talks": talks})
    # Conversations are users' and models': whatever they hold is shown, never run.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(sets=sets)


if __name__ == "__main__":
    main()
