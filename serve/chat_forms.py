"""A client's mistakes in vLLM's forms of OpenAI's requests, as 4xx: what they refuse, and what they trip over."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import Request
from pydantic import BaseModel, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
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


def narrowed_by(body: Any) -> str | None:
    """The key of a request that binds its answer to a form; None where any text may be said."""
    if getattr(body, "structured_outputs", None) is not None:
        return "structured_outputs"
    form = getattr(body, "response_format", None)
    if form is not None and getattr(form, "type", None) != "text":
        return "response_format"
    choice = getattr(body, "tool_choice", None)
    return "tool_choice" if choice not in (None, "none", "auto") else None


def unanswerable(param: str) -> RequestError:
    """vLLM ends an answer with an error when no token is left that its form allows."""
    return RequestError(
        f"{param} leaves nothing to say: no token fits both it and the request's other options, such as logit_bias, "
        f"allowed_token_ids and bad_words",
        param=param,
        code="unanswerable",
    )


async def refused(request: Request, error: Exception) -> JSONResponse:
    """What vLLM's forms of a request find, some of it while they are filled in."""
    status = HTTPStatus.NOT_FOUND if isinstance(error, VLLMNotFoundError) else HTTPStatus.BAD_REQUEST
    param = getattr(error, "parameter", None)
    # Not `str(error)`, which repeats the value.
    return error_response(status, str(error.args[0]), param=param, code=status.name.lower())


async def engine_error(request: Request, error: Exception) -> JSONResponse:
    """What Ray's ingress finds."""
    assert isinstance(error, OpenAIHTTPException)
    status = HTTPStatus(error.status_code)
    return error_response(status, error.message, code=status.name.lower())
