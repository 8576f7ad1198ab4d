"""Figures as PNG bytes: confusion matrix, reliability diagram, the model beside its baselines."""

from __future__ import annotations

import numpy as np

from lib.pages import BLUE, GREY, INK, LIGHT, RED, figure, plain, png

# Above this many classes the numbers in the cells could no longer be read.
MOST_ANNOTATED = 12


def confusion_plot(confusion: np.ndarray, names: list[str], title: str) -> bytes:
    """Colour is the share of the row (the recall of a class on the diagonal); cells hold count and share."""
    from matplotlib.ticker import PercentFormatter

    rows = confusion.sum(1, keepdims=True)
    share = np.divide(confusion, rows, out=np.zeros(confusion.shape), where=rows > 0)
    classes = len(names)
    side = float(np.clip(2.6 + 0.95 * classes, 4.6, 14))
    drawn = figure(side + 1.1, side)
    axes = drawn.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    drawn.colorbar(image, ax=axes, label="share of the true class", format=PercentFormatter(1), shrink=0.8)
    size = 11 if classes <= 6 else 8
    if classes <= MOST_ANNOTATED:
        for true in range(classes):
            for predicted in range(classes):
                value = share[true, predicted]
                axes.text(
                    predicted,
                    true,
                    f"{confusion[true, predicted]:,}\n{value:.0%}",
                    ha="center",
                    va="center",
                    color="white" if value > 0.55 else INK,
                    fontsize=size,
                )
    ticks = range(classes)
    down = [f"{name}\n({int(n):,})" for name, n in zip(names, rows[:, 0], strict=True)]
    tilt = 45 if classes > 4 or max(map(len, names)) > 12 else 0
    axes.set_xticks(ticks, names, rotation=tilt, ha="right" if tilt else "center", fontsize=size)
    axes.set_yticks(ticks, down, fontsize=size)
    axes.set(xlabel="predicted", ylabel="true (rows)", title=title)
    return png(drawn)


def reliability_plot(bins: list[dict[str, float]], error: float, title: str) -> bytes:
    """Accuracy against confidence, bin by bin, with the gap between them; below, where the rows are."""
    from matplotlib.ticker import PercentFormatter

    drawn = figure(6.2, 7.0)
    upper, lower = drawn.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    filled = [b for b in bins if b["rows"]]
    middle = np.array([(b["lower"] + b["upper"]) / 2 for b in filled])
    width = (bins[0]["upper"] - bins[0]["lower"]) * 0.94
    accuracy, confidence, rows = (
        np.array([b[key] for b in filled]) for key in ("accuracy", "confidence", "rows")
    )
    upper.bar(middle, accuracy, width, color=LIGHT, edgecolor=BLUE, label="accuracy")
    low, height = np.minimum(accuracy, confidence), np.abs(confidence - accuracy)
    for mask, hatch, name in (
        (accuracy < confidence, "///", "too sure: confidence above accuracy"),
        (accuracy > confidence, "...", "not sure enough: accuracy above confidence"),
    ):
        if mask.any():
            gap = {"facecolor": RED + "30", "edgecolor": RED, "hatch": hatch, "label": name}
            upper.bar(middle[mask], height[mask], width, low[mask], **gap)
    upper.plot([0, 1], [0, 1], "--", color=INK, lw=1, label="perfectly calibrated")
    upper.set(ylabel="accuracy", ylim=(0, 1), title=title)
    upper.yaxis.set_major_formatter(PercentFormatter(1))
    upper.legend(loc="upper left", frameon=False)
    text = f"expected calibration error {error:.1%}\n{len(bins)} bins, {int(rows.sum()):,} rows"
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": GREY}
    upper.text(0.97, 0.05, text, transform=upper.transAxes, ha="right", bbox=box, zorder=4)
    total = rows.sum()
    lower.bar(middle, rows / total, width, color=GREY)
    for value, style, name in (
        (float(rows @ confidence / total), "-", "mean confidence"),
        (float(rows @ accuracy / total), ":", "accuracy"),
    ):
        lower.axvline(value, color=INK, ls=style, lw=1.4, label=f"{name} {value:.1%}")
    lower.legend(loc="upper left", frameon=False)
    lower.set(xlabel="confidence (probability of the predicted class)", ylabel="share of rows", xlim=(0, 1))
    for axis in (lower.xaxis, lower.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    plain(upper, lower)
    return png(drawn)


def comparison_plot(
    scores: dict[str, float], intervals: dict[str, list[float]], title: str, metric: str = "macro-F1"
) -> bytes:
    """The metric of each system with its 95% interval; the first is the model itself."""
    names = list(scores)
    drawn = figure(6.4, 1.3 + 0.55 * len(names))
    axes = drawn.add_subplot()
    for place, name in enumerate(names):
        value, colour = scores[name], BLUE if place == 0 else GREY
        axes.barh(place, value, 0.55, color=colour)
        end = value
        if name in intervals:
            low, end = intervals[name]
            axes.errorbar(
                value, place, xerr=[[max(value - low, 0)], [max(end - value, 0)]], color=INK, capsize=4
            )
        axes.text(max(value, end) + 0.012, place, f"{value:.3f}", va="center", color=INK)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=f"{metric} on the test split, with 95% bootstrap intervals", xlim=(0, 1), title=title)
    plain(axes)
    return png(drawn)
