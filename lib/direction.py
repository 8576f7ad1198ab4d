"""Which way a metric counts: the one place that says so, for training, search and promotion alike."""

from __future__ import annotations

# All others are the better the higher they are.
LOWER_IS_BETTER = frozenset(
    {"loss", "perplexity", "bits_per_byte", "log_loss", "brier", "calibration_error", "repetition", "cut"}
)


def lower_is_better(metric: str) -> bool:
    """`metric` may be a head's own, such as `topic/log_loss`."""
    return metric.rpartition("/")[2] in LOWER_IS_BETTER


def gain(metric: str, value: float, than: float) -> float:
    """How much better `value` is than another: above 0 when it is, whichever way the metric counts."""
    return than - value if lower_is_better(metric) else value - than
