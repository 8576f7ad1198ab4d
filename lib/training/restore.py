"""From a checkpoint's parts to one whole model on the host, for the export."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lib import storage
from lib.settings import TrainingSettings
from lib.training import adapters, trainable, zero
from lib.training.trainable import Anatomy


def restore(
    model: nn.Module, base: Path, training: TrainingSettings, folder: Path, adapter_uri: str | None = None
) -> nn.Module:
    """`model`, as the task built it from `base`, with what was trained in the checkpoint in `folder`.

    Adapters are published under `adapter_uri` as PEFT reads them, and merged into the weights. No more than
    the one model and one of its parameters is in memory. Raises RuntimeError when the checkpoint does not
    hold exactly what is trained.
    """
    anatomy = None
    if training.adapter:
        anatomy = Anatomy.of(model, base)
        model = adapters.attach(model, anatomy, training.adapter, whole_heads=True)
    else:
        quiet = training.model_copy(update={"neftune_alpha": 0.0, "gradient_checkpointing": False})
        model = trainable.prepare(model, base, quiet)
    # A parameter that is used twice has two names.
    targets = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    missing = {id(p): name for name, p in targets.items() if p.requires_grad}
    for name, tensor in zero.tensors(folder):
        wanted = adapters.whole_head_name(name, anatomy) if anatomy else name
        target = targets.get(wanted, buffers.get(wanted))
        if target is None or target.shape != tensor.shape:
            raise RuntimeError(f"the checkpoint's {name} {tuple(tensor.shape)} has no place in the model")
        with torch.no_grad():
            target.copy_(tensor)
        missing.pop(id(target), None)
    if missing:
        raise RuntimeError(f"the checkpoint lacks {', '.join(sorted(missing.values()))}")
    if training.adapter:
        if adapter_uri and not storage.published(adapter_uri):
            with storage.publish(adapter_uri) as scratch:
                model.save_pretrained(str(scratch))  # type: ignore[operator]
        model = adapters.merge(model)
    return model
