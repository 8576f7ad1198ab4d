"""DeepSpeed: its configuration from ours, the engine, and what was trained out of its shards."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib import tracking
from lib.settings import TrainingSettings
from lib.training import disk, overrides, trainable
from lib.training.checkpoints import ENGINE, is_partial

# Of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def precision(training: TrainingSettings) -> str:
    """`bf16`, `fp16` or `fp32` for this worker's hardware."""
    if training.precision != "auto":
        return training.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return tracking.cpu_precision()


def config(training: TrainingSettings, parameters: int, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration (https://www.deepspeed.ai/docs/config-json/) for a model of that size.

    `universal`: the checkpoint that will be loaded is one of `to_universal`. Raises ConfigError for a
    `training.deepspeed` that contradicts another key.
    """
    number = precision(training)
    # Buffers of a bucket's size are allocated whole: no larger than what is ever in them,
    # and a multiple of the alignment that DeepSpeed asks for.
    bucket = min(-(-parameters // 1024) * 1024, 200_000_000)
    ours = {
        # Batches are cut by tokens, so their number of rows is not fixed: DeepSpeed only wants a number.
        "train_micro_batch_size_per_gpu": 1,
        # step() ends an accumulation: the last group of a window may be shorter than the others.
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.clip,
        # bf16 has fp32's range, so nothing overflows step by step; the loop looks for a loss that is not finite.
        "bf16": {"enabled": number == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": number == "fp16"},
        "zero_optimization": {
            "stage": training.zero_stage,
            "overlap_comm": torch.cuda.is_available() and training.zero_stage == 2,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **_offload(training),
        },
        # torch's fused AdamW is ours to choose: DeepSpeed would compile one of its own first.
        "zero_allow_untested_optimizer": True,
        # On a host it takes as long as DeepSpeed's own, which would be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }
    return overrides.merge(ours, training)


def _offload(training: TrainingSettings) -> dict[str, Any]:
    """What of `zero_optimization` moves states, or parameters too, to the host or to its disk."""
    if training.offload == "none":
        return {}
    place: dict[str, Any] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if training.offload_path:
        place |= {"device": "nvme", "nvme_path": str(disk.folder(training))}
    both = {"offload_optimizer": place, "offload_param": dict(place)}
    return both if training.offload == "all" else {"offload_optimizer": place}


def _distributed() -> None:
    """DeepSpeed's communication, on the process group that there is."""
    import deepspeed

    # The shared-memory operator serves inference only, and building it takes a compiler and 40 s.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


@contextmanager
def divided(training: TrainingSettings) -> Iterator[None]:
    """With ZeRO-3 and `zero_init`, models that transformers builds inside are divided while they are read.

    Collective. The first rank reads one tensor after the other from the safetensors files, which are mapped
    and not loaded, every rank keeps its part of each (deepspeed.zero.Init); else nothing is changed.
    """
    if training.zero_stage != 3 or not training.zero_init:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    _distributed()
    held = HfDeepSpeedConfig(config(training, 1))  # transformers keeps only a weak reference
    try:
        with freed_at_once():
            yield
    finally:
        unset_hf_deepspeed_config()
        del held


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Memory of whole tensors goes back to the system as soon as they are freed, where the C library is glibc.

    It raises its threshold for that with what is freed, up to 32 MiB, and keeps the rest in its heap: between the parts
    that stay, the heap of a model that is divided while it is read grows to more than the whole of it.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    option(M_MMAP_THRESHOLD, 1 << 18)
    try:
        yield
    finally:  # where it stands in the end of itself; training takes and frees the same sizes again and again
        option(M_MMAP_THRESHOLD, 32 << 20)
        option(M_TRIM_THRESHOLD, 64 << 20)


def initialize(
    model: nn.Module, training: TrainingSettings, universal: bool = False, base: Path | None = None
) -> Any:
    """A DeepSpeed engine around `model`, on the process group that Ray Train has made.

    `base` is the base model's directory, which `training.layer_decay` goes by.
    """
    import deepspeed

    _distributed()
    groups = trainable.groups(model, base, training)
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, fused=True)
    parameters = sum(trainable.numel(p) for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config(training, parameters, universal)
    )
    return engine


def load(engine: Any, folder: Path) -> None:
    """Weights, optimiser and fp32 masters from a folder that holds the parts of all workers.

    Collective. The folder's `engine` comes from as many workers as there are, or from `to_universal`.
    Frozen parameters stay what they are: they come from the base model.
    """
    groups = engine.optimizer.param_groups
    own = [{key: group[key] for key in ("weight_decay", "lr_scale")} for group in groups]
    if hasattr(engine.optimizer, "bit16_groups"):
        engine.optimizer.load_hp_checkpoint_state_from_checkpoint_dir = partial(
            _load_universal, engine.optimizer
        )
    strict = not is_partial(engine.module)
    if disk.swaps(engine):
        with disk.without_states(engine):
            path, _ = engine.load_checkpoint(
                str(folder), tag=ENGINE, load_module_strict=strict, load_optimizer_states=False
            )
        disk.load(
            engine, _mapped(Path(engine._get_zero_ckpt_name(str(folder), ENGINE)))["optimizer_state_dict"]
        )
    else:
        path, _ = engine.load_checkpoint(str(folder), tag=ENGINE, load_module_strict=strict)
    if path is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
    # From a universal checkpoint ZeRO-3 gives every group what the first one had.
    for group, values in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(values)


def _load_universal(optimizer: Any, _: str, folder: str) -> None:
    """What ZeRO-1 and 2 keep of a universal checkpoint: this rank's part of every parameter's weights and moments.

    DeepSpeed's own (`DeepSpeedOptimizer.load_hp_checkpoint_state_from_checkpoint_dir`) stops with an IndexError
    on a rank that holds nothing of a group, such as the two biases of a head beside an adapter.
    """
    from deepspeed.utils.tensor_fragment import map_to_flat_opt_states

    parts = Path(folder) / "zero"
    saved = torch.load(parts / "optimizer_state.pt", weights_only=False)
    optimizer._load_global_state(saved)
    inner = optimizer.optimizer
    for group, saved_group, parameters in zip(
        inner.param_groups, saved["param_groups"], optimizer.bit16_groups, strict=True
    ):
        own = [p for p in parameters if p._hp_mapping is not None]
        steps = [p.load_hp_checkpoint_state(str(parts / optimizer.param_names[p]), 0, 1) for p in own]
        if own:
            flat = group["params"][0]
            inner.state[flat]["step"] = steps[0]
            map_to_flat_opt_states(flat, own, inner.state, own[0]._hp_mapping.get_optim_state_keys())
        group.update({key: value for key, value in saved_group.items() if key != "params"})


def is_divided(folder: Path) -> bool:
    """Whether the workers hold different parts, so that another number of them cannot load it as it is."""
    return any((folder / ENGINE).glob("*optim_states.pt"))


def to_universal(folder: Path, destination: Path) -> None:
    """Rewrite a checkpoint by parameters instead of by workers, for any number of workers to load.

    DeepSpeed's universal checkpoint (Lian et al. 2024, https://arxiv.org/abs/2406.18820).
    """
    destination.mkdir(parents=True)
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
        "--input_folder", str(folder / ENGINE), "--output_folder", str(destination / ENGINE),
        "--num_extract_workers", str(min(4, os.cpu_count() or 1)),
        "--num_merge_workers", str(min(2, os.cpu_count() or 1)),
        # Below stage 3 it asks for a note that only Megatron's checkpoints carry.
        "--inject_missing_state",
    ]  # fmt: skip
    # A program of its own: it prints much, and its pools must not fork a process that holds gloo's threads.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ds_to_universal failed on {folder}: {done.stderr[-2000:]}")


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of each trained parameter, joined from the parts that the workers wrote, one by one.

    In fp32, but without ZeRO in the type that was trained in.

    The files are mapped, not read: no more than one parameter is in memory at a time. They are our own
    run's and never a user's, which is why they may be unpickled.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = folder / ENGINE
    files = sorted(engine.glob("*optim_states.pt"), key=lambda f: int(re.findall(r"rank_(\d+)_", f.name)[0]))
    if not files:  # without ZeRO there is one file and it is whole
        yield from _mapped(engine / "mp_rank_00_model_states.pt")["module"].items()
        return
    parts = [_mapped(file)["optimizer_state_dict"] for file in files]
    if parts[0]["zero_stage"] == 3:
        lazy = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag=ENGINE, exclude_frozen_parameters=True, lazy_mode=True
        )
        for name, tensor in lazy.items():
            yield name, tensor.contiguous()
        return
    for group, shapes in enumerate(_mapped(engine / "mp_rank_00_model_states.pt")["param_shapes"]):
        for name, shape in shapes.items():
            pieces = []
            for part in parts:
                if address := part["param_slice_mappings"][group].get(name):
                    flat = part["single_partition_of_fp32_groups"][group]
                    pieces.append(flat.narrow(0, address.start, address.numel))
            yield name, torch.cat(pieces).view(shape)


def _mapped(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    return found
