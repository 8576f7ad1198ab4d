"""The sample of preferences, made rather than collected: whoever reads it must know that no person chose anything.

`sample://support-preferences-train`, `-validation` and `-test` hold prompt, chosen and rejected, from the questions of
ChatterBot's English corpus (tech support and small talk). Chosen is the answer that the corpus gives; rejected is
the answer to another question of the same split, so that no answer of the test split was taught to be wrong. Each
answer is chosen as often as it is rejected: only whether it fits its question tells the two apart. Sorting
by a hash of the question makes the splits and the partners the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from lib import storage
from lib.artifacts import SPLITS
from lib.samples import SCHEME, sample_path

NAME = "support-preferences"
# Of ten questions, which goes where; all others are for training.
PLACES = {0: "validation", 1: "test"}
# How often each question occurs, each time with another rejected answer.
REJECTED = 2


def is_made(source: str) -> bool:
    return source.startswith(f"{SCHEME}{NAME}-")


def made(source: str) -> str:
    """URI of the JSON Lines of one split, written under the storage root, where every worker can read it.

    Raises ConfigError for an unknown split, or where the corpus is not installed.
    """
    pattern = sample_path(source, "data")
    name = source.removeprefix(SCHEME)
    uri = storage.join(storage.root(), "samples", f"{name}.jsonl")
    pairs = answered(sorted(pattern.parent.glob(pattern.name)))
    rows = preferences(pairs, name.removeprefix(f"{NAME}-"))
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if not storage.exists(uri) or storage.read_bytes(uri) != content:
        storage.write_bytes(uri, content)
    return uri


def answered(files: Iterable[Path]) -> dict[str, str]:
    """Question → its first answer, from the first exchange of each conversation."""
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    found: dict[str, str] = {}
    known = set()
    for file in files:
        with file.open("rb") as stream:
            conversations = yaml.load(stream, loader)["conversations"]
        for said in conversations:
            question, answer = (text.strip() for text in said[:2])
            if question.casefold() not in known and question and answer:
                known.add(question.casefold())
                found[question] = answer
    return found


def preferences(pairs: dict[str, str], split: str) -> list[dict[str, str]]:
    """The rows of one split: each question with REJECTED answers to others of the split."""
    ordered = sorted(pairs, key=lambda question: hashlib.sha256(question.casefold().encode()).digest())
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for place, question in enumerate(ordered):
        parts[PLACES.get(place % 10, "train")].append(question)
    questions, rows = parts[split], []
    for step in (1 + turn * len(questions) // REJECTED for turn in range(REJECTED)):
        for place, question in enumerate(questions):
            other = pairs[questions[(place + step) % len(questions)]]
            if other.casefold() != pairs[question].casefold():
                rows.append({"prompt": question, "chosen": pairs[question], "rejected": other})
    return rows
