"""What a forward pass keeps: against the published formula, and against what autograd really saves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lib.planner import activations, architecture
from lib.training.dropout import use_fast_dropout

BATCH, LENGTH = 4, 64


@pytest.mark.parametrize(("s", "h", "a"), [(2048, 12_288, 96), (512, 768, 12)])
def test_a_plain_layer_is_that_of_korthikanti(s: int, h: int, a: int) -> None:
    model = dataclasses.replace(architecture.bert("x", 1, h, a), causal=True)
    assert s * activations.layer(model, s, 2, fused=False) == pytest.approx(s * h * (34 + 5 * a * s / h))
    # Fused attention leaves one fp32 number for each row of the scores.
    assert activations.layer(model, s, 2) == pytest.approx(h * 34 + 4 * a)


def test_checkpointing_keeps_the_layers_inputs() -> None:
    model = architecture.named("llama-7b")
    few, many = (
        activations.forward(dataclasses.replace(model, layers=n), 1000, 500, 2, checkpointing=True)
        for n in (10, 32)
    )
    assert many - few == 22 * 2 * 1000 * 4096


def test_logits_belong_to_language_models() -> None:
    assert activations.logits(architecture.named("llama-7b"), 10, 2) == 10 * 32_000 * 14
    assert activations.logits(architecture.named("bert-base"), 10, 2) == 0


def saved_bytes(model: nn.Module, **inputs: torch.Tensor) -> int:
    """Bytes of all storages that autograd saved in a forward pass, but for the parameters' own."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *inputs.values()]}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or another tensor could be put in the same place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(found.values())


def decoder(heads: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=heads,
        intermediate_size=768,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).train()


def shape_of(config: LlamaConfig) -> architecture.Architecture:
    made = architecture.llama(
        "x",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    )
    return dataclasses.replace(made, vocabulary_head=False)


@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_decoder_saves(heads: int, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = decoder(heads)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, 128, (BATCH, LENGTH))
    saved = saved_bytes(model, input_ids=ids)
    shape, tokens = shape_of(model.config), BATCH * LENGTH
    planned = activations.forward(shape, tokens, LENGTH, 2, checkpointing=checkpointing)
    if checkpointing:  # the layer that is computed again exists later, in the backward pass
        planned -= tokens * activations.layer(shape, LENGTH, 2)
    assert planned == pytest.approx(saved, rel=0.02)


def test_what_an_encoder_with_dropout_saves_on_a_cpu() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024
    )
    model = BertForSequenceClassification(config).to(torch.bfloat16).train()
    use_fast_dropout(model)
    ids = torch.randint(0, 128, (BATCH, LENGTH))
    saved = saved_bytes(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    shape = architecture.bert("x", 4, 256, 8, vocabulary=128)
    planned = activations.forward(shape, BATCH * LENGTH, LENGTH, 2, checkpointing=False, fused=False, mask=2)
    assert planned == pytest.approx(saved, rel=0.02)
