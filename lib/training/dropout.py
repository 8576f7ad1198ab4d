"""Dropout at the speed of the rest, on a CPU.

torch draws one Bernoulli number an element, on one thread: a third of a small encoder's bf16 forward
pass. Here eight elements share one 64-bit draw, a byte each. The rate is therefore a multiple of 1/256
(0.1 becomes 0.1016) and kept elements are scaled by exactly what that rate demands, so the expectation
stays what it was. Attention is written out for the same reason: the fused CPU kernel does not drop, and
its backward pass is twice as slow as plain matrix products at the lengths that encoders read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ATTENTION = "whorl_cpu"


def drop(x: torch.Tensor, rate: float) -> torch.Tensor:
    """`x` with a share of about `rate` set to 0 and the others scaled up; any shape and float type."""
    limit = min(round(rate * 256), 255)
    if limit == 0:
        return x
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= limit
    return x * keep.to(x.dtype).mul_(256 / (256 - limit))


class FastDropout(nn.Dropout):
    """Stands in for `nn.Dropout` while training on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return drop(input, self.p) if self.training else input


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention as transformers' attention interface wants it.

    Query, key, value are [B, heads, T, width]; the result is [B, T, heads, width].
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = torch.softmax(scores, -1)
    if module.training and dropout:
        weights = drop(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def use_fast_dropout(model: nn.Module) -> None:
    """Change a transformers model in place; its weights and their names stay as they are.

    Encoders with plain attention take the attention above too; others keep their own.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, FastDropout(child.p).train(child.training))
    config = getattr(model, "config", None)
    # Grouped key-value heads and causal masks have more cases than this attention knows.
    if config is not None and getattr(config, "model_type", "") in (
        "bert",
        "roberta",
        "xlm-roberta",
        "electra",
    ):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, eager_mask)
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]


def plain_attention(model: nn.Module) -> None:
    """Undo what would be saved in config.json: another program does not know our attention."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "_attn_implementation", "") == ATTENTION:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
