"""Keys of a model behind an OpenAI-compatible endpoint, wherever one is asked."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lib.settings.sections import Positive, Section


class EndpointSettings(Section):
    """Where a chat model answers, and how it is asked."""

    url: str
    """Up to and with the version, such as http://127.0.0.1:8000/v1."""
    model: str
    key_variable: str = "WHORL_CHAT_KEY"
    """Environment variable that holds the key; empty for an endpoint that wants none."""
    concurrency: Positive = 4
    max_tokens: Positive = 512
    timeout_s: Annotated[float, Field(gt=0)] = 120
