"""What a chat model is told of the passages that were found, alike when it is trained and when it answers.

What is searched: the last thing that the user said, and, where it is not the first, the same together with what was said
before (`questions_of`). The first alone would lose the subject of "and how long does that take?", the second alone
would hold on to a subject that the user has left; the rankings of both are fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lib.errors import RequestError
from lib.retrieval.search import Hit
from lib.settings import GroundingSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What a chat template adds to a message, at most: role, marks of its beginning and end.
MESSAGE_TOKENS = 16
# More of a question is not looked at; an encoder reads some hundred tokens.
QUESTION_CHARS = 4000


class Prompter:
    """Puts passages before conversations with one chat model, whose tokenizer must not truncate and whose `context` is
    the most tokens of a prompt and its answer together. Threads may share it."""

    def __init__(self, settings: GroundingSettings, tokenizer: Tokenizer, context: int) -> None:
        self.settings = settings
        self._tokenizer = tokenizer
        self._context = context

    def told(
        self, messages: Sequence[dict[str, Any]], hits: Sequence[Hit], answer_tokens: int | None = None
    ) -> tuple[list[dict[str, Any]], list[Hit]]:
        """The conversation with the first passages that the context has room for in its system message, and which
        those are; without any, with what is said when nothing is relevant.

        Raises RequestError when the conversation leaves no room for a passage.
        """
        if not hits:
            return with_system(messages, self.settings.nothing_found), []
        chosen = self._fitting(hits, messages, answer_tokens)
        return with_system(messages, f"{self.settings.instructions}\n\n{listed(chosen)}"), chosen

    def tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _fitting(
        self, hits: Sequence[Hit], messages: Sequence[dict[str, Any]], answer_tokens: int | None
    ) -> list[Hit]:
        said = sum(self.tokens(text_of(message)) + MESSAGE_TOKENS for message in messages)
        said += self.tokens(self.settings.instructions) + MESSAGE_TOKENS
        room = self._context - said - (answer_tokens or self.settings.answer_tokens)
        left = min(room, self.settings.passage_tokens)
        chosen: list[Hit] = []
        for hit in hits:
            needed = self.tokens(numbered(len(chosen) + 1, hit)) + 2
            if needed <= left:
                chosen.append(hit)
                left -= needed
        if not chosen:
            raise RequestError(
                f"the conversation leaves {max(room, 0)} of {self._context} tokens for passages of the knowledge base, "
                "too few for one; send fewer or shorter messages, or a lower max_tokens",
                param="messages",
                code="context_length_exceeded",
            )
        return chosen


def questions_of(messages: Sequence[dict[str, Any]]) -> list[str]:
    """Ways of putting a conversation's question: the user's last turn, and that with the turns before it, the latest
    first, so that an encoder which cuts long texts cuts the oldest. None when the user says nothing."""
    turns = [text_of(message) for message in messages if message.get("role") == "user"]
    said = [turn for turn in reversed(turns) if turn.strip()]
    ways = [] if not said else said if len(said) == 1 else [said[0], "\n".join(said)]
    return [way[:QUESTION_CHARS] for way in ways]


def text_of(message: dict[str, Any]) -> str:
    """What a message says, in one text; OpenAI's parts that are no text say nothing."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text") or "") for part in content if part.get("type") == "text")


def with_system(messages: Sequence[dict[str, Any]], said: str) -> list[dict[str, Any]]:
    """The conversation with something more in its system message, which is made where there is none."""
    first, *rest = messages
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": said}, *messages]
    return [{**first, "content": f"{text_of(first)}\n\n{said}".strip()}, *rest]


def listed(hits: Sequence[Hit]) -> str:
    """The passages as the model reads them."""
    return "\n\n".join(numbered(i, hit) for i, hit in enumerate(hits, 1))


def numbered(number: int, hit: Hit) -> str:
    return f"[{number}] {' > '.join((hit.title, *hit.headings))}\n{hit.text}"
