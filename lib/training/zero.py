"""DeepSpeed: its configuration from ours, the engine, and one whole state dict out of its shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib import tracking
from lib.settings import TrainingSettings
from lib.training.checkpoints import ENGINE


def precision(training: TrainingSettings) -> str:
    """`bf16`, `fp16` or `fp32` for this worker's hardware."""
    if training.precision != "auto":
        return training.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if tracking.machine()["bf16"] else "fp32"


def config(training: TrainingSettings, parameters: int, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration (https://www.deepspeed.ai/docs/config-json/) for a model of that size.

    `universal`: the checkpoint that will be loaded is one of `to_universal`.
    """
    number = precision(training)
    # Buffers of a bucket's size are allocated whole: no larger than what is ever in them,
    # and a multiple of the alignment that DeepSpeed asks for.
    bucket = min(-(-parameters // 1024) * 1024, 200_000_000)
    return {
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
        },
        # torch's fused AdamW is ours to choose: DeepSpeed would compile one of its own first.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }


def initialize(model: nn.Module, training: TrainingSettings, universal: bool = False) -> Any:
    """A DeepSpeed engine around `model`, on the process group that Ray Train has made."""
    import deepspeed

    # The shared-memory operator serves inference only, and building it takes a compiler and 40 s.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else others).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=training.learning_rate,
        fused=True,
    )
    parameters = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config(training, parameters, universal)
    )
    return engine


def load(engine: Any, folder: Path) -> None:
    """Weights, optimiser and fp32 masters from a folder that holds the parts of all workers.

    Collective. The folder's `engine` comes from as many workers as there are, or from `to_universal`.
    """
    groups = engine.optimizer.param_groups
    decay = [group["weight_decay"] for group in groups]
    path, _ = engine.load_checkpoint(str(folder), tag=ENGINE)
    if path is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
    # From a universal checkpoint ZeRO-3 gives every group what the first one had.
    for group, own in zip(engine.optimizer.param_groups, decay, strict=True):
        group["weight_decay"] = own


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


def state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """The whole model in fp32, joined from the parts that the workers wrote.

    These files are our own run's and never a user's, which is why they may be unpickled.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if list((folder / ENGINE).glob("*optim_states.pt")):
        whole: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=ENGINE)
    else:  # without ZeRO, and in fp32, there is one file and it is whole
        saved = torch.load(
            folder / ENGINE / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
        )
        whole = saved["module"]
    return {name: tensor.float().contiguous() for name, tensor in whole.items()}
