"""Fast dropout: the rate and expectation of torch's, and the same model without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from lib.training.dropout import FastDropout, drop, plain_attention, use_fast_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rate_and_expectation(dtype: torch.dtype, rate: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(401, 1003, dtype=dtype)
    y = drop(x, rate)
    assert y.dtype == dtype
    assert abs(float((y == 0).float().mean()) - rate) < 0.005
    assert abs(float(y.float().mean()) - 1) < 0.01


def test_gradient_flows_through_kept_elements_only() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, requires_grad=True)
    y = drop(x, 0.25)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_evaluation_is_untouched_and_weights_keep_their_names(tiny_base: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3).eval()
    ids = torch.tensor([[2, 5, 6, 7, 3, 0, 0], [2, 5, 6, 7, 8, 9, 3]])
    mask = (ids != 0).long()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        names = list(model.state_dict())
        use_fast_dropout(model)
        assert any(isinstance(m, FastDropout) for m in model.modules())
        assert not any(type(m) is nn.Dropout for m in model.modules())
        after = model(input_ids=ids, attention_mask=mask).logits
    assert list(model.state_dict()) == names
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    plain_attention(model)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=mask).logits, before, atol=1e-5, rtol=1e-5
        )


def test_training_drops(tiny_base: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3)
    use_fast_dropout(model)
    model.train()
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
