"""Shapes of models: by name against transformers' own classes, from directories without reading weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lib.errors import ConfigError, ModelError
from lib.planner import architecture
from lib.planner.architecture import Architecture


def largest_module(model: PreTrainedModel) -> int:
    """As DeepSpeed's estimator counts it."""
    return max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())


def on_meta(shape: Architecture) -> PreTrainedModel:
    """transformers' model of that shape, without memory."""
    with torch.device("meta"):
        if not shape.causal:
            return BertModel(
                BertConfig(
                    vocab_size=shape.vocabulary,
                    hidden_size=shape.width,
                    num_hidden_layers=shape.layers,
                    num_attention_heads=shape.heads,
                    intermediate_size=shape.inner,
                )
            )
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocabulary,
                hidden_size=shape.width,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.key_value_heads,
                intermediate_size=shape.inner,
                tie_word_embeddings=shape.lookups == 0,
            )
        )


@pytest.mark.parametrize("name", architecture.NAMED)
def test_named_architectures_have_the_size_of_the_real_model(name: str) -> None:
    shape = architecture.named(name)
    model = on_meta(shape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.largest == largest_module(model)


def test_published_sizes() -> None:
    sizes = {
        n: architecture.named(n).parameters for n in ("llama-7b", "llama-70b", "llama-405b", "bert-base")
    }
    assert sizes == {
        "llama-7b": 6_738_415_616,
        "llama-70b": 68_976_648_192,
        "llama-405b": 405_853_388_800,
        "bert-base": 109_482_240,
    }


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no architecture 'lama-7b'; did you mean 'llama-7b'\?"):
        architecture.named("lama-7b")


def test_an_encoder_is_read_from_its_headers(tiny_base: Path) -> None:
    shape = architecture.read(str(tiny_base), vocabulary_head=False)
    model = BertModel.from_pretrained(tiny_base)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.lookups == sum(
        p.numel() for n, p in model.embeddings.named_parameters() if "embeddings" in n and p.ndim == 2
    )
    assert (shape.layers, shape.width, shape.heads, shape.inner) == (2, 32, 2, 64)
    assert (shape.gated, shape.rms_norm, shape.causal, shape.dropout) == (False, False, False, True)
    assert not architecture.read(str(tiny_base), vocabulary_head=False, dropout=0.0).dropout


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_is_read_from_many_shards(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not of this model")
    shape = architecture.read(str(tmp_path), vocabulary_head=True)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.largest == largest_module(model)
    assert shape.lookups == (0 if tied else 300 * 64)
    assert (shape.key_value_heads, shape.head_width, shape.gated, shape.rms_norm) == (2, 16, True, True)
    # A classifier leaves the output over the vocabulary away, and then all embeddings are looked up only.
    classifier = architecture.read(str(tmp_path), vocabulary_head=False)
    assert classifier.parameters == shape.parameters - (0 if tied else 300 * 64)
    assert classifier.lookups == 300 * 64
    real = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert classifier.parameters == sum(p.numel() for p in real.parameters()) - 2 * 64


def test_directories_that_are_no_models(tmp_path: Path) -> None:
    def fails() -> str:
        with pytest.raises(ModelError) as caught:
            architecture.read(str(tmp_path), vocabulary_head=False)
        return str(caught.value)

    assert "holds no config.json" in fails()
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert "holds no safetensors weights" in fails()
    weights = tmp_path / "model.safetensors"
    for content in (
        b"",
        b"short",
        b"\xff" * 16,
        (30).to_bytes(8, "little") + b"{cut",
        (2).to_bytes(8, "little") + b"[]",
    ):
        weights.write_bytes(content)
        assert "has no safetensors header" in fails()
    weights.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "names no num_attention_heads" in fails()
