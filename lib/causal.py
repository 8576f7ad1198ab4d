"""Causal language models in training: packs of sequences that do not see one another, and the losses of answers.

A batch is P packs of L positions; each pack holds whole sequences, one behind the other, then padding. With
attention that goes by sequence (ours on a CPU, FlashAttention on a GPU) the packs are laid end to end and the
padding is left out before the model computes anything; otherwise transformers builds a block mask from the
position ids, which restart with each sequence.

Shapes: P packs, L positions, N positions whose next token carries loss, D hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn import functional

from lib.encoders import IGNORED
from lib.errors import ModelError

if TYPE_CHECKING:
    from lib.settings import Settings

    Batch = dict[str, torch.Tensor]

ATTENTION = "whorl_sequences"
FLASH = "flash_attention_2"
PADDING = -1
"""The `sequence` of positions that hold nothing."""
# Sequences are computed together when the shortest is no shorter than this share of the longest.
LIKE = 0.8
# Up to this length the fused bf16 kernel is slower on a CPU than plain matrix products are, backwards above all:
# four times at 60 tokens, a third at 256.
WRITTEN_OUT = 512
# Elements of logits that exist at a time: 128 MiB in fp32.
LOGITS = 1 << 25
# What some models do to their logits behind the vocabulary projection; those go the plain way.
CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def pretrained(base: Path, settings: Settings) -> nn.Module:
    """The base model in fp32, ready for `token_losses`.

    Raises ModelError when it is no causal model, cannot be packed, or has fewer positions than `model.max_length`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted = settings.model.trust_remote_code
    config = AutoConfig.from_pretrained(base, trust_remote_code=trusted)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and settings.model.max_length > positions:
        raise ModelError(
            f"model.max_length {settings.model.max_length} is above the {positions} positions of {settings.model.base}"
        )
    if settings.model.dropout is not None:
        for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if hasattr(config, name):
                setattr(config, name, settings.model.dropout)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            base, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=trusted
        )
    except ValueError as error:
        raise ModelError(f"{settings.model.base} is no causal language model: {error}") from error
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise ModelError(
            f"{settings.model.base} takes no position ids, which packs need; choose another base model"
        )
    half = settings.training.precision != "fp32"
    model.set_attn_implementation(attention_for(config, half))  # type: ignore[operator]
    return with_token_losses(model)


def attention_for(config: Any, half: bool = True) -> str:
    """The attention that packs are trained with on this machine; `half`: in bf16 or fp16."""
    if torch.cuda.is_available():
        from transformers.utils import is_flash_attn_2_available

        return FLASH if half and is_flash_attn_2_available() else "sdpa"
    # A window narrower than a sequence and capped scores are more than ours knows; transformers' masks know them.
    window, capped = (getattr(config, name, None) for name in ("sliding_window", "attn_logit_softcapping"))
    if window or capped:
        return "sdpa"
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, mask)
    return ATTENTION


def mask(*arguments: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    """None for packs: sequences are computed one by one, each causal from its own start, and nothing is left to
    mask. What comes with a mask of its own, such as prompts padded for generation, gets that of sdpa."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    found: torch.Tensor | None = sdpa_mask(*arguments, attention_mask=attention_mask, **options)
    return found


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each of the sequences that lie end to end, as transformers' interface wants it.

    Query [1, heads, T, width]; key and value may have fewer heads; `cu_seq_lens_q` int32 [S + 1] holds the ends of
    the sequences, 0 first, and without it there is one. The result is [1, T, heads, width]. Work and memory grow
    with the squares of the sequences' lengths, not with that of T.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:  # generation
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling)
        return result, None
    if cu_seq_lens_q is None or len(cu_seq_lens_q) == 2:
        return _causal(module, query, key, value, scaling, dropout).transpose(1, 2).contiguous(), None
    flat = [x[0].transpose(0, 1) for x in (query, key, value)]
    result = torch.empty_like(flat[0])
    parts, places = [], []
    for index, real in groups(cu_seq_lens_q):
        # Padding lies behind the sequence, where causal attention does not look.
        q, k, v = (x[index].transpose(1, 2) for x in flat)
        parts.append(_causal(module, q, k, v, scaling, dropout).transpose(1, 2)[real])
        places.append(index[real])
    result = torch.cat(parts)[torch.argsort(torch.cat(places))]
    return result[None], None


def _causal(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    rate = dropout if module.training else 0.0
    if query.dtype == torch.bfloat16 and query.shape[2] <= WRITTEN_OUT and not rate:
        return _written_out(query, key, value, scaling or query.shape[-1] ** -0.5)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=rate,
        is_causal=query.shape[2] > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """The same as plain products, the query's heads of one key head side by side: nothing is repeated."""
    count, heads, length, width = query.shape
    shared = query.reshape(count, key.shape[1], -1, width)
    scores = (torch.matmul(shared, key.transpose(2, 3)) * scaling).view(*shared.shape[:2], -1, length, length)
    ahead = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    weights = torch.softmax(scores.masked_fill(ahead, -torch.inf), -1).view(*shared.shape[:3], length)
    return torch.matmul(weights, value).view(count, heads, length, width)


def groups(ends: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sequences of like lengths together: their positions int64 [S, longest], and which are real, bool of that shape.

    Every sequence is in one group. What is not real repeats the sequence's last position.
    """
    bounds = ends.cpu().numpy().astype(np.int64)
    starts, lengths = bounds[:-1], np.diff(bounds)
    order = np.argsort(-lengths, kind="stable")
    found, begin = [], 0
    while begin < len(order):
        longest = lengths[order[begin]]
        size = int(np.count_nonzero(lengths[order[begin:]] >= LIKE * longest))
        chosen = order[begin : begin + size]
        offsets = np.arange(longest)
        real = offsets < lengths[chosen, None]
        index = starts[chosen, None] + np.minimum(offsets, lengths[chosen, None] - 1)
        found.append((torch.from_numpy(index).to(ends.device), torch.from_numpy(real).to(ends.device)))
        begin += size
    return found


def with_token_losses(model: nn.Module) -> nn.Module:
    """The same model, which, called with `labels`, gives the losses of the labelled tokens instead of all logits.

    Through the model's own call, so that DeepSpeed's and PEFT's wrappers see it.
    """
    plain = type(model).forward

    def forward(self: nn.Module, *arguments: Any, labels: torch.Tensor | None = None, **options: Any) -> Any:
        if labels is None:
            return plain(self, *arguments, **options)
        # The token at a position is told by the position before it.
        chosen = labels[:, 1:] != IGNORED
        if any(getattr(self.config, name, None) not in (None, 1, 1.0) for name in CHANGES_LOGITS):
            logits = plain(self, *arguments, **options).logits[:, :-1][chosen]
            return functional.cross_entropy(logits.float(), labels[:, 1:][chosen], reduction="none")
        hidden = self.base_model(*arguments, **options).last_hidden_state[:, :-1][chosen]  # type: ignore[operator]
        return self.get_output_embeddings()(hidden, labels=labels[:, 1:][chosen])  # type: ignore[operator]

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.forward = types.MethodType(_head_forward, head)
    return model


def without_token_losses(model: nn.Module) -> nn.Module:
    """Undo `with_token_losses`, and the attention that other programs do not know."""
    for module in (model, model.get_output_embeddings()):  # type: ignore[operator]
        module.__dict__.pop("forward", None)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return model


def _head_forward(self: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    if labels is None:
        return functional.linear(hidden, self.weight, self.bias)
    return _TokenLosses.apply(hidden, self.weight, self.bias, labels)  # type: ignore


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each row of `hidden` [N, D] against `labels` [N] over the vocabulary `weight` [V, D].

    Logits are made a chunk of rows at a time, forwards and once more backwards, so that N × V of them never exist.
    One function for all chunks: under ZeRO-3 the weight is gathered once for it, whatever the number of chunks
    on each rank.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        losses, totals = hidden.new_empty(len(hidden), dtype=torch.float32), []
        for rows in _chunks(hidden, weight):
            logits = functional.linear(hidden[rows], weight, bias).float()
            totals.append(torch.logsumexp(logits, -1))
            losses[rows] = totals[-1] - logits.gather(1, labels[rows, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, labels, torch.cat(totals) if totals else losses)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        hidden, weight, bias, labels, totals = ctx.saved_tensors
        (upstream,) = gradients
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        of_bias = (
            torch.zeros_like(bias, dtype=torch.float32)
            if bias is not None and ctx.needs_input_grad[2]
            else None
        )
        for rows in _chunks(hidden, weight):
            logits = functional.linear(hidden[rows], weight, bias).float()
            change = torch.exp_(logits.sub_(totals[rows, None]))
            change.scatter_add_(1, labels[rows, None], change.new_full((len(change), 1), -1.0))
            change.mul_(upstream[rows, None])
            lowered = change.to(weight.dtype)
            if of_hidden is not None:
                of_hidden[rows] = (lowered @ weight).to(hidden.dtype)
            if of_weight is not None:
                of_weight += lowered.T @ hidden[rows].to(weight.dtype)
            if of_bias is not None:
                of_bias += change.sum(0)
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
        )


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    step = max(1, LOGITS // weight.shape[0])
    return [slice(start, start + step) for start in range(0, len(hidden), step)]


def collate(rows: pa.Table, pad: int) -> Batch:
    """Rows (`input_ids`, `labels`, `length`) as packs of int64 [P, L].

    `input_ids` and `labels`; `position_ids`, which restart with each sequence and with the padding; `sequence`,
    the number of the row that a position belongs to, PADDING where there is none. The column `pack`, where there
    is one, says which rows share a pack, in their order; without it each row is its own.
    """
    lengths = rows["length"].to_numpy().astype(np.int64)
    packs = rows["pack"].to_numpy() if "pack" in rows.column_names else np.arange(len(lengths))
    order = np.argsort(packs, kind="stable")
    _, first = np.unique(packs[order], return_index=True)
    filled = np.add.reduceat(lengths[order], first)
    shape = (len(first), int(filled.max()))
    real = np.arange(shape[1]) < filled[:, None]
    # Where each row begins in the flat values, and its positions, row by row in the order of the packs.
    begins = np.cumsum(lengths) - lengths
    inside = np.concatenate([np.arange(n) for n in lengths[order]])
    taken = np.repeat(begins[order], lengths[order]) + inside
    behind = np.arange(shape[1]) - filled[:, None]
    batch = {}
    for name, values, fill in (
        ("input_ids", rows["input_ids"].combine_chunks().flatten().to_numpy()[taken], np.full(shape, pad)),
        ("labels", rows["labels"].combine_chunks().flatten().to_numpy()[taken], np.full(shape, IGNORED)),
        ("position_ids", inside, np.where(real, 0, behind)),
        ("sequence", np.repeat(order, lengths[order]), np.full(shape, PADDING)),
    ):
        placed = fill.astype(np.int64)
        placed[real] = values
        batch[name] = torch.from_numpy(placed)
    return batch


def token_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood float32 [N] of each token that carries loss, and the row int64 [N] that it is of.

    `model` is what `pretrained` gives, or an engine around it; gradients flow through.
    """
    sequence, labels, options = batch["sequence"], batch["labels"], {}
    tokens, positions = batch["input_ids"], batch["position_ids"]
    if _goes_by_sequence(model):
        real = sequence != PADDING
        sequence, labels, tokens, positions = (x[real][None] for x in (sequence, labels, tokens, positions))
        starts = torch.nonzero(positions[0] == 0)[:, 0]
        ends = functional.pad(starts, (0, 1), value=tokens.shape[1]).to(torch.int32)
        longest = int(positions.max()) + 1
        options = {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    losses = model(input_ids=tokens, position_ids=positions, labels=labels, use_cache=False, **options)
    return losses, sequence[:, 1:][labels[:, 1:] != IGNORED]


def _goes_by_sequence(model: Any) -> bool:
    config = getattr(getattr(model, "module", model), "config", None)
    return getattr(config, "_attn_implementation", "") in (ATTENTION, FLASH)
