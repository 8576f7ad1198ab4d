"""What a search may try: checked before anything is started."""

from __future__ import annotations

from lib.errors import ConfigError
from lib.settings import Settings, override

# What takes effect when a training goes on from a checkpoint: neither what the checkpoint holds nor the order
# of the data depends on these.
MUTABLE = (
    "training.learning_rate",
    "training.weight_decay",
    "training.clip",
    "training.label_smoothing",
    "training.warmup",
    "training.schedule",
    "training.class_weights",
    "model.dropout",
)


def check(settings: Settings) -> None:
    """Raises ConfigError for a search without a space, with a value that the configuration does not allow, or
    with what its scheduler cannot do.
    """
    tuning = settings.tuning
    if not tuning.space:
        raise ConfigError(
            "tuning.space is empty; name what is searched, such as "
            "tuning.space.training.learning_rate: {log_uniform: [1e-5, 1e-3]}"
        )
    for key, dimension in tuning.space.items():
        for value in dimension.ends:
            override(settings, {key: value}, f"tuning.space.{key}")
    if tuning.scheduler == "pbt":
        _check_population(settings)


def _check_population(settings: Settings) -> None:
    tuning = settings.tuning
    if tuning.algorithm == "tpe":
        raise ConfigError(
            "tuning.algorithm tpe does not go with tuning.scheduler pbt, which chooses the values itself; "
            "leave tuning.algorithm out"
        )
    if tuning.trials < 2:
        raise ConfigError(
            "tuning.trials 1: with tuning.scheduler pbt trials take over from one another; give it 2 or more"
        )
    for key in tuning.space:
        if key not in MUTABLE:
            raise ConfigError(
                f"tuning.space.{key}: tuning.scheduler pbt changes values during a training, which {key} does "
                f"not allow; those that do are {', '.join(MUTABLE)}"
            )
