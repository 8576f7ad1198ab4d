"""What a rank of `tests.training.ranks` runs: a tiny model is trained through `lib.training` and written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lib.settings import TrainingSettings
from lib.training import checkpoints, disk, trainable, zero

SEQUENCE = 12


@dataclass
class Job:
    """What to train. `base` is a model directory, `head` what transformers puts on it."""

    base: Path
    head: str
    training: dict[str, Any]
    to: Path | None = None
    came_from: Path | None = None
    steps: int = 3
    first: int = 0
    universal: bool = False
    keeps_states: bool = False


@dataclass
class Outcome:
    losses: list[float]
    logits: torch.Tensor
    """Of the last weights, in evaluation."""
    decay: list[float]
    rates: list[float]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the trained parameters, by name."""
    states: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Of the trained parameters at the end, whole: `fp32`, `exp_avg`, `exp_avg_sq`."""
    counts: set[float] = field(default_factory=set)
    """Adam's number of steps, of every group."""


def build(base: Path, head: str) -> Any:
    """As a task builds it, with the same fresh head each time."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, head)
    more = {} if head == "AutoModelForCausalLM" else {"num_labels": 2}
    return kind.from_pretrained(base, dtype=torch.float32, use_safetensors=True, **more)


def save_llama(folder: Path, **config: Any) -> Path:
    """Weights of a random Llama in `folder`, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    known = {"vocab_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**known, **config, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


def ids(seed: int) -> torch.Tensor:
    """Token ids [4, T]."""
    return torch.randint(5, 60, (4, SEQUENCE), generator=torch.Generator().manual_seed(seed))


# ZeRO-3 leaves small parameters whole, and here all of them are.
DIVIDED = {"zero_optimization": {"stage3_param_persistence_threshold": 8}}


def settings(values: dict[str, Any]) -> TrainingSettings:
    known = {"precision": "fp32", "learning_rate": 1e-2, "deepspeed": DIVIDED}
    return TrainingSettings.model_validate(known | values)


def run(job: Job) -> Outcome:
    training = settings(job.training)
    torch.manual_seed(0)
    disk.prepare(training)
    with zero.divided(training):
        model = trainable.prepare(build(job.base, job.head), job.base, training)
    shapes = {
        n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters() if p.requires_grad
    }
    engine = zero.initialize(model, training, job.universal, job.base)
    if job.came_from:
        zero.load(engine, job.came_from)
    losses = []
    for step in range(job.first, job.first + job.steps):
        torch.manual_seed(1000 * step + dist.get_rank())
        engine.train()
        batch = ids(1 + step * dist.get_world_size() + dist.get_rank())
        logits = engine(input_ids=batch).logits.float()
        labels = batch if logits.ndim == 3 else batch[:, 0] % 2
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        losses.append(float(loss.detach()))
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=ids(0)).logits.float()
    groups = engine.optimizer.param_groups
    outcome = Outcome(
        losses, logits, [g["weight_decay"] for g in groups], [g["lr_scale"] for g in groups], shapes
    )
    if job.keeps_states:
        outcome.states = states(engine)
        outcome.counts = {
            float(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state
        }
    if job.to:
        job.to.mkdir(parents=True, exist_ok=True)
        checkpoints.write_engine(engine, job.to, job.first + job.steps)
    engine.destroy()
    return outcome


def states(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What the optimiser holds of each trained parameter, gathered from all ranks; collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links the states of all groups when only the first has made one step.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            moments = {
                k: safe_get_full_optimizer_state(parameter, k).clone() for k in ("exp_avg", "exp_avg_sq")
            }
            found[name] = moments | {"fp32": safe_get_full_fp32_param(parameter).clone()}
    return found
