"""A search as pictures: every trial as a line through its values, and which value mattered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lib.settings import Dimension
from lib.training.search import Found, Trial

# Fewer trials with a score say nothing about importance.
FEWEST = 4


def draw(found: Found, space: dict[str, Dimension], folder: Path) -> list[Path]:
    """Write `parallel.png`, and `importance.png` where there are enough trials; their paths."""
    scored = [trial for trial in found.trials if trial.score is not None]
    pictures = [_parallel(scored, space, found, folder / "parallel.png")]
    weights = importance(scored, space)
    if weights:
        pictures.append(_importance(weights, found.metric, folder / "importance.png"))
    return pictures


def importance(trials: list[Trial], space: dict[str, Dimension]) -> dict[str, float]:
    """Key → share of the score's variance that it explains (fANOVA: Hutter et al. 2014, by Optuna).

    Empty when there are too few trials, or all scored alike.
    """
    scores = [trial.score for trial in trials]
    if len(trials) < FEWEST or len(set(scores)) < 2:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    distributions = {key: _distribution(dimension) for key, dimension in space.items()}
    for trial in trials:
        values = {
            key: repr(value) if dimension.chosen[0] == "choice" else value
            for key, value in trial.values.items()
            if (dimension := space.get(key))
        }
        study.add_trial(
            optuna.trial.create_trial(params=values, distributions=distributions, value=trial.score)
        )
    weights: dict[str, float] = optuna.importance.get_param_importances(study)
    return weights


def _distribution(dimension: Dimension) -> Any:
    from optuna import distributions

    kind, value = dimension.chosen
    match kind:
        case "uniform" | "log_uniform":
            return distributions.FloatDistribution(value[0], value[1], log=kind == "log_uniform")
        case "integer":
            return distributions.IntDistribution(value[0], value[1])
        case _:
            return distributions.CategoricalDistribution([repr(v) for v in value])


def _parallel(trials: list[Trial], space: dict[str, Dimension], found: Found, path: Path) -> Path:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * (len(space) + 1) + 1, 5), layout="constrained")
    axes = figure.subplots()
    scores = [trial.score or 0.0 for trial in trials]
    low, high = min(scores), max(scores)
    keys = list(space)
    for trial in reversed(trials):  # the best last, on top
        heights = [place(space[key], trial.values[key]) for key in keys]
        height = ((trial.score or 0.0) - low) / (high - low) if high > low else 0.5
        good = 1 - height if found.lower_is_better else height
        axes.plot([*heights, height], color=colormaps["viridis"](good), linewidth=1 + 2 * good)
    for i, key in enumerate(keys):
        axes.axvline(i, color="grey", linewidth=0.8)
        for end in space[key].ends:
            axes.annotate(f"{end:.3g}" if isinstance(end, float) else str(end), (i, place(space[key], end)))
    axes.axvline(len(keys), color="grey", linewidth=0.8)
    axes.annotate(f"{low:.4g}", (len(keys), 0))
    axes.annotate(f"{high:.4g}", (len(keys), 1))
    names = [*(key.rpartition(".")[2] for key in keys), found.metric]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    axes.set(title=f"{len(trials)} trials", ylim=(-0.05, 1.08))
    figure.savefig(path, dpi=110)
    return path


def place(dimension: Dimension, value: Any) -> float:
    """Where a value lies between the ends of its dimension, 0 to 1."""
    kind, given = dimension.chosen
    if kind == "choice":
        return float(given.index(value) / max(len(given) - 1, 1))
    low, high = given
    if kind == "log_uniform":
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def _importance(weights: dict[str, float], metric: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 * len(weights) + 1.5), layout="constrained")
    axes = figure.subplots()
    names = sorted(weights, key=lambda name: weights[name])
    axes.barh(names, [weights[name] for name in names], color="#2f6db3")
    axes.set(title=f"share of {metric}'s variance that each explains (fANOVA)", xlim=(0, 1))
    figure.savefig(path, dpi=110)
    return path
