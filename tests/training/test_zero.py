"""DeepSpeed's checkpoints: with another number of workers, the same weights and optimiser, bit for bit."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.training import trainable, zero
from tests.bench.memory import Private, private_bytes
from tests.training.engines import Job, run, settings
from tests.training.ranks import Ranks

WORDS, CLASSES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
LORA = {"adapter": {"rank": 3}}


@pytest.mark.parametrize(
    ("before", "after", "stage", "means", "head"),
    [
        (2, 1, 2, {}, WORDS),
        (2, 1, 3, LORA, WORDS),
        (1, 2, 1, LORA, WORDS),
        (1, 2, 2, {"layer_decay": 0.5}, WORDS),
        (1, 2, 3, {"layer_decay": 0.5}, WORDS),
        # The two biases of the head are a group of their own, of which the second rank holds nothing.
        (1, 2, 2, LORA, CLASSES),
    ],
)
def test_weights_and_optimiser_are_carried_over(
    before: int,
    after: int,
    stage: int,
    means: dict[str, Any],
    head: str,
    alone: Ranks,
    pair: Ranks,
    tiny_base: Path,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    ranks = {1: alone, 2: pair}
    base = tiny_llama if head == WORDS else tiny_base
    training = means | {"zero_stage": stage, "weight_decay": 0.1}
    first, second = tmp_path / "first", tmp_path / "second"
    saved = ranks[before].run(run, Job(base, head, training, to=first, keeps_states=True))[0]
    assert zero.is_divided(first)
    zero.to_universal(first, second)
    loaded = ranks[after].run(
        run, Job(base, head, training, came_from=second, steps=0, universal=True, keeps_states=True)
    )
    for outcome in loaded:
        assert outcome.counts == saved.counts == {3.0}
        assert outcome.decay == saved.decay
        assert outcome.rates == saved.rates
        assert outcome.states.keys() == saved.states.keys()
        for name, state in saved.states.items():
            # Three steps went by: neither the weights nor the moments are those of a new engine.
            assert state["exp_avg"].abs().max() > 0, name
            for key, tensor in state.items():
                assert torch.equal(tensor, outcome.states[name][key]), (name, key)
    assert torch.allclose(loaded[0].logits, saved.logits, atol=1e-6)


def read_peak(base: Path, on: bool) -> float:
    """The most private memory while a causal model is read, as a share of the whole model in fp32."""
    from transformers import AutoModelForCausalLM

    training = settings({"zero_stage": 3, "zero_init": on})
    gc.collect()
    before = private_bytes()
    with Private() as most, zero.divided(training):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    return (most.bytes - before) / (4 * sum(trainable.numel(p) for p in model.parameters()))


def test_with_zero_init_no_rank_ever_holds_the_whole_model(pair: Ranks, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    deep = LlamaConfig(
        vocab_size=1024, hidden_size=384, num_hidden_layers=16, num_attention_heads=6, intermediate_size=1536
    )
    # As models are published: what is built in fp32 of it is a copy, not the file's own pages.
    LlamaForCausalLM(deep).bfloat16().save_pretrained(tmp_path)
    pair.run(read_peak, tmp_path, True)  # libraries load much of themselves when they are first used
    for share in pair.run(read_peak, tmp_path, True):
        assert share < 0.7  # its half, and a tensor or two
    for share in pair.run(read_peak, tmp_path, False):
        assert share > 0.95
