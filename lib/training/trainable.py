"""Which parameters are trained, how, and how fast: adapters, last layers, layer-wise rates, noise, checkpointing.

A model is seen as layers, what lies before them (embeddings) and what comes after (norm, pooler, heads):
the layers are its ModuleList with the most parameters, and modules are registered in the order of use.
A head is what the base model does not bring: it is trained whole, whatever else is frozen.

Works on a model that ZeRO-3 has divided already as on a whole one: no values are read, only names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lib.errors import ConfigError
from lib.settings import TrainingSettings
from lib.training import adapters


def numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also where ZeRO-3 has left a part of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def prepare(model: nn.Module, base: Path, training: TrainingSettings) -> nn.Module:
    """The model with what is not trained frozen, and adapters, noise and gradient checkpointing put in.

    `base` is the base model's directory. Raises ConfigError for targets or layers that the model has not,
    and where it cannot do what is asked for.
    """
    if training.neftune_alpha:
        _add_noise(model, training.neftune_alpha)
    if training.gradient_checkpointing:
        _checkpoint(model)
    if not training.adapter and not training.layers:
        return model
    anatomy = Anatomy.of(model, base)
    if training.adapter:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(anatomy.is_head(name))
        wrapped: nn.Module = adapters.attach(model, anatomy, training.adapter)
        return wrapped
    if training.layers:
        if training.layers > anatomy.layers:
            raise ConfigError(
                f"training.layers {training.layers} is above the model's {anatomy.layers} layers; "
                f"give 1 to {anatomy.layers}"
            )
        lowest = anatomy.layers - training.layers + 1
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(anatomy.depth(name) >= lowest)
    return model


def check(base: Path, training: TrainingSettings) -> None:
    """Raises ConfigError for what `prepare` refuses, before any worker is started: of the base model's directory
    only the configuration is read."""
    if not (training.adapter or training.layers or training.gradient_checkpointing):
        return
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):  # the layers are the same whatever head comes after them
        body = AutoModel.from_config(AutoConfig.from_pretrained(base))
    prepare(body, base, training)


def groups(model: nn.Module, base: Path | None, training: TrainingSettings) -> list[dict[str, Any]]:
    """The trained parameters as groups of torch's optimisers, none empty: matrices decay, vectors do not.

    `lr_scale` of a group is its share of the learning rate: with L layers, layer i of 1 … L has
    layer_decay^(L + 1 - i), what comes after them 1 and what lies before them layer_decay^(L + 1)
    (Howard and Ruder 2018, section 3.1; Clark et al. 2020, appendix A).
    """
    anatomy = Anatomy.of(model, base) if base and training.layer_decay < 1 else None
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            above = anatomy.layers + 1 - anatomy.depth(name) if anatomy else 0
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            found.setdefault((training.layer_decay**above, matrix), []).append(parameter)
    return [
        {
            "params": found[scale, matrix],
            "weight_decay": training.weight_decay if matrix else 0.0,
            "lr": training.learning_rate * scale,
            "lr_scale": scale,
        }
        for scale, matrix in sorted(found, reverse=True)
    ]


@dataclass(frozen=True)
class Anatomy:
    """Where a model's parts are, by the names of its parameters, adapters or not."""

    stem: str
    """Name of the list of layers."""
    layers: int
    before: frozenset[str]
    """Parameters that lie before the layers, and all embeddings."""
    heads: frozenset[str]
    """Parameters that the base model does not bring."""

    @classmethod
    def of(cls, model: nn.Module, base: Path) -> Anatomy:
        """Raises ConfigError for a model without a list of layers."""
        lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        if not lists:
            raise ConfigError(
                f"{type(model).__name__} has no list of layers, which training.adapter, layers and layer_decay "
                "go by; leave them out"
            )
        stem = max(lists, key=lambda n: sum(numel(p) for p in lists[n].parameters()))
        size, name = len(lists[stem]), adapters.plain_name(stem)
        before, after, passed = set[str](), set[str](), False  # in the order of registration
        tables = {
            adapters.plain_name(f"{n}.{p}")
            for n, m in model.named_modules()
            if isinstance(m, nn.Embedding)
            for p, _ in m.named_parameters()
        }
        for parameter, _ in model.named_parameters():
            parameter = adapters.plain_name(parameter)
            if parameter.startswith(f"{name}."):
                passed = True
            elif passed and parameter not in tables:
                after.add(parameter)
            else:
                before.add(parameter)
        return cls(name, size, frozenset(before), _heads(model, base, before, after))

    def depth(self, name: str) -> int:
        """0 before the layers, 1 … L in them, L + 1 after them."""
        name = adapters.plain_name(name)
        if name.startswith(f"{self.stem}."):
            return int(name[len(self.stem) + 1 :].split(".", 1)[0]) + 1
        return 0 if name in self.before and name not in self.heads else self.layers + 1

    def is_head(self, name: str) -> bool:
        return adapters.plain_name(name) in self.heads


def _heads(model: nn.Module, base: Path, before: set[str], after: set[str]) -> frozenset[str]:
    """What transformers puts on a base model's body, and what else the base's files do not hold.

    A model that brings its own output matrix (a language model) has no head in this sense.
    """
    from transformers import PreTrainedModel

    # A head's base and a bare base differ by a prefix (`bert.`), on either side.
    brought = tensor_names(base)
    endings = _endings(brought)
    fresh = {n for n in after if n not in endings and not brought & _endings([n])}
    root = next(((n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)), None)
    if root is None:
        return frozenset(fresh)
    name, body = root[0], root[1].base_model
    inside = {adapters.plain_name(_join(name, n)) for n, _ in _named_inside(root[1], body)}
    output = root[1].get_output_embeddings()
    outputs = {id(p) for p in output.parameters()} if output is not None else set()
    outside = {
        adapters.plain_name(n)
        for n, p in model.named_parameters()
        if adapters.plain_name(n) not in inside and id(p) not in outputs
    }
    return frozenset(fresh | (outside & (before | after)))


def tensor_names(base: Path) -> set[str]:
    """Names of the tensors in a model directory's safetensors files."""
    from safetensors import safe_open

    found = set[str]()
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    return found


def _endings(names: Iterable[str]) -> set[str]:
    """Every name, and what is left of it behind each dot."""
    found = set[str]()
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[i:]) for i in range(len(parts))}
    return found


def _named_inside(root: nn.Module, body: nn.Module) -> list[tuple[str, nn.Parameter]]:
    prefix = next((n for n, m in root.named_modules() if m is body), "")
    return [(_join(prefix, n), p) for n, p in body.named_parameters(remove_duplicate=False)]


def _join(*names: str) -> str:
    return ".".join(n for n in names if n)


def _add_noise(model: nn.Module, alpha: float) -> None:
    """Uniform noise of at most alpha / √(T · width) on embeddings [B, T, width], while training only.

    A hook, so that nothing of it is in the weights (Jain et al. 2023, algorithm 1).
    """
    from transformers.integrations.neftune import neftune_post_forward_hook

    table = _transformer(model, "training.neftune_alpha").get_input_embeddings()
    table.neftune_noise_alpha = alpha
    table.register_forward_hook(neftune_post_forward_hook)


def _checkpoint(model: nn.Module) -> None:
    transformer = _transformer(model, "training.gradient_checkpointing")
    if not transformer.supports_gradient_checkpointing:
        raise ConfigError(
            f"training.gradient_checkpointing: {type(transformer).__name__} has none; set it to false"
        )
    # Not re-entrant, so that inputs without gradients (frozen embeddings) do no harm. The check would
    # compare parameters that ZeRO-3 has divided with the same ones gathered.
    transformer.gradient_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})


def _transformer(model: nn.Module, key: str) -> Any:
    from transformers import PreTrainedModel

    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise ConfigError(f"{key} needs a model of transformers, which {type(model).__name__} is not")
    return found
