"""Temperature scaling: one number that makes a classifier's scores mean what they say.

Logits are divided by T before the softmax; T is what makes the true classes of the validation split likeliest
(Guo et al. 2017, section 4.2). The predicted class does not change. Below 1 the model was too modest, above 1
too sure.
"""

from __future__ import annotations

import numpy as np

# A split without a mistake asks for a temperature of 0, which would make every later mistake a certain one.
LOWEST, HIGHEST = 0.25, 20.0
# More rows would not move the second digit.
ROWS = 100_000


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T for logits [N, C] whose true classes are labels [N] below C, between 0.25 and 20; 1 without rows."""
    from scipy.optimize import minimize_scalar

    if not len(labels):
        return 1.0
    if len(labels) > ROWS:
        chosen = np.linspace(0, len(labels) - 1, ROWS).astype(np.int64)
        logits, labels = logits[chosen], labels[chosen]
    # Differences to the true class's logit: negative log-likelihood is the log of their summed exponents.
    above = logits.astype(np.float64)
    above = above - above[np.arange(len(labels)), labels][:, None]

    def loss(log_temperature: float) -> float:
        scaled = above / np.exp(log_temperature)
        highest = scaled.max(-1)
        return float((highest + np.log(np.exp(scaled - highest[:, None]).sum(-1))).mean())

    # Convex in 1/T, so it has one minimum in log T too.
    found = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded")
    return float(np.exp(found.x))
