"""The shape of a model: by name, or from a directory's config.json and the headers of its safetensors files.

A safetensors file begins with 8 bytes, the length of a JSON header that names every tensor with its type
and shape (https://huggingface.co/docs/safetensors): parameters are counted without reading one of them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lib import storage
from lib.base_models import HUB_ID, base_directory
from lib.errors import ConfigError, ModelError, nearest
from lib.samples import is_sample

# glibc's DEFAULT_MMAP_THRESHOLD_MAX in elements of fp32: what is smaller comes from its heap (mallopt(3)).
HEAP_LIMIT = 32 * 2**20 // 4
# Longer than any header there is; what is above is not a safetensors file.
HEADER_LIMIT = 100_000_000
# Tensors of the head that a model was pretrained with: a classifier puts its own in their place.
PRETRAINED_HEADS = ("lm_head.", "cls.", "vocab_projector.", "vocab_transform.", "embed_out.")


@dataclass(frozen=True)
class Architecture:
    """A transformer, as far as memory and time depend on it."""

    name: str
    layers: int
    width: int
    """Of the residual stream (h)."""
    heads: int
    key_value_heads: int
    head_width: int
    inner: int
    """Width inside the feed-forward block (4h in GPT; of each of the two branches when gated)."""
    vocabulary: int
    parameters: int
    lookups: int
    """Parameters that are looked up and not multiplied with: embeddings, unless they serve as the output too."""
    largest: int
    """Parameters of the module that has most of its own, as DeepSpeed's estimator counts them."""
    small: int
    """Parameters in tensors of less than 32 MiB in fp32."""
    gated: bool
    """Feed-forward of three matrices (SwiGLU, Shazeer 2020) instead of two."""
    rms_norm: bool
    """RMSNorm (Zhang and Sennrich 2019), which transformers computes in fp32; else LayerNorm."""
    dropout: bool
    """Dropout while training: its masks are kept for the backward pass."""
    causal: bool
    """Attends to the past only."""
    vocabulary_head: bool
    """The output is a score for each entry of the vocabulary; else a few classes."""

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with in the forward pass (N in Kaplan et al. 2020)."""
        return self.parameters - self.lookups


def llama(
    name: str,
    layers: int,
    width: int,
    heads: int,
    key_value_heads: int,
    inner: int,
    vocabulary: int,
    tied: bool = False,
) -> Architecture:
    """A decoder with RMSNorm, rotary positions, SwiGLU and no biases (Touvron et al. 2023)."""
    head_width = width // heads
    embedding = vocabulary * width
    queries, keys = width * heads * head_width, width * key_value_heads * head_width
    tensors = [*[queries, queries, keys, keys, *[width * inner] * 3, width, width] * layers, width]
    tensors += [embedding] if tied else [embedding, embedding]
    return Architecture(
        name=name,
        layers=layers,
        width=width,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=head_width,
        inner=inner,
        vocabulary=vocabulary,
        parameters=sum(tensors),
        lookups=0 if tied else embedding,
        largest=max(tensors),
        small=_small(tensors),
        gated=True,
        rms_norm=True,
        dropout=False,
        causal=True,
        vocabulary_head=True,
    )


def bert(
    name: str, layers: int, width: int, heads: int, vocabulary: int = 30_522, positions: int = 512
) -> Architecture:
    """An encoder with LayerNorm, learned positions, biases and a pooler (Devlin et al. 2019), to classify with."""
    inner = 4 * width
    each = [*[width * width, width] * 4, width * inner, inner, width * inner, *[width] * 5]
    embeddings = [vocabulary * width, positions * width, 2 * width]
    tensors = [*embeddings, width, width, *each * layers, width * width, width]
    return Architecture(
        name=name,
        layers=layers,
        width=width,
        heads=heads,
        key_value_heads=heads,
        head_width=width // heads,
        inner=inner,
        vocabulary=vocabulary,
        parameters=sum(tensors),
        lookups=sum(embeddings),
        largest=vocabulary * width,
        small=_small(tensors),
        gated=False,
        rms_norm=False,
        dropout=True,
        causal=False,
        vocabulary_head=False,
    )


def _small(sizes: Iterable[int]) -> int:
    return sum(size for size in sizes if size < HEAP_LIMIT)


# Llama 2: Touvron et al. 2023, table 1 and the released configurations; Llama 3: Grattafiori et al. 2024, table 3.
NAMED = {
    a.name: a
    for a in (
        llama("smollm2-135m", 30, 576, 9, 3, 1536, 49_152, tied=True),
        llama("smollm2-1.7b", 24, 2048, 32, 32, 8192, 49_152, tied=True),
        llama("llama-7b", 32, 4096, 32, 32, 11_008, 32_000),
        llama("llama-13b", 40, 5120, 40, 40, 13_824, 32_000),
        llama("llama-70b", 80, 8192, 64, 8, 28_672, 32_000),
        llama("llama-3-8b", 32, 4096, 32, 8, 14_336, 128_256),
        llama("llama-3-70b", 80, 8192, 64, 8, 28_672, 128_256),
        llama("llama-405b", 126, 16_384, 128, 8, 53_248, 128_256),
        bert("bert-base", 12, 768, 12),
        bert("bert-large", 24, 1024, 16),
    )
}


def named(name: str) -> Architecture:
    """Raises ConfigError with the nearest known name."""
    if name not in NAMED:
        raise ConfigError(
            f"plan.architecture: no architecture {name!r}{nearest(name, NAMED)} (known: {', '.join(NAMED)})"
        )
    return NAMED[name]


def read(base: str, vocabulary_head: bool, dropout: float | None = None) -> Architecture:
    """The architecture of a base model: `sample://NAME`, a directory, a storage URI or a hub id.

    With `vocabulary_head` the model is trained as a language model, else as a classifier, without the head
    that it was pretrained with. `dropout` stands in for what config.json says. Raises ModelError for a
    directory that has no config.json or safetensors weights, or whose config.json lacks what is needed.
    """
    folder = _folder(base)
    config = storage.join(folder, "config.json")
    if not storage.exists(config):
        raise ModelError(f"{base} holds no config.json, so it is not a model directory")
    values = storage.read_json(config)
    values = values.get("text_config") or values
    tensors = _tensors(folder, base)
    if not vocabulary_head:
        tensors = {n: s for n, s in tensors.items() if not n.startswith(PRETRAINED_HEADS)}
    return _architecture(base, values, tensors, vocabulary_head, dropout)


def _folder(base: str) -> str:
    """The model directory as a URI, without fetching weights unless the hub leaves no other way."""
    if is_sample(base):
        return storage.uri(base_directory(base))
    if HUB_ID.match(base) and not base.startswith((".", "/")) and not storage.exists(storage.uri(base)):
        return storage.uri(base_directory(base))
    return storage.uri(base)


def _tensors(folder: str, base: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of every floating-point tensor."""
    files = [f for f in storage.ls(folder) if f.endswith(".safetensors")]
    index = storage.join(folder, "model.safetensors.index.json")
    if storage.exists(index):
        files = sorted(set(storage.read_json(index)["weight_map"].values()))
    elif "model.safetensors" in files:  # beside it may lie others, such as an adapter's
        files = ["model.safetensors"]
    if not files:
        raise ModelError(
            f"{base} holds no safetensors weights; convert them to model.safetensors (save_pretrained does)"
        )
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, entry in header(storage.join(folder, file)).items():
            # Integers and booleans are buffers, such as position ids.
            if name != "__metadata__" and entry["dtype"].startswith(("F", "BF")):
                found[name] = tuple(entry["shape"])
    return found


def header(uri: str) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises ModelError when it has none."""
    with storage.open_file(uri) as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_LIMIT + 1
        try:
            if length > HEADER_LIMIT:
                raise ValueError
            values = json.loads(file.read(length))
        except ValueError:
            raise ModelError(
                f"{uri} has no safetensors header; it is cut off or not what it is called"
            ) from None
    if not isinstance(values, dict):
        raise ModelError(f"{uri} has no safetensors header; it is cut off or not what it is called")
    return values


def _architecture(
    base: str,
    config: dict[str, Any],
    tensors: dict[str, tuple[int, ...]],
    vocabulary_head: bool,
    dropout: float | None,
) -> Architecture:
    def value(*names: str, default: Any = None) -> Any:
        found = next((config[n] for n in names if config.get(n) is not None), default)
        if found is None:
            raise ModelError(
                f"config.json of {base} names no {names[0]}; plan.architecture may name it instead"
            )
        return found

    width = value("hidden_size", "n_embd", "dim", "d_model")
    heads = value("num_attention_heads", "n_head", "n_heads")
    vocabulary = value("vocab_size")
    embeddings = {n: s for n, s in tensors.items() if len(s) == 2 and _is_embedding(n)}
    lookups = sum(math.prod(s) for s in embeddings.values())
    own_head = any(n.startswith(PRETRAINED_HEADS) and s[:1] == (vocabulary,) for n, s in tensors.items())
    if vocabulary_head and not own_head:  # the embedding serves as the output's matrix
        lookups -= vocabulary * width
    modules: dict[str, int] = {}
    for name, shape in tensors.items():
        module = name.rpartition(".")[0]
        modules[module] = modules.get(module, 0) + math.prod(shape)
    rates = ("hidden_dropout_prob", "dropout", "resid_pdrop", "hidden_dropout", "mlp_dropout")
    rate = dropout if dropout is not None else max((config.get(n) or 0.0 for n in rates), default=0.0)
    return Architecture(
        name=base,
        layers=value("num_hidden_layers", "n_layer", "n_layers"),
        width=width,
        heads=heads,
        key_value_heads=value("num_key_value_heads", default=heads),
        head_width=value("head_dim", default=width // heads),
        inner=value("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", default=4 * width),
        vocabulary=vocabulary,
        parameters=sum(math.prod(s) for s in tensors.values()),
        lookups=lookups,
        largest=max(modules.values()),
        small=_small(math.prod(s) for s in tensors.values()),
        # ModernBERT keeps both branches in one matrix, `Wi`.
        gated=any(".gate_proj." in n or ".mlp.Wi." in n or ".gate_up_proj." in n for n in tensors),
        rms_norm="rms_norm_eps" in config,
        dropout=rate > 0,
        causal=vocabulary_head or any(n.endswith("CausalLM") for n in config.get("architectures") or []),
        vocabulary_head=vocabulary_head,
    )


def _is_embedding(name: str) -> bool:
    """Whether a tensor is a table of embeddings (`word_embeddings`, `embed_tokens`, `tok_embeddings`, `wte`, `wpe`)."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return module.endswith("embeddings") or module in (
        "embed_tokens",
        "wte",
        "wpe",
        "embed_in",
        "embed_positions",
    )
