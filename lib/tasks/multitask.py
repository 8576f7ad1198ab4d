"""Several data sets, one encoder: each has a head of its own, and every batch may mix rows of all.

A part is an ordinary use of another task (`data.parts`): its rows, labels, loss and metrics are that task's. The
encoder computes a batch once; every head reads what it gave, and a part's loss counts its own rows. On average a
row weighs as much in each part, times the part's `weight`, whether it holds one label or thirty words. After training
each part is exported as a model of its own task (`Shared.alone`).

Shapes: B rows of all parts, T tokens in the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from lib import encoders
from lib.artifacts import DatasetRef
from lib.errors import ModelError
from lib.parts import PART, own
from lib.settings import DataSettings, Settings
from lib.tasks import load_task

if TYPE_CHECKING:
    from lib.tasks import Batch, Outputs, Task

PACKS = False
METRIC = "macro_f1"


def classes(data: DataSettings) -> list[str]:
    """`PART/CLASS` of all parts."""
    return [
        f"{name}/{label}" for name, part in data.parts.items() for label in load_task(part.task).classes(part)
    ]


def _parts(settings: Settings) -> Iterator[tuple[str, Task, Settings]]:
    for name, part in settings.data.parts.items():
        yield name, load_task(part.task), settings.part(name)


class Given(nn.Module):
    """Stands in a part's model where its encoder was, and gives what the shared one has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class Shared(nn.Module):
    """One encoder under the heads of all parts."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        super().__init__()
        # Some tasks build the encoder with a pooler and others without.
        encoder = max((_encoder(model) for model in models.values()), key=_size)
        self.encoder = encoder
        self.config: Any = encoder.config
        self.given = {name: Given() for name in models}
        for name, model in models.items():
            setattr(model, str(model.base_model_prefix), self.given[name])
        self.heads = nn.ModuleDict({_key(name): model for name, model in models.items()})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Part → logits of all rows: [B, C], or [B, T, C]."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        logits = {}
        for name, given in self.given.items():
            given.output = output
            model: nn.Module = self.heads[_key(name)]
            logits[name] = model(input_ids=input_ids, attention_mask=attention_mask).logits
            given.output = None
        return logits

    def set_attn_implementation(self, name: str) -> None:
        self.encoder.set_attn_implementation(name)  # type: ignore[operator]

    def alone(self, name: str, base: Path, settings: Settings) -> nn.Module:
        """A part's model as its own task would have built it, with the weights of this one."""
        part = settings.part(name)
        model = load_task(part.task).build(base, part)
        encoder = _encoder(model)
        missing, _ = encoder.load_state_dict(self.encoder.state_dict(), strict=False)
        head = self.heads[_key(name)].state_dict()
        _, unexpected = model.load_state_dict(head, strict=False)
        if missing or unexpected:
            raise ModelError(
                f"the encoder of part {name} differs from the shared one in {[*missing, *unexpected][0]}"
            )
        return model


def _encoder(model: nn.Module) -> nn.Module:
    encoder: nn.Module = getattr(model, str(model.base_model_prefix))
    return encoder


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _key(name: str) -> str:
    """A part's name as torch takes it for a module: it may be that of one of ModuleDict's own methods."""
    return f"part_{name}"


def build(base: Path, settings: Settings, dataset: DatasetRef | None = None) -> Shared:
    """The shared encoder with a fresh head for each part, in fp32."""
    return Shared({name: task.build(base, part) for name, task, part in _parts(settings)})


def collate(rows: pa.Table, pad: int) -> Batch:
    """`input_ids` and `attention_mask` int64 [B, T]; for each part with a row here `PART/rows` int64, the places of
    its rows, and `PART/labels` as its task has them."""
    batch = encoders.inputs(rows, pad)
    places = rows[PART].to_numpy(zero_copy_only=False)
    for name in sorted(set(places.tolist())):
        chosen = np.flatnonzero(places == name)
        # Which task it is shows in the columns: words have a list of labels.
        task = load_task("tagging" if f"{name}/labels" in rows.column_names else "sentiment")
        batch[f"{name}/labels"] = task.collate(own(name, rows.take(pa.array(chosen))), pad)["labels"]
        batch[f"{name}/rows"] = torch.from_numpy(chosen.astype(np.int64))
    return batch


def balance(manifest: dict[str, Any], settings: Settings) -> dict[str, float]:
    """`PART/CLASS` → its weight in its own task, scaled so that a row of the part weighs the part's `weight` on
    average."""
    weights: dict[str, float] = {}
    for name, task, part in _parts(settings):
        train = manifest["splits"]["train"]["parts"][name]
        given = task.balance({"splits": {"train": train}}, part)
        total = sum(rows * given[label] for label, rows in train["labels"].items())
        scale = settings.data.parts[name].weight * train["rows"] / max(total, 1e-12)
        weights |= {f"{name}/{label}": scale * value for label, value in given.items()}
    return weights


def _of(name: str, balance: dict[str, float]) -> dict[str, float]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in balance.items() if key.startswith(prefix)}


def weight(rows: pa.Table, settings: Settings, balance: dict[str, float]) -> float:
    total = 0.0
    for name, task, part in _parts(settings):
        chosen = rows.filter(pc.equal(rows[PART], name))
        if len(chosen):
            total += task.weight(own(name, chosen), part, _of(name, balance))
    return total


def loss(
    model: nn.Module, batch: Batch, settings: Settings, balance: dict[str, float]
) -> tuple[torch.Tensor, Outputs]:
    """Sum of the parts' losses; in evaluation their outputs, each under `PART:TASK:NAME`."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    outputs: Outputs = {}
    total = torch.zeros((), device=batch["input_ids"].device)
    for name, task, part in _parts(settings):
        if f"{name}/rows" not in batch:
            # Every worker takes all heads in every step: under ZeRO the gradients are collective.
            total = total + 0.0 * logits[name].float().sum()
            continue
        own_logits, labels = logits[name][batch[f"{name}/rows"]], batch[f"{name}/labels"]
        if own_logits.ndim == 3:
            own_logits = own_logits[:, : labels.shape[1]]
        answer = SimpleNamespace(logits=own_logits)
        known = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        lost, found = task.loss(_answering(answer), known, part, _of(name, balance))
        total = total + lost
        outputs |= {f"{name}:{part.task}:{key}": value for key, value in found.items()}
    return total, outputs


def _answering(answer: Any) -> Any:
    """A model that has answered already."""
    return lambda **_: answer


def metrics(outputs: Outputs) -> dict[str, float]:
    """`PART/METRIC` of each part, and the means of `accuracy` and `macro_f1` over the parts."""
    parts: dict[tuple[str, str], Outputs] = {}
    for key, values in outputs.items():
        name, task, inside = key.split(":", 2)
        parts.setdefault((name, task), {})[inside] = values
    found = {name: load_task(task).metrics(values) for (name, task), values in parts.items()}
    means = {
        key: float(np.mean([one[key] for one in found.values() if key in one]))
        for key in ("accuracy", "macro_f1")
    }
    return means | {f"{name}/{key}": value for name, one in found.items() for key, value in one.items()}
