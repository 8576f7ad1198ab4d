"""How much of a model is trained, under every ZeRO stage; and that what is exported is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lib.training.restore import restore
from tests.training.engines import Job, build, ids, run, settings
from tests.training.ranks import Ranks

CLASSES, WORDS = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
LORA = {"kind": "lora", "rank": 4, "dropout": 0.1}


def exported(job: Job, tmp_path: Path) -> torch.Tensor:
    """Logits of what plain transformers reads after the export."""
    assert job.to
    model = restore(
        build(job.base, job.head), job.base, settings(job.training), job.to, str(tmp_path / "adapter")
    )
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    with torch.no_grad():
        logits: torch.Tensor = build(tmp_path / "model", job.head).eval()(input_ids=ids(0)).logits
    return logits


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "means",
    [
        {},
        {"adapter": LORA},
        {"adapter": LORA | {"kind": "dora"}},
        {"layers": 1, "layer_decay": 0.5},
    ],
    ids=["all", "lora", "dora", "layers"],
)
@pytest.mark.parametrize("head", [CLASSES, WORDS])
def test_exported_is_what_was_trained(
    head: str,
    means: dict[str, Any],
    stage: int,
    pair: Ranks,
    tiny_base: Path,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    base = tiny_base if head == CLASSES else tiny_llama
    training = means | {"zero_stage": stage, "gradient_checkpointing": True}
    job = Job(base, head, training, to=tmp_path / "checkpoint")
    outcome, other = pair.run(run, job)
    assert torch.allclose(outcome.logits, other.logits, atol=1e-6)
    # What was trained differs from the base model; what was exported does not differ from what was trained.
    with torch.no_grad():
        before = build(base, head).eval()(input_ids=ids(0)).logits
    assert (outcome.logits - before).abs().max() > 1e-3
    assert torch.allclose(exported(job, tmp_path), outcome.logits, atol=2e-6)
