"""A user's own DeepSpeed configuration (`training.deepspeed`), laid over ours.

What another key of the configuration decides is refused when it says something else: two places that both
set the precision would leave nobody knowing which holds. `auto`, as transformers writes it, means ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lib import storage
from lib.errors import ConfigError, nearest
from lib.settings import Settings, TrainingSettings

# Key of DeepSpeed, and of all below it → ours that decides it.
OWNED = {
    "train_batch_size": "tokens_per_batch",
    "train_micro_batch_size_per_gpu": "tokens_per_batch",
    "gradient_accumulation_steps": "accumulation",
    "managed_gradient_accumulation": "accumulation",
    "gradient_clipping": "clip",
    "optimizer": "learning_rate",
    "zero_allow_untested_optimizer": "learning_rate",
    "zero_force_ds_cpu_optimizer": "learning_rate",
    "scheduler": "schedule",
    "bf16.enabled": "precision",
    "bfloat16.enabled": "precision",
    "fp16.enabled": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.cpu_offload": "offload",
    "zero_optimization.cpu_offload_params": "offload",
    "zero_optimization.offload_optimizer.device": "offload",
    "zero_optimization.offload_optimizer.nvme_path": "offload_path",
    "zero_optimization.offload_param.device": "offload",
    "zero_optimization.offload_param.nvme_path": "offload_path",
    "activation_checkpointing": "gradient_checkpointing",
    "checkpoint.load_universal": "resume",
}


def resolve(settings: Settings) -> Settings:
    """The settings with the mapping of the file that `training.deepspeed` names: workers need not see the file.

    Raises ConfigError for one that contradicts another key or that DeepSpeed would not take, StorageError
    for a file that cannot be read.
    """
    training = settings.training
    if training.deepspeed is None:
        return settings
    theirs = training.deepspeed
    if isinstance(theirs, str):
        theirs = storage.read_json(storage.uri(theirs))
        if not isinstance(theirs, dict):
            raise ConfigError(f"training.deepspeed: {training.deepspeed} must hold a JSON object")
    training = training.model_copy(update={"deepspeed": theirs})
    from lib.training import zero

    whole = zero.config(training, 1)
    _check_zero(whole["zero_optimization"])
    _check_keys(whole, theirs)
    return settings.model_copy(update={"training": training})


def merge(ours: dict[str, Any], training: TrainingSettings) -> dict[str, Any]:
    """Our configuration with the user's over it. Raises ConfigError for what contradicts another key."""
    theirs = training.deepspeed or {}
    if isinstance(theirs, str):
        raise ValueError("training.deepspeed is still the name of a file; see resolve")
    _refuse(theirs, ours, training)
    return _over(ours, theirs)


def _refuse(theirs: dict[str, Any], ours: dict[str, Any], training: TrainingSettings) -> None:
    said = {"gradient_accumulation_steps": training.accumulation}
    for key, value in _flat(theirs):
        owner = next((o for k, o in OWNED.items() if key == k or key.startswith(f"{k}.")), None)
        if owner is None or value == "auto":
            continue
        here = said.get(key, _at(ours, key))
        if value == here or (here is None and value in (None, False, "none")):
            continue
        raise ConfigError(
            f"training.deepspeed: {key} {value} contradicts training.{owner} "
            f"{getattr(training, owner)}; leave it out of training.deepspeed"
        )


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _over(ours: dict[str, Any], theirs: dict[str, Any], above: str = "") -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        if value == "auto" or f"{above}{key}" in OWNED:
            continue
        inner = merged.get(key)
        if isinstance(value, dict):
            merged[key] = _over(inner if isinstance(inner, dict) else {}, value, f"{above}{key}.")
        else:
            merged[key] = value
    return {key: value for key, value in merged.items() if value != {}}


def _check_zero(section: dict[str, Any]) -> None:
    """DeepSpeed's own check, before anything is started."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        finding = error.errors()[0]
        key = ".".join(str(part) for part in finding["loc"])
        near = nearest(key, DeepSpeedZeroConfig.model_fields)
        raise ConfigError(
            f"training.deepspeed: zero_optimization.{key}: {finding['msg'].lower()}{near}"
        ) from None


class _Watched(dict[str, Any]):
    """Remembers which keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def _check_keys(whole: dict[str, Any], theirs: dict[str, Any]) -> None:
    """DeepSpeed ignores keys that it does not know, and has no list of those that it does: what it asks for is one."""
    from deepspeed.runtime.config import DeepSpeedConfig

    watched = _Watched(whole)
    DeepSpeedConfig(watched)
    known = watched.asked | {key.partition(".")[0] for key in OWNED}
    if unknown := next((key for key in theirs if key not in known), None):
        raise ConfigError(f"training.deepspeed: {unknown} is no key of DeepSpeed's{nearest(unknown, known)}")
