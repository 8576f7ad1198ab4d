"""DeepSpeed: its configuration from ours, the engine, and one whole state dict out of its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib import tracking
from lib.settings import TrainingSettings

TAG = "engine"


def precision(training: TrainingSettings) -> str:
    """`bf16`, `fp16` or `fp32` for this worker's hardware."""
    if training.precision != "auto":
        return training.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if tracking.machine()["bf16"] else "fp32"


def config(training: TrainingSettings, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration (https://www.deepspeed.ai/docs/config-json/) for a model of that size."""
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
    }


def initialize(model: nn.Module, training: TrainingSettings) -> Any:
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
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config(training, sum(p.numel() for p in model.parameters()))
    )
    return engine


def save(engine: Any, folder: str, state: dict[str, Any]) -> None:
    """Every worker writes its part of the engine into its own local `folder`; Ray Train joins them."""
    engine.save_checkpoint(folder, tag=TAG, client_state=state)


def state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """The whole model in fp32, joined from the parts that the workers wrote.

    These files are our own run's and never a user's, which is why they may be unpickled.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if list((folder / TAG).glob("*optim_states.pt")):
        whole: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    else:  # without ZeRO, and in fp32, there is one file and it is whole
        saved = torch.load(
            folder / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
        )
        whole = saved["module"]
    return {name: tensor.float().contiguous() for name, tensor in whole.items()}
