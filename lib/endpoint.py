"""A model behind an OpenAI-compatible endpoint: one chat completion at a time, asked again where it is busy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import httpx
from pydantic import SecretStr

from lib.errors import ConfigError
from lib.settings.endpoint import EndpointSettings

RETRIED = {408, 409, 429, 500, 502, 503, 504}
ATTEMPTS = 4


def key_of(settings: EndpointSettings, section: str) -> SecretStr:
    """The key, from the environment; empty where the endpoint wants none. Raises ConfigError where it should be there."""
    key = os.environ.get(settings.key_variable, "") if settings.key_variable else ""
    if settings.key_variable and not key:
        raise ConfigError(
            f"{section}: the environment variable {settings.key_variable} is empty; put the "
            f"endpoint's key there, or set key_variable to '' for one that wants none"
        )
    return SecretStr(key)


class Endpoint:
    """A connection. `section` of the configuration names it in messages; `key` is what `key_of` found, on the machine where
    the job was started."""

    def __init__(
        self,
        settings: EndpointSettings,
        section: str,
        key: SecretStr,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings, self.section, self.pause = settings, section, pause
        secret = key.get_secret_value()
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        self.client = httpx.Client(headers=headers, timeout=settings.timeout_s)

    def choice(self, conversation: list[dict[str, str]], **more: Any) -> dict[str, Any]:
        """The first choice of the completion, as the endpoint sends it; `more` are further keys of the request.

        Raises ConfigError, in one line and without the key, when it refuses, or does not answer after some attempts.
        """
        body = {
            "model": self.settings.model,
            "messages": conversation,
            "temperature": 0,
            "max_tokens": self.settings.max_tokens,
            **more,
        }
        url, why = f"{self.settings.url.rstrip('/')}/chat/completions", ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self.pause(2.0**attempt)
            try:
                answer = self.client.post(url, json=body)
            except httpx.HTTPError as error:
                why = type(error).__name__
                continue
            if answer.status_code == 200:
                return self._choice(answer, url)
            why = f"status {answer.status_code}"
            if answer.status_code not in RETRIED:
                break
        raise ConfigError(
            f"{self.section}: {url} does not answer as {self.settings.model!r} ({why}); "
            f"check url, model and the key in {self.settings.key_variable or 'key_variable'}"
        )

    def reply(self, conversation: list[dict[str, str]], **more: Any) -> str:
        """What the model says. Raises ConfigError."""
        return said(self.choice(conversation, **more))

    def _choice(self, answer: httpx.Response, url: str) -> dict[str, Any]:
        try:
            choice: dict[str, Any] = answer.json()["choices"][0]
            said(choice)
        except (ValueError, KeyError, IndexError, TypeError):
            raise ConfigError(
                f"{self.section}: {url} answers, but not in the form of OpenAI's chat completions"
            ) from None
        return choice


def said(choice: dict[str, Any]) -> str:
    return str(choice["message"]["content"] or "")
