"""Dialogues → tokens by a model's own chat template, and which of the tokens the assistant says.

A template is a program of the model's makers (Jinja); it tells nobody where a turn begins and ends. Where it
marks them with `{% generation %}`, transformers reads the marks. Otherwise a turn is what is added when the
messages before it, with the prompt to answer, become the messages with it: found by rendering both, and true
only if each is the beginning of the next, which is looked at for every dialogue.

Special tokens that a user types inside a message are read as such, as every server with the same template does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib import storage
from lib.base_models import base_directory
from lib.dialogues import MalformedError, Message
from lib.encoders import IGNORED
from lib.errors import ConfigError, ModelError
from lib.settings import ModelSettings

# Roles around each turn and a mark behind it (OpenAI 2023): what most open chat models were trained with.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMED = {"chatml": CHATML}
# Tokens that a model must know for a template to end a turn by them.
TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CANNOT_SPLIT = (
    "cannot be told apart into turns by the chat template of {base}: {why}; give model.chat_template a template "
    "that marks the assistant's words with {{% generation %}}"
)


@dataclass(frozen=True)
class Encoded:
    """A dialogue as the model reads it."""

    input_ids: np.ndarray
    """int32 [T]"""
    labels: np.ndarray
    """int32 [T]: the token itself where the assistant says it, IGNORED elsewhere; not shifted."""
    truncated: bool
    """Turns were left out, or the last exchange was cut."""


@functools.lru_cache(maxsize=4)
def chat_tokenizer(base: str, template: str | None) -> Any:
    """The transformers tokeniser of a base model, with the chat template that is configured; once in a process.

    Raises ConfigError when neither the model nor the configuration gives a template.
    """
    return load_chat_tokenizer(base_directory(base), base, template)


def load_chat_tokenizer(folder: Path, base: str, template: str | None) -> Any:
    """`chat_tokenizer` of a directory; `base` is its name in messages."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{folder} has no usable tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {base} tells no places of its tokens; convert it to tokenizer.json"
        )
    if template is not None:
        tokenizer.chat_template = template_text(template)
        for token in TOKENS.get(template, ()):
            if token not in tokenizer.get_vocab():
                raise ConfigError(
                    f"model.chat_template {template}: the tokenizer of {base} has no token {token}; give the file of "
                    f"a template that is made of its own ({', '.join(tokenizer.all_special_tokens)})"
                )
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{base} has no chat template; give model.chat_template: {' or '.join(NAMED)}, or the file of one"
        )
    return tokenizer


def template_text(template: str) -> str:
    """The template that `model.chat_template` names: one of ours, or a file's. Raises ConfigError."""
    if template in NAMED:
        return NAMED[template]
    try:
        with storage.open_file(storage.uri(template)) as file:
            text: str = file.read().decode("utf-8")
    except Exception as error:
        raise ConfigError(
            f"model.chat_template: {template!r} is neither {' nor '.join(NAMED)} nor a file that can be read ({error})"
        ) from None
    return text


def encode(turns: list[Message], model: ModelSettings) -> Encoded:
    """Tokens and labels of a dialogue, no longer than `model.max_length`.

    Of a longer dialogue the oldest exchanges go first; the system message and the last exchange stay whole. When
    those two alone are too long, their end is cut, or their beginning, if otherwise no word of the assistant were
    left. Raises MalformedError for a dialogue that the template refuses or cannot split.
    """
    tokenizer = chat_tokenizer(model.base, model.chat_template)
    ids, spoken = tokens(tokenizer, turns, model.base)
    kept = turns
    while len(ids) > model.max_length and (fewer := without_oldest(kept)) is not None:
        kept = fewer
        ids, spoken = tokens(tokenizer, kept, model.base)
    truncated = len(kept) < len(turns) or len(ids) > model.max_length
    if len(ids) > model.max_length:
        first = int(np.argmax(spoken))
        part = (
            slice(0, model.max_length)
            if first < model.max_length
            else slice(len(ids) - model.max_length, None)
        )
        ids, spoken = ids[part], spoken[part]
    labels = np.where(spoken, ids, IGNORED).astype(np.int32)
    labels[0] = IGNORED  # nothing comes before it that could tell it
    return Encoded(ids, labels, truncated)


def without_oldest(turns: list[Message]) -> list[Message] | None:
    """The dialogue without its oldest exchange (a user's turn and all up to the next); None when one is left."""
    head = [turn for turn in turns[:1] if turn["role"] == "system"]
    rest = turns[len(head) :]
    begins = [i for i, turn in enumerate(rest) if turn["role"] == "user" and i > 0]
    return head + rest[begins[0] :] if begins else None


def tokens(
    tokenizer: Any, turns: Sequence[Message], base: str = "the model"
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [T] of a whole dialogue, and bool [T]: which of them the assistant says, its end of turn included.

    Raises MalformedError when the template refuses the dialogue or cannot be split.
    """
    if _GENERATION.search(tokenizer.chat_template):
        return marked_tokens(tokenizer, turns, base)
    text, spans = split(tokenizer, turns, base)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoding["input_ids"], np.int32)
    offsets = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    spoken = np.zeros(len(ids), bool)
    for start, end in spans:
        spoken |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return ids, spoken


def marked_tokens(tokenizer: Any, turns: Sequence[Message], base: str) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` by the marks of a template that has `{% generation %}`."""
    try:
        found = tokenizer.apply_chat_template(
            list(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:
        raise MalformedError(_refused(base, error)) from None
    return np.asarray(found["input_ids"], np.int32), np.asarray(found["assistant_masks"], bool)


def split(tokenizer: Any, turns: Sequence[Message], base: str) -> tuple[str, list[tuple[int, int]]]:
    """The rendered dialogue, and the first and last + 1 character of each of the assistant's turns.

    A turn ends with its end-of-turn token. Blanks that the template puts behind that token are not the
    assistant's; where there is no such token, they are what ends the turn.
    """
    whole = render(tokenizer, turns, base)
    special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = render(tokenizer, turns[:i], base, prompt=True)
        behind = whole if i == len(turns) - 1 else render(tokenizer, turns[: i + 1], base)
        for shorter, longer in ((before, behind), (behind, whole)):
            if not longer.startswith(shorter):
                raise MalformedError(
                    _CANNOT_SPLIT.format(
                        base=base, why=f"what precedes turn {i + 1} changes when it is added"
                    )
                )
        said = behind[len(before) :]
        bare = said.rstrip()
        ends_in_token = any(bare.endswith(token) for token in special)
        spans.append((len(before), len(before) + len(bare if ends_in_token else said)))
    return whole, spans


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the assistant's turns end with; None where the template has none."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, spoken = tokens(tokenizer, probe)
    last = int(ids[spoken][-1])
    return last if last in tokenizer.all_special_ids else None


def render(tokenizer: Any, turns: Sequence[Message], base: str, prompt: bool = False) -> str:
    """The text of a dialogue; with `prompt`, up to where the assistant is to speak. Raises MalformedError."""
    try:
        text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # what a template raises is its own
        raise MalformedError(_refused(base, error)) from None
    return text


def _refused(base: str, error: Exception) -> str:
    return f"is refused by the chat template of {base}: {' '.join(str(error).split())}; mend the order of its turns"
