"""Will it fit, how long does it take, what does it cost: told without starting anything.

    python -m jobs.plan --config jobs/configs/reviews.yaml [--plan.accelerator h100 --plan.workers "[1, 8]" ...]
    python -m jobs.plan --config jobs/configs/reviews.yaml --plan.architecture llama-70b --plan.tokens 1000000000
    python -m jobs.plan --config jobs/configs/support_chat.yaml --plan.accelerator h100 --emit k8s > mine.yaml

For each ZeRO stage, offload and number of workers: memory by part, whether it fits, step time, time and cost
of the run, checkpoints, and the cheapest layout that fits. Reads config.json and the headers of the weights,
and the dataset's manifest when there is one. Formulas and assumptions: lib/planner. `--emit k8s` (plan.emit) prints,
instead of tables, the recommended layout as manifests for Kubernetes (k8s/README.md).
"""

from __future__ import annotations

import contextlib
import sys

from lib.command import main, split_arguments
from lib.data.plan import plan as dataset_plan
from lib.errors import ConfigError, WhorlError
from lib.planner import manifests
from lib.planner.layouts import report
from lib.planner.tables import render
from lib.settings import Settings, parse_overrides
from lib.tasks import judged


def plan(settings: Settings) -> None:
    if judged(settings.task) == "rankings" and not settings.plan.architecture:
        raise ConfigError(
            f"jobs.plan reckons with the layers of a language model; what a {settings.task} model takes goes by its items: "
            "rows of data.items · model.recommender.width · 16 bytes on each worker"
        )
    if settings.plan.emit == "tables":
        print(render(report(settings, training_tokens(settings))))
        return
    if settings.plan.architecture:
        raise ConfigError("--emit k8s is of a model that is trained: model.base, not plan.architecture")
    with contextlib.redirect_stdout(sys.stderr):  # a base model that is converted says so
        found = report(settings, training_tokens(settings))
    path, overrides = split_arguments(words())
    # What the plan weighed up is in the layout that it chose.
    kept = {k: v for k, v in parse_overrides(overrides).items() if not k.startswith("plan.")}
    print(manifests.render(found, path, kept), end="")


def words() -> list[str]:
    """The command line; `--emit` stands for `--plan.emit`."""
    return [f"--plan.{word[2:]}" if word.split("=")[0] == "--emit" else word for word in sys.argv[1:]]


def training_tokens(settings: Settings) -> int | None:
    """Tokens of one epoch: `plan.tokens`, else what the manifest counts, else None."""
    if settings.plan.tokens is not None:
        return settings.plan.tokens
    if settings.plan.architecture:  # the dataset belongs to another model
        return None
    try:
        dataset = dataset_plan(settings, fresh=False).ref
    except WhorlError:  # no source yet; jobs.preprocess says what is wrong with it
        return None
    if not dataset.exists():
        return None
    tokens: int | None = dataset.manifest()["splits"]["train"].get("tokens")
    return tokens


if __name__ == "__main__":
    main(plan, words())
