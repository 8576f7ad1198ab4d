"""Packs: no example sees another, whatever the attention; losses and gradients are those of plain transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

from lib import causal
from lib.encoders import IGNORED
from lib.errors import ModelError
from lib.settings import Settings
from lib.tasks import chat


def settings_for(base: Path, length: int = 64) -> Settings:
    return Settings.model_validate(
        {
            "name": "x",
            "task": "chat",
            "data": {"source": "x.jsonl"},
            "model": {"base": str(base), "max_length": length},
        }
    )


@pytest.fixture(scope="module")
def rows(tiny_chat_base: Path) -> pa.Table:
    said = [
        ("the dress fits?", "great"),
        ("is the fabric soft", "love it a lot " * 4),
        ("good size", "bad"),
        ("fine", "the color was poor and the size was awful"),
        ("okay " * 6, "a great fit"),
    ]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
    table = pa.table({"messages": pa.array(turns, chat.MESSAGES)})
    return chat.encode(table, settings_for(tiny_chat_base).model)


def packed(rows: pa.Table) -> pa.Table:
    return rows.append_column("pack", pa.array([2, 0, 2, 1, 1], pa.int32()))


def by_row(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    losses, row = causal.token_losses(model, batch)
    return torch.zeros(5).index_add(0, row, losses)


def test_collate_lays_rows_behind_one_another(rows: pa.Table) -> None:
    batch = causal.collate(packed(rows), pad=0)
    lengths = rows["length"].to_pylist()
    assert batch["input_ids"].shape == (3, max(lengths[1], lengths[3] + lengths[4], lengths[0] + lengths[2]))
    ids, labels = rows["input_ids"].to_pylist(), rows["labels"].to_pylist()
    for pack, members in enumerate([[1], [3, 4], [0, 2]]):
        end = sum(lengths[i] for i in members)
        for name, of in (
            ("input_ids", lambda i: ids[i]),
            ("labels", lambda i: labels[i]),
            ("position_ids", lambda i: range(lengths[i])),
            ("sequence", lambda i: [i] * lengths[i]),
        ):
            assert batch[name][pack, :end].tolist() == [value for i in members for value in of(i)]
        rest = batch["input_ids"].shape[1] - end
        assert batch["input_ids"][pack, end:].tolist() == [0] * rest
        assert set(batch["labels"][pack, end:].tolist()) <= {IGNORED}
        assert batch["position_ids"][pack, end:].tolist() == list(range(rest))
        assert set(batch["sequence"][pack, end:].tolist()) <= {causal.PADDING}


@pytest.mark.parametrize("implementation", [causal.ATTENTION, "sdpa", "eager"])
def test_packed_and_single_losses_and_gradients_agree(
    tiny_chat_base: Path, rows: pa.Table, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "LOGITS", 5 * 400)  # several chunks
    model = causal.pretrained(tiny_chat_base, settings_for(tiny_chat_base)).eval()
    assert model.config._attn_implementation == causal.ATTENTION
    model.set_attn_implementation(implementation)
    together = by_row(model, causal.collate(packed(rows), 0))
    together.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    plain = type(model).from_pretrained(tiny_chat_base, attn_implementation="eager").eval()
    total = torch.zeros(())
    for i in range(5):
        ids = torch.tensor([rows["input_ids"][i].as_py()])
        labels = torch.tensor(rows["labels"][i].as_py())
        loss = functional.cross_entropy(plain(input_ids=ids).logits[0, :-1], labels[1:], reduction="sum")
        alone = by_row(model, causal.collate(rows.slice(i, 1), 0))[0]
        assert float(loss.detach()) > 1
        assert float(alone.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert float(together[i].detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        total = total + loss
    total.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 3])
def test_written_out_attention_is_that_of_torch(heads: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2 * n, 7, 8, dtype=torch.bfloat16) for n in (heads, 1, 1))
    expected = functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True, scale=0.3
    )
    found = causal._causal(torch.nn.Identity(), query, key, value, 0.3, 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=0.03, atol=0.03)
    # Longer ones go to torch's own kernel.
    long = [x.repeat(1, 1, 80, 1) for x in (query, key, value)]
    assert causal._causal(torch.nn.Identity(), *long, 0.3, 0.0).shape == long[0].shape


def test_a_leak_would_be_seen(tiny_chat_base: Path, rows: pa.Table) -> None:
    model = causal.pretrained(tiny_chat_base, settings_for(tiny_chat_base)).eval()
    batch = causal.collate(packed(rows), 0)
    apart = by_row(model, batch)
    # One sequence that runs through the whole pack: each example now sees those before it.
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    leaking = by_row(model, batch)
    assert leaking[[0, 1, 3]].tolist() == pytest.approx(apart[[0, 1, 3]].tolist(), rel=1e-5)
    assert float((leaking - apart).detach()[[2, 4]].abs().min()) > 0.1


def test_losses_are_per_token_with_any_gradient_behind_them(tiny_chat_base: Path, rows: pa.Table) -> None:
    model = causal.pretrained(tiny_chat_base, settings_for(tiny_chat_base)).eval()
    losses, _ = causal.token_losses(model, causal.collate(rows, 0))
    weights = torch.linspace(-1, 1, len(losses))
    (losses * weights).sum().backward()
    own = model.lm_head.weight.grad.clone()
    model.zero_grad()
    batch = causal.collate(rows, 0)
    logits = (
        type(model).forward(model, input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    )
    chosen = batch["labels"][:, 1:] != IGNORED
    plain = functional.cross_entropy(logits[:, :-1][chosen], batch["labels"][:, 1:][chosen], reduction="none")
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-5)
    (plain * weights).sum().backward()
    torch.testing.assert_close(own, model.lm_head.weight.grad, rtol=1e-4, atol=1e-4)


def test_a_model_in_training_generates_as_an_exported_one(tiny_chat_base: Path) -> None:
    model = causal.pretrained(tiny_chat_base, settings_for(tiny_chat_base)).eval()
    plain = type(model).from_pretrained(tiny_chat_base).eval()
    ids = torch.tensor([[0, 0, 1, 40, 50], [1, 60, 61, 62, 63]])
    asked = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**asked), plain.generate(**asked))


def test_sequences_of_like_lengths_go_together() -> None:
    lengths = [3, 10, 9, 10, 1, 2, 8]
    ends = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    found = causal.groups(ends)
    assert [len(index) for index, _ in found] == [4, 1, 1, 1]
    places = torch.cat([index[real] for index, real in found])
    assert sorted(places.tolist()) == list(range(sum(lengths)))


def test_models_that_change_their_logits_go_the_plain_way(tiny_chat_base: Path, rows: pa.Table) -> None:
    model = causal.pretrained(tiny_chat_base, settings_for(tiny_chat_base)).eval()
    expected = by_row(model, causal.collate(rows, 0))
    model.config.logit_scale = 0.5  # Llama itself does not read it, so the losses stay
    assert by_row(model, causal.collate(rows, 0)).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_too_long_for_the_model(tiny_chat_base: Path) -> None:
    with pytest.raises(ModelError, match=r"model.max_length 512 is above the 256 positions"):
        causal.pretrained(tiny_chat_base, settings_for(tiny_chat_base, 512))
