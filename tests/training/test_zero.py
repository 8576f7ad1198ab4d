"""DeepSpeed's checkpoints with another number of workers: the same weights and optimiser, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from lib.artifacts import DatasetRef
from lib.settings import Settings, TrainingSettings
from lib.tasks import load_task
from lib.training import loop, zero
from lib.training.checkpoints import State
from tests.trained import make_dataset, use

STEPS = 3


def worker(config: dict[str, Any]) -> list[float]:
    """Train a few steps, or go on from a checkpoint, and save; the weight decay of each parameter group."""
    settings = Settings.model_validate(config["settings"])
    world, came_from = dist.get_world_size(), config["from"]
    state = State.read(f"file://{came_from}") if came_from else State(world)
    engine = loop.start_engine(settings, state, came_from, world)
    if not came_from:
        task = load_task(settings.task)
        rows = pq.read_table(config["shard"]).slice(8 * dist.get_rank(), 8)
        batch, balance = task.collate(rows, 0), dict.fromkeys(settings.data.label_names, 1.0)
        for _ in range(STEPS):
            engine.backward(task.loss(engine, batch, settings, balance)[0], scale_wrt_gas=False)
            engine.step()
    engine.save_checkpoint(config["to"], tag=zero.ENGINE)
    if dist.get_rank() == 0:
        State(world, step=STEPS).write(Path(config["to"]))
    return [group["weight_decay"] for group in engine.optimizer.param_groups]


def carried(settings: Settings, world: int, shard: str, came_from: Path | None, to: Path) -> list[float]:
    to.mkdir()
    result = TorchTrainer(
        worker,
        train_loop_config={
            "settings": settings.model_dump(mode="json"),
            "shard": shard,
            "from": str(came_from) if came_from else None,
            "to": str(to),
        },
        scaling_config=ScalingConfig(num_workers=world, resources_per_worker={"CPU": 0.5}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(name=to.name, storage_path=str(to.parent / "ray")),
    ).fit()
    decay: list[float] = result.return_value
    return decay


def by_parameter(folder: Path, to: Path) -> dict[str, Any]:
    """Every tensor of a universal checkpoint: `name/fp32`, `name/exp_avg`, `name/exp_avg_sq`, and the step."""
    zero.to_universal(folder, to)
    parts = to / zero.ENGINE / "zero"
    found: dict[str, Any] = {}
    for file in sorted(parts.rglob("*.pt")):
        value = torch.load(file, weights_only=False)
        if file.name == "optimizer_state.pt":
            inner = value.get("optimizer_state_dict", {}).get("state", {})
            if 0 in inner:  # stage 3 keeps it here, the others beside each parameter
                found["step"] = float(inner[0]["step"])
        else:  # stage 3 writes the bare tensor
            tensor = value["param"] if isinstance(value, dict) else value
            found[str(file.relative_to(parts))] = float(value) if file.stem == "step" else tensor
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("before", "after"), [(2, 1)])
def test_weights_and_optimiser_are_carried_over(
    before: int, after: int, stage: int, ray_cluster: None, storage: Path, tiny_base: Path, tmp_path: Path
) -> None:
    training = TrainingSettings(
        zero_stage=stage, precision="fp32", learning_rate=1e-3, weight_decay=0.1, cpus_per_worker=0.5
    )
    settings = use(tiny_base).model_copy(update={"training": training})
    dataset: DatasetRef = make_dataset(settings, rows=60)
    shard = dataset.shards("train")[0].removeprefix("file://")
    first, second = tmp_path / "first", tmp_path / "second"
    carried(settings, before, shard, None, first)
    decay = carried(settings, after, shard, first, second)
    assert decay == [0.1, 0.0]
    saved = by_parameter(first, tmp_path / "first-universal")
    loaded = by_parameter(second, tmp_path / "second-universal")
    assert saved.keys() == loaded.keys()
    moments = [name for name in saved if name.endswith("exp_avg.pt")]
    assert len(moments) > 30
    # Three steps went by: neither the weights nor the moments are those of a new engine.
    assert all(np.abs(saved[name].numpy()).max() > 0 for name in moments if "token_type" not in name)
    for name, value in saved.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, loaded[name]), name
        else:
            assert value == loaded[name] == STEPS, name
