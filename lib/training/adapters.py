"""LoRA and DoRA by PEFT: where they go, what is saved of them, how they become part of the weights.

While training only the adapters are PEFT's; heads are trained where they are. PEFT's wrapper for modules
that are saved whole would hold each of them twice, and copy what ZeRO-3 has divided.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from lib.errors import ConfigError, nearest
from lib.settings import AdapterSettings

if TYPE_CHECKING:
    from lib.training.trainable import Anatomy

WRAPPED = "base_model.model."
NAME = "default"


def plain_name(name: str) -> str:
    """The name that a parameter has without adapters."""
    return name.removeprefix(WRAPPED).replace(".base_layer.", ".")


def attach(
    model: nn.Module, anatomy: Anatomy, settings: AdapterSettings, *, whole_heads: bool = False
) -> Any:
    """The model as a PeftModel, in which adapters and heads are trained and nothing else.

    With `whole_heads` the heads are modules that PEFT saves with the adapters. Raises ConfigError for
    targets that the model has not.
    """
    from peft import LoraConfig, get_peft_model

    parameters = dict(model.named_parameters())
    heads = sorted({name.rpartition(".")[0] for name in parameters if anatomy.is_head(name)})
    targets, excluded = _targets(model, anatomy, settings, heads)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.kind == "dora",
        target_modules=targets,
        exclude_modules=excluded,
        modules_to_save=heads if whole_heads and heads else None,
    )
    # Adapters keep the type of the weights beside them: DeepSpeed trains one type.
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    if not whole_heads:
        for name, parameter in wrapped.named_parameters():
            if anatomy.is_head(name):
                parameter.requires_grad_(True)
    return wrapped


def whole_head_name(name: str, anatomy: Anatomy) -> str:
    """What a parameter of a model in training is called in one with `whole_heads`."""
    if not anatomy.is_head(name):
        return name
    module, _, last = name.rpartition(".")
    return f"{module}.modules_to_save.{NAME}.{last}"


def _targets(
    model: nn.Module, anatomy: Anatomy, settings: AdapterSettings, heads: list[str]
) -> tuple[str | list[str], str | None]:
    """`target_modules` and `exclude_modules` of PEFT's configuration."""
    inside = re.compile(rf"{re.escape(anatomy.stem)}\.\d+\.(.+)")
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    # Of one layer; layers may differ.
    relative = sorted({found[1] for name in linear if (found := inside.fullmatch(name))})
    if settings.targets == "all-linear":
        if not relative:
            raise ConfigError("training.adapter.targets: no layer of the model has a linear map")
        names = "|".join(re.escape(name) for name in relative)
        return rf"{re.escape(anatomy.stem)}\.\d+\.({names})", None
    wanted = list(settings.targets)
    known = sorted({name.rpartition(".")[2] for name in relative})
    adaptable = [n for n, m in model.named_modules() if is_linear(m) or isinstance(m, nn.Embedding)]
    adaptable = [name for name in adaptable if name not in heads]
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in adaptable):
            raise ConfigError(
                f"training.adapter.targets: the model has no {target!r}{nearest(target, known)} "
                f"(its layers have {', '.join(known)})"
            )
    clash = [h for h in heads if any(h == t or h.endswith(f".{t}") for t in wanted)]
    return wanted, "|".join(map(re.escape, clash)) or None


def is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def merge(model: Any) -> nn.Module:
    """The model with adapters added to the weights, and PEFT gone; W + alpha / rank · B · A for LoRA."""
    merged: nn.Module = model.merge_and_unload(safe_merge=True)
    return merged
