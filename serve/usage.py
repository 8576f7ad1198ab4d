"""Tokens of a chat's answer, counted while it passes, so that they are known also when the client breaks off.

vLLM tells the usage so far with each part of a stream when it is asked to (`continuous_usage_stats`). A client that
did not ask is not told: what it did not ask for is cut out of the part's text.
"""

import json
import re
from typing import Any

# `,"usage":{` stands in no string of a JSON text, whose own quotation marks are escaped.
USAGE = re.compile(r',"usage":(\{(?:[^{}]|\{[^{}]*\})*\})')
INDEX = re.compile(r'"choices":\[\{"index":(\d+)')
ALONE = '"choices":[]'


class Usage:
    """The usage of one request. `asked`: whether the client is told the total at the end; `each`: with each part."""

    def __init__(self, asked: bool, each: bool) -> None:
        self._asked, self._each = asked, each
        self._prompt = 0
        self._completions: dict[int, int] = {}
        self._total: int | None = None

    @property
    def tokens(self) -> int:
        """Of the prompt and of what was answered so far."""
        return self._prompt + sum(self._completions.values()) if self._total is None else self._total

    def passed(self, part: Any) -> Any:
        """Count a part of an answer; the part as the client sees it, None when it sees nothing of it.

        A part is one of vLLM's models or, of a stream, the text of a server-sent event.
        """
        if not isinstance(part, str):
            if usage := getattr(part, "usage", None):
                self._total = int(usage.total_tokens)
            return part
        found = USAGE.search(part)
        if found is None:
            return part
        usage = json.loads(found[1])
        if ALONE in part:
            self._total = int(usage["total_tokens"])
            return part if self._asked else None
        index = INDEX.search(part)
        # Each choice tells the tokens of its own; the prompt is common to all.
        self._prompt = int(usage["prompt_tokens"])
        self._completions[int(index[1]) if index else 0] = int(usage.get("completion_tokens") or 0)
        return part if self._each else part[: found.start()] + part[found.end() :]
