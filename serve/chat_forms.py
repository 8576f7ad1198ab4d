"""A client's mistakes in vLLM's forms of OpenAI's requests, as 4xx: what they refuse, and what they trip over."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import Request
from pydantic import BaseModel, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from starlette.responses import JSONResponse
from vllm.exceptions import VLLMNotFoundError

from lib.errors import RequestError
from serve.http import error_response

MOST_ANSWERS = 128


def formed(form: type[BaseModel]) -> WrapValidator:
    """What vLLM's `form` trips over while it is filled in, such as messages that are null, is the client's mistake."""

    def fill(value: Any, fill_in: ValidatorFunctionWrapHandler) -> Any:
        try:
            return fill_in(value)
        except (TypeError, AttributeError, LookupError) as error:
            for name in form.model_fields.keys() & set(value if isinstance(value, dict) else ()):
                kind: Any = form.model_fields[name].annotation
                try:
                    TypeAdapter(kind).validate_python(value[name])
                except ValidationError as found:
                    reason = f"{name}: {found.errors()[0]['msg'].lower()}"
                    raise RequestError(reason, param=name, code="wrong_type") from None
            raise RequestError(f"a value is of the wrong type: {error}", code="wrong_type") from None

    return WrapValidator(fill)


def check(body: Any) -> None:
    """Raises RequestError for what would keep an engine busy with one request, each answer of `n` being a sequence of
    its own, and for messages that vLLM takes for others' forms and fails at: none, or one without a role."""
    messages = getattr(body, "messages", None)
    if messages == []:
        raise RequestError("messages is empty; send at least one", param="messages", code="no_messages")
    for place, message in enumerate(messages or ()):
        role = message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
        if not isinstance(role, str):
            name = f"messages.{place}.role"
            raise RequestError(f"{name} is missing", param=name, code="missing")
    answers = getattr(body, "n", None) or 1
    if answers > MOST_ANSWERS:
        raise RequestError(f"n is {answers:,}; ask for at most {MOST_ANSWERS}", param="n", code="too_many")


async def refused(request: Request, error: Exception) -> JSONResponse:
    """What vLLM's forms of a request find, some of it while they are filled in."""
    status = HTTPStatus.NOT_FOUND if isinstance(error, VLLMNotFoundError) else HTTPStatus.BAD_REQUEST
    param = getattr(error, "parameter", None)
    # Not `str(error)`, which repeats the value.
    return error_response(status, str(error.args[0]), param=param, code=status.name.lower())
