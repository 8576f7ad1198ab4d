"""Items and histories → vectors whose product says how well they match.

An item's vector is the sum of an embedding of its id, a learned map of the encoder's vector of its text, embeddings of
its categories and a map of its numbers. In training the first is left out of some items at each step, so that what is
left serves an item that nobody has touched (Volkovs et al. 2017, DropoutNet). A user's vector is what a causal network
makes of the items of the history, one after the other, and of what is known of the user; the product of the two and
the item's own bias are logits of what the user turns to next.

Shapes: B histories, T interactions in the longest, N items, K items that are asked for, W width, D the encoder's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.artifacts import DatasetRef
from lib.settings import RecommenderSettings

# A gap of s seconds is log2(1 + s) / GAP_BITS, cut off at the last: 25 years.
GAPS, GAP_BITS = 20, 1.6
# Of the encoder's vectors, of length 1: so their map begins about as large as an id's embedding.
TEXT_SCALE = 4.0
# How often an item is drawn goes by this power of how often it is seen (Mikolov et al. 2013).
DRAWN_POWER = 0.75
# Items that a tuned encoder reads at a time where no gradient is kept.
ITEMS_AT_ONCE = 256


@dataclass(frozen=True)
class Shape:
    """What a model is built from; `config.json` of a model directory."""

    items: int
    text_width: int
    """D; 0 without texts."""
    item_categories: list[str]
    item_numbers: dict[str, list[float]]
    """`mean` and `spread` of each column (lib.recommender.items.Scale)."""
    user_categories: list[str]
    user_numbers: dict[str, list[float]]
    events: list[str]
    settings: dict[str, Any]
    """Of `model.recommender`."""
    item_number_names: list[str] = field(default_factory=list)
    user_number_names: list[str] = field(default_factory=list)
    model_type: str = "whorl-recommender"

    @property
    def recommender(self) -> RecommenderSettings:
        return RecommenderSettings.model_validate(self.settings)

    @classmethod
    def read(cls, file: Path) -> Shape:
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False))


@dataclass
class Facts:
    """What is known of N items."""

    categories: np.ndarray
    """int64: numbers of the categories, one item behind the other, and `starts` int64 [N] where each begins."""
    starts: np.ndarray
    numbers: np.ndarray
    """float32 [N, F], standardised."""
    seen: np.ndarray
    """int [N]: how often training sees it; the id of an item that it never saw means nothing."""
    texts: np.ndarray | None = None
    """float32 [N, D] of length 1: the encoder's vectors."""
    tokens: np.ndarray | None = None
    """int64 [N, T] in the place of `texts` where the encoder is trained: token ids, below 0 behind the end."""


class Recommender(nn.Module):
    """`facts` are those of the N items of the shape, in their order; they are no part of the weights."""

    fact_categories: torch.Tensor
    fact_starts: torch.Tensor
    fact_numbers: torch.Tensor
    known: torch.Tensor
    texts: torch.Tensor | None
    tokens: torch.Tensor
    draws: torch.Tensor
    shares: torch.Tensor
    dataset: DatasetRef | None = None
    """Whose items these are."""

    def __init__(self, shape: Shape, facts: Facts, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config = shape
        own = shape.recommender
        width = own.width
        self.encoder = encoder
        self.id = nn.Embedding(shape.items, width)
        nn.init.normal_(self.id.weight, std=0.5 * width**-0.5)
        # Of its own, and of what is known besides.
        self.id_bias = nn.Embedding(shape.items, 1)
        nn.init.zeros_(self.id_bias.weight)
        self.fact_bias = nn.Linear(width, 1)
        self.text = nn.Linear(shape.text_width, width, bias=False) if shape.text_width else None
        self.item_categories = _bag(len(shape.item_categories), width)
        self.item_numbers = _map(len(shape.item_numbers["mean"]), width)
        self.user_categories = _bag(len(shape.user_categories), width)
        self.user_numbers = _map(len(shape.user_numbers["mean"]), width)
        self.gap = _small(GAPS, width) if own.time_gaps else None
        self.event = _small(len(shape.events), width) if len(shape.events) > 1 else None
        self.item_dropout, self.user_dropout = nn.Dropout(own.item_dropout), nn.Dropout(own.user_dropout)
        if own.sequence == "gru":
            self.recurrent = nn.GRU(width, width, own.layers, batch_first=True)
        else:
            self.position = _small(own.history, width)
            layer = nn.TransformerEncoderLayer(
                width, own.heads, 2 * width, own.user_dropout, "gelu", batch_first=True, norm_first=True
            )
            self.attention = nn.TransformerEncoder(layer, own.layers, nn.LayerNorm(width), False)
        self.out = nn.Linear(width, width)
        for name, values in (
            ("fact_categories", facts.categories),
            ("fact_starts", facts.starts),
            ("fact_numbers", facts.numbers),
            ("known", facts.seen > 0),
            ("texts", facts.texts),
            ("tokens", facts.tokens),
        ):
            self._keep(name, values)
        if own.sampled:  # how likely an item is to be drawn, and to be what somebody turns to
            for name, power in (("draws", DRAWN_POWER), ("shares", 1.0)):
                counts = facts.seen.astype(np.float64) ** power * (facts.seen > 0)
                self._keep(name, (counts / counts.sum()).astype(np.float32))

    def _keep(self, name: str, values: np.ndarray | None) -> None:
        tensor = None if values is None else torch.from_numpy(np.ascontiguousarray(values))
        self.register_buffer(name, tensor, persistent=False)

    def forward(
        self,
        items: torch.Tensor,
        gaps: torch.Tensor,
        events: torch.Tensor,
        user_categories: torch.Tensor,
        user_starts: torch.Tensor,
        user_numbers: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The user's vector after each interaction [B, T, W], vectors [K, W] and biases [K] of the items `wanted`, int64
        [K]; None: of all N.

        `items`, `gaps` (`gap_codes`) and `events` int64 [B, T]; what is behind a history's end counts for nothing before it.
        `user_categories` int64 one user behind the other with `user_starts` [B], `user_numbers` [B, F].
        """
        if wanted is None:
            vectors, bias = self.item_vectors(torch.arange(self.config.items, device=items.device))
            read = vectors[items]
        else:
            all_of, where = torch.unique(torch.cat([items.flatten(), wanted]), return_inverse=True)
            encoded, biases = self.item_vectors(all_of)
            read = encoded[where[: items.numel()]].view(*items.shape, -1)
            vectors, bias = encoded[where[items.numel() :]], biases[where[items.numel() :]]
        about = self.about(user_categories, user_starts, user_numbers)
        return self.user_vectors(read, gaps, events, about), vectors, bias

    def item_vectors(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors [K, W] and biases [K] of items int64 [K]."""
        own = self.known[items].unsqueeze(-1).to(self.id.weight.dtype)
        share = self.config.recommender.id_dropout
        if self.training and share and self._has_facts():
            own = own * (torch.rand(len(items), 1, device=items.device) >= share)
        facts = self.facts_of(items)
        vectors, bias = self.id(items) * own, self.id_bias(items) * own
        if facts is not None:
            vectors, bias = vectors + facts, bias + self.fact_bias(facts)
        return vectors, bias.squeeze(-1)

    def _has_facts(self) -> bool:
        return any(part is not None for part in (self.text, self.item_categories, self.item_numbers))

    def facts_of(self, items: torch.Tensor) -> torch.Tensor | None:
        """What text, categories and numbers of items [K] say of them, [K, W]; None where there is nothing."""
        parts = []
        if self.text is not None:
            parts.append(self.text(TEXT_SCALE * self.texts_of(items).to(self.text.weight.dtype)))
        if self.item_categories is not None:
            chosen, starts = picked(self.fact_categories, self.fact_starts, items)
            parts.append(self.item_categories(chosen, starts))
        if self.item_numbers is not None:
            parts.append(self.item_numbers(self.fact_numbers[items].to(self.item_numbers.weight.dtype)))
        return torch.stack(parts).sum(0) if parts else None

    def texts_of(self, items: torch.Tensor) -> torch.Tensor:
        """The encoder's vectors [K, D] of items [K], of length 1."""
        if self.texts is not None:
            return self.texts[items]
        assert self.encoder is not None
        if torch.is_grad_enabled():
            return encoded(self.encoder, self.tokens[items])
        return torch.cat(
            [encoded(self.encoder, self.tokens[part]) for part in torch.split(items, ITEMS_AT_ONCE)]
        )

    def about(
        self, categories: torch.Tensor, starts: torch.Tensor, numbers: torch.Tensor
    ) -> torch.Tensor | None:
        """What is known of users, [B, W]; None where nothing ever is."""
        parts = []
        if self.user_categories is not None:
            parts.append(self.user_categories(categories, starts))
        if self.user_numbers is not None:
            parts.append(self.user_numbers(numbers.to(self.user_numbers.weight.dtype)))
        return torch.stack(parts).sum(0) if parts else None

    def user_vectors(
        self, read: torch.Tensor, gaps: torch.Tensor, events: torch.Tensor, about: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, T, W] from the vectors of the items of the history [B, T, W]."""
        states = self.item_dropout(read)
        if self.gap is not None:
            states = states + self.gap(gaps)
        if self.event is not None:
            states = states + self.event(events)
        length = states.shape[1]
        if self.config.recommender.sequence == "gru":
            states, _ = self.recurrent(states)
        else:
            states = states + self.position(torch.arange(length, device=states.device))
            later = torch.ones(length, length, dtype=torch.bool, device=states.device).triu(1)
            states = self.attention(states, mask=later)
        users: torch.Tensor = self.out(self.user_dropout(states))
        return users if about is None else users + about.unsqueeze(1)

    def with_facts(self, facts: Facts) -> Recommender:
        """The same weights over other items, of which none has an id of its own."""
        shape = replace(self.config, items=len(facts.seen))
        other = Recommender(shape, facts, self.encoder)
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("id")}
        other.load_state_dict(state, strict=False)
        return other.train(self.training)


def encoded(encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Vectors [K, D] of length 1: the mean over the tokens of each text [K, T]."""
    mask = (tokens >= 0).long()
    tokens, mask = tokens[:, : mask.sum(1).max()], mask[:, : mask.sum(1).max()]
    states = encoder(input_ids=tokens.clamp(min=0), attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).to(states.dtype)
    mean: torch.Tensor = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def gap_codes(times: np.ndarray) -> np.ndarray:
    """int64, as many: how long after the one before it each of a user's interactions came; 0 for the first."""
    gaps = np.diff(times, prepend=times[:1]).clip(min=0)
    return np.asarray(np.minimum(np.log2(gaps + 1) / GAP_BITS, GAPS - 1), np.int64)


def _bag(count: int, width: int) -> nn.EmbeddingBag | None:
    if not count:
        return None
    bag = nn.EmbeddingBag(count, width, mode="sum")
    nn.init.normal_(bag.weight, std=0.25 * width**-0.5)
    return bag


def _map(count: int, width: int) -> nn.Linear | None:
    if not count:
        return None
    layer = nn.Linear(count, width, bias=False)
    nn.init.normal_(layer.weight, std=0.25 * width**-0.5)
    return layer


def _small(count: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(count, width)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding


def picked(
    codes: torch.Tensor, starts: torch.Tensor, items: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of items [K] one behind the other, and where each item's begin."""
    ends = torch.cat([starts[1:], starts.new_tensor([len(codes)])])
    sizes = (ends - starts)[items]
    begins = sizes.cumsum(0) - sizes
    places = torch.arange(int(sizes.sum()), device=items.device)
    places = places - torch.repeat_interleave(begins, sizes) + torch.repeat_interleave(starts[items], sizes)
    return codes[places], begins
