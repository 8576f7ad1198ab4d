"""Dialogues in the forms that data sets come in → one list of messages, `{"role": …, "content": …}` each.

    messages   one column: a list of {role, content}, as OpenAI's API takes it
    sharegpt   one column: a list of {from, value}; human, gpt and system are the speakers
    alpaca     columns: instruction, input (may lack), output, system (may lack)
    pair       columns: question, answer

Which of them a source has is told by `data.dialogue`, or by its columns. A list may also stand as JSON text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ftfy

from lib.errors import DataError
from lib.settings import DataSettings

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
# How others call the same speakers.
SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# Form → the names here of its columns; those that a source may lack.
FORMS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output", "system"),
    "pair": ("question", "answer", "system"),
}
MAY_LACK = {"input", "system"}
# The same without the answers: what a model can be asked.
ASKED = {
    form: tuple(name for name in names if name not in ("output", "answer")) for form, names in FORMS.items()
}
# Keys of a turn, by form.
KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
# What no text needs and no template expects: controls but for tab and newline.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")


class MalformedError(ValueError):
    """What is wrong with a row, in words that go behind its file and number."""


def columns(
    data: DataSettings, present: Collection[str], forms: Mapping[str, tuple[str, ...]] = FORMS
) -> dict[str, str]:
    """Name here → column of the source, for the form that `data.dialogue` names or `present` columns tell.

    Without `present` columns (nobody has looked yet), those of the form that is named, else of `messages`.
    Raises DataError when the columns are those of no form.
    """
    if data.dialogue != "auto":
        return _columns_of(forms[data.dialogue], data, present)
    if not present:
        return _columns_of(forms["messages"], data, present)
    for names in forms.values():
        found = _columns_of(names, data, present)
        if set(found.values()) <= set(present):
            return found
    raise DataError(
        f"data.dialogue: columns {', '.join(map(repr, list(present)[:20]))} are those of no form; "
        f"{'; '.join(f'{form}: ' + ', '.join(_columns_of(names, data, ()).values()) for form, names in forms.items())}; "
        f"name yours under data.columns"
    )


def _columns_of(names: tuple[str, ...], data: DataSettings, present: Collection[str]) -> dict[str, str]:
    found = {name: getattr(data.columns, name) for name in names}
    return {n: column for n, column in found.items() if n not in MAY_LACK or column in present}


def form_of(names: Collection[str]) -> str:
    """The form that columns of these names make."""
    return next(form for form, needed in FORMS.items() if needed[0] in names)


def messages(row: dict[str, str | None]) -> list[Message]:
    """The dialogue of one row, by the names of `columns`; empty when it says nothing.

    Ends with the last turn of the assistant: what follows it teaches nothing. A question without an answer
    comes back as it is, without one. Raises MalformedError.
    """
    turns = _read(row)
    if form_of(row) in KEYS and turns:
        _check(turns)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns) - 1)
    return turns[: last + 1]


def question(row: dict[str, str | None]) -> list[Message]:
    """The dialogue up to the user's last turn, by the names of `columns` among ASKED. Raises MalformedError."""
    turns = _read(row)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    if last < 0:
        raise MalformedError("asks nothing: no turn of the user has a text")
    _check_system(turns[: last + 1])
    return turns[: last + 1]


def _read(row: dict[str, str | None]) -> list[Message]:
    form = form_of(row)
    if form in KEYS:
        return _turns(row[FORMS[form][0]], *KEYS[form])
    if form == "alpaca":
        asked = [clean(row["instruction"]), clean(row.get("input"))]
        return _exchange(row.get("system"), "\n\n".join(part for part in asked if part), row.get("output"))
    return _exchange(row.get("system"), row["question"], row.get("answer"))


def _exchange(system: str | None, question: str | None, answer: str | None) -> list[Message]:
    told, asked, said = clean(system), clean(question), clean(answer)
    if not asked and not said:
        return []
    if not asked:
        raise MalformedError(f"has an answer but no question: {said[:60]!r}; give both")
    turns = [{"role": "system", "content": told}] if told else []
    turns.append({"role": "user", "content": asked})
    return [*turns, {"role": "assistant", "content": said}] if said else turns


def _turns(text: str | None, role: str, content: str) -> list[Message]:
    """The turns of a JSON list, roles by our names."""
    if text is None or not text.strip():
        return []
    try:
        listed = json.loads(text)
    except ValueError:
        raise MalformedError(
            f"holds no list of turns: {text[:60]!r}; give [{{{role!r}: …, {content!r}: …}}, …]"
        ) from None
    if not isinstance(listed, list):
        raise MalformedError(
            f"holds no list of turns: {text[:60]!r}; give [{{{role!r}: …, {content!r}: …}}, …]"
        )
    return [_turn(value, number, role, content) for number, value in enumerate(listed, 1)]


def _turn(value: Any, number: int, role: str, content: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get(role), str):
        raise MalformedError(f"turn {number} has no {role!r}: {json.dumps(value, ensure_ascii=False)[:60]}")
    speaker = SPEAKERS.get(value[role].strip().lower())
    if speaker is None:
        raise MalformedError(
            f"turn {number} has the {role} {value[role]!r}; known are {', '.join(SPEAKERS)} (calls of tools are "
            f"not trained)"
        )
    said = value.get(content)
    if not isinstance(said, str) or not clean(said):
        raise MalformedError(
            f"turn {number} ({speaker}) has no text under {content!r}; fill it or leave the row out"
        )
    return {"role": speaker, "content": clean(said)}


def _check(turns: Sequence[Message]) -> None:
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise MalformedError(
            "has no turn of the assistant, so nothing can be learned of it; leave the row out"
        )
    _check_system(turns)


def _check_system(turns: Sequence[Message]) -> None:
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise MalformedError(
            f"turn {roles[1:].index('system') + 2} is a system message; only the first may be one"
        )


def clean(text: str | None) -> str:
    """The text with its encoding mended and without control characters; line breaks and spaces stay as they are
    inside, since code and lists live by them, and go at both ends."""
    if not text:
        return ""
    if not text.isascii():
        text = ftfy.fix_encoding(text)
    return _CONTROLS.sub("", text.replace("\r\n", "\n")).strip()


def opening(turns: Sequence[Message]) -> str:
    """The first thing that the user says: dialogues that open alike belong into one split."""
    return next(
        (turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"] if turns else ""
    )
