"""How much of a model is trained, under every ZeRO stage; and that what is exported is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lib.errors import ConfigError
from lib.settings import TrainingSettings
from lib.training import adapters, trainable
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


def prepared(base: Path, head: str, **training: Any) -> nn.Module:
    return trainable.prepare(build(base, head), base, settings(training))


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_last_layers_and_what_comes_after_them(tiny_base: Path, tiny_llama: Path) -> None:
    classifier = trained_names(prepared(tiny_base, CLASSES, layers=1))
    assert {n for n in classifier if not n.startswith("bert.encoder.layer.1.")} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    decoder = trained_names(prepared(tiny_llama, WORDS, layers=2))
    others = {n for n in decoder if not n.startswith(("model.layers.1.", "model.layers.2."))}
    assert others == {"model.norm.weight", "lm_head.weight"}


def test_an_adapter_leaves_the_pretrained_output_alone_and_trains_fresh_heads(
    tiny_base: Path, tiny_llama: Path
) -> None:
    names = trained_names(prepared(tiny_base, CLASSES, adapter=LORA))
    assert {adapters.plain_name(n) for n in names if "lora_" not in n} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert len([n for n in names if "lora_A" in n]) == 2 * 6
    decoder = trained_names(prepared(tiny_llama, WORDS, adapter=LORA | {"targets": ["q_proj", "v_proj"]}))
    assert len(decoder) == 3 * 2 * 2
    assert all("lora_" in n for n in decoder)


def test_layers_learn_more_slowly_the_lower_they_are(tiny_base: Path) -> None:
    model = prepared(tiny_base, CLASSES, layer_decay=0.5)
    training = settings({"layer_decay": 0.5, "weight_decay": 0.1, "learning_rate": 1e-3})
    names = {id(p): n for n, p in model.named_parameters()}
    rates: dict[str, float] = {}
    for group in trainable.groups(model, tiny_base, training):
        assert group["params"]
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr_scale"]
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
            assert group["lr"] == pytest.approx(1e-3 * group["lr_scale"])
    assert rates.keys() == names_of(model)
    assert rates["classifier.weight"] == rates["bert.pooler.dense.bias"] == 1.0
    assert rates["bert.encoder.layer.1.output.dense.weight"] == 0.5
    assert rates["bert.encoder.layer.0.output.dense.weight"] == 0.25
    assert rates["bert.embeddings.word_embeddings.weight"] == rates["bert.embeddings.LayerNorm.bias"] == 0.125


def names_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def test_tied_output_counts_as_the_embedding(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    anatomy = trainable.Anatomy.of(build(tmp_path, WORDS), tmp_path)
    assert anatomy.depth("model.embed_tokens.weight") == 0
    assert anatomy.depth("model.norm.weight") == 3
    assert not anatomy.heads


def test_noise_while_training_only(tiny_llama: Path) -> None:
    model = prepared(tiny_llama, WORDS, neftune_alpha=5.0)
    table = model.get_input_embeddings()  # type: ignore[operator]
    batch = ids(3)
    clean = table.weight[batch]
    noise = table.train()(batch) - clean
    limit = 5.0 / (batch.shape[1] * clean.shape[2]) ** 0.5
    assert 0.9 * limit < noise.abs().max() <= limit * 1.001
    assert torch.equal(table.eval()(batch), clean)
    assert names_of(model) == names_of(build(tiny_llama, WORDS))


@pytest.mark.parametrize(
    ("training", "line"),
    [
        ({"layers": 9}, r"training.layers 9 is above the model's 3 layers; give 1 to 3"),
        (
            {"adapter": {"targets": ["q_prj"]}},
            r"has no 'q_prj'; did you mean 'q_proj'\? \(its layers have down_proj, gate_proj, k_proj, .*v_proj\)",
        ),
    ],
)
def test_what_the_model_has_not_is_told_with_what_it_has(
    training: dict[str, Any], line: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=line):
        prepared(tiny_llama, WORDS, **training)
    # The driver says it too, of a directory without weights.
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=line):
        trainable.check(tmp_path, TrainingSettings.model_validate(training))


def test_a_plain_peft_model_reads_the_adapter(alone: Ranks, tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    job = Job(tiny_base, CLASSES, {"zero_stage": 3, "adapter": LORA}, to=tmp_path / "checkpoint")
    (outcome,) = alone.run(run, job)
    merged = exported(job, tmp_path)
    # The head that it starts from is another one: the adapter brings its own.
    base = build(tiny_base, CLASSES)
    torch.nn.init.zeros_(base.classifier.weight)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        apart = model(input_ids=ids(0)).logits
    assert torch.allclose(apart, merged, atol=1e-6)
    assert torch.allclose(apart, outcome.logits, atol=1e-6)
    assert not list((tmp_path / "adapter").glob("*.bin"))


@pytest.mark.parametrize(
    "training",
    [
        {"zero_stage": 3, "adapter": LORA, "gradient_checkpointing": True},
        {"zero_stage": 2, "layers": 1, "neftune_alpha": 5.0, "precision": "bf16"},
        {"zero_stage": 3, "offload": "all", "layer_decay": 0.7},
        {"zero_stage": 1, "offload": "optimizer"},
    ],
    ids=["lora", "layers", "offload", "offload-1"],
)
def test_going_on_from_a_checkpoint_is_the_same_as_never_stopping(
    training: dict[str, Any], pair: Ranks, tiny_llama: Path, tmp_path: Path
) -> None:
    whole = pair.run(run, Job(tiny_llama, WORDS, training, steps=4))
    pair.run(run, Job(tiny_llama, WORDS, training, to=tmp_path / "half", steps=2))
    rest = pair.run(run, Job(tiny_llama, WORDS, training, came_from=tmp_path / "half", steps=2, first=2))
    for stopped, never in zip(rest, whole, strict=True):
        assert stopped.losses == never.losses[2:]
        assert torch.equal(stopped.logits, never.logits)
        assert (stopped.rates, stopped.decay) == (never.rates, never.decay)


def test_a_checkpoint_of_an_adapter_is_small(pair: Ranks, tiny_llama: Path, tmp_path: Path) -> None:
    def size(name: str, **training: Any) -> int:
        pair.run(run, Job(tiny_llama, WORDS, {"zero_stage": 3, **training}, to=tmp_path / name))
        return sum(f.stat().st_size for f in (tmp_path / name).rglob("*") if f.is_file())

    whole = size("whole")
    assert size("adapter", adapter={"rank": 2, "targets": ["q_proj"]}) < whole / 3


def test_zero_init_starts_from_the_same_weights(pair: Ranks, tiny_base: Path) -> None:
    divided, whole = (
        pair.run(run, Job(tiny_base, CLASSES, {"zero_stage": 3, "zero_init": on}, steps=2))
        for on in (True, False)
    )
    for ours, theirs in zip(divided, whole, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, abs=1e-6)
        assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
