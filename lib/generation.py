"""A causal model directory, loaded to answer: greedy or sampled tokens after a prompt, several prompts at a time.

For evaluation and batch scoring, on transformers' own `generate`. Serving under load is another engine's work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.artifacts import TaskFile, check_model_directory
from lib.chat_templates import load_chat_tokenizer
from lib.dialogues import Message
from lib.engines import chosen_precision
from lib.errors import ModelError, RequestError
from lib.settings import ServingSettings

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Answer:
    """What the model said after one prompt."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    """With the end-of-turn token."""
    complete: bool
    """The model ended its turn; else it was cut at the tokens it was given."""


def prompt_of(tokenizer: Any, turns: Sequence[Message]) -> list[int]:
    """Token ids of a dialogue up to where the assistant is to speak. Raises RequestError."""
    try:
        found = tokenizer.apply_chat_template(
            list(turns), tokenize=True, add_generation_prompt=True, return_dict=True
        )
    except Exception as error:  # what a template raises is its own
        why = " ".join(str(error).split())
        raise RequestError(
            f"the model's chat template refuses these messages: {why}", param="messages"
        ) from None
    return list(found["input_ids"])


def check_prompt(prompt: Sequence[int], context: int) -> None:
    """Raises RequestError for a prompt that leaves no room for an answer among `context` tokens."""
    if len(prompt) >= context:
        raise RequestError(
            f"the messages have {len(prompt)} tokens and the model reads {context}; shorten them",
            param="messages",
            code="context_length_exceeded",
        )


@dataclass
class Generator:
    """Not for use by two threads at once."""

    info: TaskFile
    tokenizer: Any
    model: nn.Module
    name: str
    """Engine and precision, such as `torch bf16`."""
    tokens_per_batch: int

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return int(positions or self.info.max_length)

    def prompt(self, turns: Sequence[Message]) -> list[int]:
        """Token ids of a dialogue up to where the assistant is to speak. Raises RequestError."""
        return prompt_of(self.tokenizer, turns)

    def check(self, prompt: Sequence[int]) -> None:
        """Raises RequestError for a prompt that leaves no room for an answer in the model's context."""
        check_prompt(prompt, self.context)

    def answers(
        self,
        dialogues: Sequence[Sequence[Message]],
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Answer]:
        """The next turn of each dialogue, in their order; at temperature 0 the likeliest token each time. Of `seeds` each
        dialogue has one of its own, so that its tokens do not depend on which others it is computed with.

        Raises RequestError for a dialogue that leaves no room for an answer in the model's context.
        """
        prompts = [self.prompt(turns) for turns in dialogues]
        for prompt in prompts:
            self.check(prompt)
        found: dict[int, Answer] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        while order:
            longest = max_tokens + len(prompts[order[0]])
            size = 1
            while (
                size < len(order)
                and (size + 1) * (max_tokens + len(prompts[order[size]])) <= self.tokens_per_batch
            ):
                size += 1
                longest = max_tokens + len(prompts[order[size - 1]])
            chosen, order = order[:size], order[size:]
            room = min(max_tokens, self.context - (longest - max_tokens))
            own = None if seeds is None else [seeds[i] for i in chosen]
            batch = self._generate([prompts[i] for i in chosen], room, temperature, top_p, seed, own)
            found |= dict(zip(chosen, batch, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        seeds: Sequence[int] | None,
    ) -> list[Answer]:
        import torch

        longest = max(map(len, prompts))
        pad = int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._ends()[0])
        # Padding in front: the answer of each begins behind its prompt's last token.
        ids = np.full((len(prompts), longest), pad, np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[longest - len(prompt) :] = prompt
        mask = np.arange(longest) >= longest - np.array([[len(p)] for p in prompts])
        device = next(self.model.parameters()).device
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0 and seeds is not None:
            options["logits_processor"] = [_Drawn(seeds, temperature, top_p)]
        elif temperature > 0:
            options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        with torch.random.fork_rng(enabled=seed is not None), torch.inference_mode():
            if seed is not None:
                torch.manual_seed(seed)
            out = self.model.generate(  # type: ignore[operator]
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
                max_new_tokens=max_tokens,
                pad_token_id=pad,
                **options,
            )
        ends = set(self._ends())
        return [
            self._answer(tokens, len(prompt), ends)
            for tokens, prompt in zip(out[:, longest:].tolist(), prompts, strict=True)
        ]

    def _ends(self) -> list[int]:
        known: Any = self.model.generation_config.eos_token_id  # type: ignore[union-attr]
        return known if isinstance(known, list) else [] if known is None else [known]

    def _answer(self, tokens: list[int], prompt_tokens: int, ends: set[int]) -> Answer:
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        said = len(tokens) if end is None else end + 1
        return Answer(text, prompt_tokens, said, end is not None)


class _Drawn:
    """Logits that are the largest where chance falls, row by row: the largest of logits plus Gumbel noise is a draw from their
    softmax (Gumbel 1954). One of `transformers`' logits processors."""

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        import torch

        self.temperature, self.top_p = temperature, top_p
        self.chances = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores float [B, V]."""
        import torch

        logits = scores.float() / self.temperature
        if self.top_p < 1:
            ordered, places = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            ordered = ordered.masked_fill(before >= self.top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter_(1, places, ordered)
        drawn = torch.stack([torch.rand(logits.shape[1], generator=chance) for chance in self.chances])
        noise = -torch.log(-torch.log(drawn.clamp(1e-20, 1 - 1e-7)))
        return logits + noise.to(logits.device)


def load_generator(folder: Path, serving: ServingSettings) -> Generator:
    """Raises ModelError when the directory is not a chat model or its weights are not safetensors."""
    check_model_directory(folder)
    return open_generator(folder, TaskFile.read(folder, "chat"), serving)


def open_generator(
    folder: Path, info: TaskFile, serving: ServingSettings, template: str | None = None
) -> Generator:
    """A generator from any checked causal model directory, such as a base model before it is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    precision = chosen_precision(serving.precision, gpu)
    if not gpu:
        torch.set_num_threads(serving.threads or os.cpu_count() or 1)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no causal language model that can be read: {error}") from error
    model = model.eval().to("cuda" if gpu else "cpu")
    tokenizer = load_chat_tokenizer(folder, str(folder), template)
    return Generator(info, tokenizer, model, f"torch {precision}", serving.tokens_per_batch)
