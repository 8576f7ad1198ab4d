"""Chat: supervised fine-tuning of a causal language model on dialogues.

A row is a dialogue; what is learned are the assistant's turns, each with its end-of-turn token, given all that
came before. The loss is a sum over these tokens, so that the gradient does not depend on how dialogues fell into
packs and batches. Nothing is classified: there are no labels.

Shapes: P packs, L positions in one (`lib.causal`).
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from lib import chat_templates, dialogues, encoders
from lib.artifacts import DatasetRef, TaskFile
from lib.chat_templates import load_chat_tokenizer
from lib.dialogues import MalformedError
from lib.encoders import IGNORED
from lib.errors import ConfigError, RequestError
from lib.labels import MISSING
from lib.settings import DataSettings, ModelSettings, ScoreSettings, ServingSettings, Settings
from lib.settings.augmentation import METHODS
from lib.tasks import Asked, Prepared, UnencodableError, is_good
from lib.text import normalise

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lib.generation import Generator
    from lib.tasks import Batch, Outputs

ROUTE = "/v1/chat/completions"
PACKS = True
JUDGED: Literal["classes", "answers"] = "answers"
METRIC = "loss"
LISTS = frozenset({"messages", "conversations"})
TEXTS = frozenset({name for names in dialogues.FORMS.values() for name in names})
AUGMENTED = frozenset(METHODS)
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SHOWN_CHARS = 160
# What a client gets that does not say how much it wants.
MAX_TOKENS = 256
# What the pipeline asks for when it shows what the served model says.
ASKED_TOKENS = 64


def columns(data: DataSettings, present: Collection[str] = ()) -> dict[str, str]:
    if data.undersample:
        raise ConfigError("data.undersample: a dialogue has no label; only tasks with one take it")
    return dialogues.columns(data, present)


def classes(data: DataSettings) -> list[str]:
    return []


def prepare(source: dict[str, pa.Array], data: DataSettings) -> Prepared:
    """`messages` list<struct<role, content>>. Duplicates are equal in all turns; dialogues that open with the same
    words of the user (normalised, in any case) fall into one split, so that no question of the test split was
    learned with its answer.

    A question without an answer has no label, and so is counted and left out.
    """
    names = list(source)
    rows = zip(*(source[name].to_pylist() for name in names), strict=True)
    found: list[list[dialogues.Message]] = []
    malformed: dict[int, str] = {}
    for number, values in enumerate(rows):
        try:
            found.append(dialogues.messages(dict(zip(names, values, strict=True))))
        except MalformedError as error:
            malformed[number] = str(error)
            found.append([])
    answered = np.array([any(t["role"] == "assistant" for t in turns) for turns in found], bool)
    empty = np.array([not turns for turns in found], bool)
    empty[list(malformed)] = False
    openings = normalise(pa.array([dialogues.opening(turns) for turns in found], pa.string()))
    return Prepared(
        rows=pa.table({"messages": pa.array(found, MESSAGES)}),
        texts=pa.array([json.dumps(turns, ensure_ascii=False) for turns in found], pa.string()),
        labels=np.where(answered, 0, MISSING).astype(np.int32),
        values=pa.nulls(len(found), pa.string()),
        empty=empty,
        malformed=malformed,
        groups=pa.array([text.casefold() for text in openings.to_pylist()], pa.string()),
        compared=pa.array(["\n".join(turn["content"] for turn in turns) for turns in found], pa.string()),
    )


def counts(rows: pa.Table, classes: list[str]) -> dict[str, int]:
    return {}


def encode(rows: pa.Table, model: ModelSettings) -> pa.Table:
    """Add `input_ids` and `labels` list<int32>, `length` int32 and `truncated` bool to rows with `messages`.

    `labels` holds the token itself where the assistant says it, unshifted, and IGNORED on all others. Raises
    UnencodableError for a dialogue that the model's template refuses or cannot split.
    """
    encoded = []
    for number, turns in enumerate(rows["messages"].to_pylist()):
        try:
            encoded.append(chat_templates.encode(turns, model))
        except MalformedError as error:
            raise UnencodableError(number, str(error)) from None
    input_ids, lengths = encoders.lists([e.input_ids for e in encoded])
    rows = rows.append_column("input_ids", input_ids)
    rows = rows.append_column("labels", encoders.lists([e.labels for e in encoded])[0])
    rows = rows.append_column("length", lengths)
    return rows.append_column("truncated", pa.array([e.truncated for e in encoded], pa.bool_()))


def build(base: Path, settings: Settings, dataset: DatasetRef | None = None) -> nn.Module:
    """The base model in fp32, with the attention that keeps the examples of a pack apart."""
    from lib import causal

    return causal.pretrained(base, settings)


def collate(rows: pa.Table, pad: int) -> Batch:
    """`input_ids`, `labels`, `position_ids` and `sequence`, int64 [P, L]: `lib.causal.collate`."""
    from lib import causal

    return causal.collate(rows, pad)


def balance(manifest: dict[str, Any], settings: Settings) -> dict[str, float]:
    return {}


def weight(rows: pa.Table, settings: Settings, balance: dict[str, float]) -> float:
    """The number of tokens that carry loss."""
    labels = rows["labels"].combine_chunks().flatten().to_numpy()
    return float(np.count_nonzero(labels != IGNORED))


def loss(
    model: nn.Module, batch: Batch, settings: Settings, balance: dict[str, float]
) -> tuple[torch.Tensor, Outputs]:
    """Cross-entropy summed over the assistant's tokens; outputs, in evaluation, that `sum` [1] and `tokens` [1]."""
    import torch

    from lib import causal

    losses, _ = causal.token_losses(model, batch)
    total = losses.sum()
    if torch.is_grad_enabled():
        return total, {}
    return total, {"sum": np.array([float(total)]), "tokens": np.array([len(losses)])}


def metrics(outputs: Outputs) -> dict[str, float]:
    """`perplexity`: e to the mean loss of a token of the assistant's."""
    return {"perplexity": float(np.exp(outputs["sum"].sum() / max(int(outputs["tokens"].sum()), 1)))}


def save(model: nn.Module, base: Path, info: TaskFile, folder: Path) -> None:
    """Write a model directory: safetensors weights, tokenizer with its chat template, task.json.

    Generation ends at the base's own end tokens and at the one that ends the assistant's turns.
    """
    from lib import causal

    tokenizer = load_chat_tokenizer(base, info.base, info.chat_template)
    tokenizer.model_max_length = info.max_length
    causal.without_token_losses(model)
    if (token := chat_templates.end_of_turn(tokenizer)) is not None:
        known = model.generation_config.eos_token_id  # type: ignore[union-attr]
        known = known if isinstance(known, list) else [] if known is None else [known]
        model.generation_config.eos_token_id = list(dict.fromkeys([token, *known]))  # type: ignore[union-attr]
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    info.write(folder)


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)]


class Request(BaseModel):
    """A chat completion as OpenAI's API takes it, as far as a model of ours answers it."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "My laptop screen is black."}]}]
        },
    )
    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] = MAX_TOKENS
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int | None = None


class Choice(BaseModel):
    index: int = 0
    message: Message
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Response(BaseModel):
    """A chat completion as OpenAI's API gives it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: Usage


def load(folder: Path, serving: ServingSettings) -> Generator:
    """Raises ModelError when the directory is not a chat model or its weights are not safetensors."""
    from lib.generation import load_generator

    return load_generator(folder, serving)


def predict(predictor: Generator, request: Request) -> Response:
    """Raises RequestError when the messages leave no room for an answer or do not suit the chat template."""
    turns = [message.model_dump() for message in request.messages]
    (answer,) = predictor.answers(
        [turns], request.max_tokens, request.temperature, request.top_p, request.seed
    )
    said = Message.model_construct(role="assistant", content=answer.text)
    return Response(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=request.model or predictor.info.base,
        choices=[Choice(message=said, finish_reason="stop" if answer.complete else "length")],
        usage=Usage(
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            total_tokens=answer.prompt_tokens + answer.completion_tokens,
        ),
    )


def input_columns(data: DataSettings, present: Collection[str]) -> dict[str, str]:
    return dialogues.columns(data, present, dialogues.ASKED)


def ask(source: dict[str, pa.Array], data: DataSettings) -> Asked:
    """Dialogues up to what the user says last; an answer that the source gives to it is not read."""
    names = list(source)
    found: list[list[dialogues.Message]] = []
    bad: dict[int, str] = {}
    for row, values in enumerate(zip(*(source[name].to_pylist() for name in names), strict=True)):
        try:
            found.append(dialogues.question(dict(zip(names, values, strict=True))))
        except MalformedError as error:
            found.append([])
            bad[row] = str(error)
    return Asked(pa.table({"messages": pa.array(found, MESSAGES)}), list(found), bad)


def score(
    predictor: Generator, inputs: list[list[dialogues.Message]], settings: ScoreSettings
) -> tuple[pa.Table, dict[int, str]]:
    """`answer`, `finish_reason`, `prompt_tokens`, `completion_tokens`."""
    refused: dict[int, str] = {}
    for row, turns in enumerate(inputs):
        try:
            predictor.check(predictor.prompt(turns))
        except RequestError as error:
            refused[row] = str(error)
    fine = [row for row in range(len(inputs)) if row not in refused]
    answers = predictor.answers([inputs[row] for row in fine], settings.max_tokens, settings.temperature)
    said = dict(zip(fine, answers, strict=True))
    rows = [said.get(row) for row in range(len(inputs))]
    ends = [answer and ("stop" if answer.complete else "length") for answer in rows]
    columns = {
        "answer": pa.array([answer and answer.text for answer in rows], pa.string()),
        "finish_reason": pa.array(ends, pa.string()),
        "prompt_tokens": pa.array([answer and answer.prompt_tokens for answer in rows], pa.int32()),
        "completion_tokens": pa.array([answer and answer.completion_tokens for answer in rows], pa.int32()),
    }
    return pa.table(columns), refused


def tally(answers: pa.Table) -> dict[str, dict[str, int]]:
    """How answers ended, and tokens."""
    tokens = {name: int(pc.sum(answers[f"{name}_tokens"]).as_py() or 0) for name in ("prompt", "completion")}
    return {"finish_reason": dict(Counter(answers["finish_reason"].to_pylist())), "tokens": tokens}


def request(row: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """Path and body that ask the model `name` for the last turn of a dialogue."""
    turns = row.get("asked") or row["messages"]  # what serves it finds the passages itself
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    # At temperature 0, as it was evaluated.
    asked = {"model": name, "messages": turns[:last], "max_tokens": ASKED_TOKENS, "temperature": 0}
    return "/v1/chat/completions", asked


def tell(row: dict[str, Any], reply: dict[str, Any], classes: list[str]) -> str:
    asked = next(t["content"] for t in reversed(row["messages"]) if t["role"] == "user")
    truth = next(t["content"] for t in reversed(row["messages"]) if t["role"] == "assistant")
    said = reply["choices"][0]["message"]["content"]
    cited = "; ".join(" > ".join((c["title"], *c["headings"])) for c in reply.get("citations") or ())
    return f"{_shown(asked)}\n    → {_shown(said)}\n    (the data says: {_shown(truth)})" + (
        f"\n    (grounded in: {cited})" if cited else ""
    )


def feedback(row: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    return {"correction": next(t["content"] for t in reversed(row["messages"]) if t["role"] == "assistant")}


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) < SHOWN_CHARS else line[: SHOWN_CHARS - 3] + "…"


def from_feedback(event: dict[str, Any]) -> list[dict[str, Any]]:
    """The dialogue with the answer that should have been given, or with the one that was and was found good."""
    said, turns = event["feedback"], asked(event)
    answer = said["correction"] or said["preferred"] or (given(event) if is_good(said) else "")
    if not turns or not answer:
        return []
    return [{"messages": [*turns, {"role": "assistant", "content": answer}]}]


def asked(event: dict[str, Any]) -> list[dict[str, str]]:
    """The turns before the answer, of a request for a chat completion or for a completion; none where one of them is
    not a text (a call of a tool, a picture, a prompt in tokens)."""
    request = event["request"]
    given_turns = request.get("messages") or [{"role": "user", "content": request.get("prompt")}]
    turns = [{"role": turn["role"], "content": turn.get("content")} for turn in given_turns]
    return turns if all(isinstance(turn["content"], str) for turn in turns) else []


def given(event: dict[str, Any]) -> str:
    """The text of an event's first answer; empty where it has none."""
    choice = event["answer"]["choices"][0]
    return (choice["message"]["content"] if "message" in choice else choice["text"]) or ""
