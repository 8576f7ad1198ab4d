"""What the forward pass keeps for the backward pass, in bytes.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.1: a
16-bit transformer layer keeps s·b·h·(34 + 5·a·s/h) bytes, of which attention 11·s·b·h + 5·a·s²·b, the
feed-forward block 19·s·b·h, the two LayerNorms 4·s·b·h. Here the same terms are written out for the widths
that a model really has, and adapted:

- fused attention (SDPA, FlashAttention; Dao et al. 2022) keeps no s × s matrix: of 5·a·s²·b only the fp32
  log of the softmax's sum is left, 4·a·s·b;
- grouped keys and values are as wide as they are, not h;
- a gated feed-forward block keeps four tensors of the inner width: the gate before and after its
  activation, the other branch, their product;
- transformers computes RMSNorm in fp32: its input once in fp32 and its normalised output in 16 bits;
- without dropout there are no masks; our CPU dropout keeps its mask in the type it multiplies.

Notation: s tokens in a sequence, b sequences, h width, a heads, p bytes of a number.
"""

from __future__ import annotations

from lib.planner.architecture import Architecture

# Logits of a language model at their most, in the loss's backward pass: the model's own (p bytes) and, in fp32,
# the log-softmax that was kept, the gradient by it, the gradient by the logits; transformers upcasts them.
FP32_LOGITS = 12


def layer(model: Architecture, sequence: int, p: int, *, fused: bool = True, mask: int = 1) -> int:
    """Bytes that one layer keeps for each token.

    `p` is 2 in bf16 and fp16, 4 in fp32; `mask` the bytes of one element of a dropout mask. Without
    `fused`, the matrices of s × s scores are kept.
    """
    mask = mask if model.dropout else 0
    h, queries = model.width, model.heads * model.head_width
    keys_values = 2 * model.key_value_heads * model.head_width
    # The projections' input, queries, keys and values, the output projection's input.
    attention = p * (h + queries + keys_values + queries) + mask * h
    if fused:
        attention += 4 * model.heads
    else:
        # Softmax's output; with dropout what is left of it, and its mask.
        attention += model.heads * sequence * (p + (p + mask if model.dropout else 0))
    feed_forward = p * (h + (4 if model.gated else 2) * model.inner) + mask * h
    return attention + feed_forward + 2 * norm(model, p)


def norm(model: Architecture, p: int) -> int:
    """Bytes that one normalisation keeps for each token."""
    return (4 + p if model.rms_norm else p) * model.width


def ends(model: Architecture, p: int) -> int:
    """Bytes that the embedding and the output keep for each token, logits left out."""
    embedding = 0 if model.causal else norm(model, p) + model.width
    return embedding + norm(model, p) + p * model.width


def forward(
    model: Architecture,
    tokens: int,
    sequence: int,
    p: int,
    *,
    checkpointing: bool,
    fused: bool = True,
    mask: int = 1,
) -> int:
    """Bytes kept when the forward pass of `tokens` tokens, in sequences of `sequence`, has ended.

    With checkpointing of every layer its input alone is kept, and one layer at a time is computed again
    (Chen et al. 2016; 2·s·b·h·L in Korthikanti et al.).
    """
    each = layer(model, sequence, p, fused=fused, mask=mask)
    kept = model.layers * p * model.width + each if checkpointing else model.layers * each
    return tokens * (kept + ends(model, p))


def logits(model: Architecture, tokens: int, p: int) -> int:
    """Bytes of the scores of `tokens` tokens while the loss is differentiated."""
    return tokens * model.vocabulary * (p + FP32_LOGITS) if model.vocabulary_head else 0


def inference(model: Architecture, tokens: int, p: int) -> int:
    """Bytes of a forward pass that keeps nothing: one layer's tensors, and logits with their fp32 copies."""
    h, queries = model.width, model.heads * model.head_width
    widest = max(3 * queries + 2 * h, 2 * h + (3 if model.gated else 2) * model.inner)
    scores = model.vocabulary * (p + 8) if model.vocabulary_head else 0
    return tokens * max(p * widest, scores)
