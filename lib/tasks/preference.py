"""Preference: a chat model taught which of two answers is better (direct preference optimisation, Rafailov et al. 2023).

A row is a prompt with a chosen and a rejected answer. With π the summed log-probability of an answer under the model
and r the same under the base before training (lib.training.reference computes it once), the loss of a pair is

    margin = (π(chosen) - r(chosen)) - (π(rejected) - r(rejected))
    loss   = -(1 - ε) log σ(β · margin) - ε log σ(-β · margin)

ε = 0 is DPO, ε > 0 conservative DPO (Mitchell 2023). Only the last answer carries loss; what lies before it is the
prompt. What comes out is a chat model, to be served and evaluated as one.

    columns  prompt (a text, or messages; may lack), chosen, rejected (texts, or messages)

Where chosen and rejected are whole dialogues they share all turns but the last. Shapes: B pairs in a batch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from lib import chat_templates, dialogues, encoders, likelihood
from lib.artifacts import TaskFile
from lib.dialogues import MalformedError, Message
from lib.encoders import IGNORED
from lib.errors import ConfigError
from lib.labels import MISSING
from lib.settings import DataSettings, ModelSettings, PreferenceSettings, Settings
from lib.tasks import Prepared, UnencodableError, chat
from lib.tasks.chat import MESSAGES, Request, Response, build, load, predict, request, tell
from lib.text import normalise

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lib.tasks import Batch, Outputs

__all__ = ["Request", "Response", "build", "load", "predict", "request", "tell"]

PACKS = False
METRIC = "loss"
# What is exported is a chat model.
SERVED_AS = "chat"
JUDGED: Literal["classes", "answers"] = "answers"
REFERENCE = True
"""Training reads the columns that `lib.training.reference` adds."""
LISTS = frozenset({"prompt", "chosen", "rejected"})
TEXTS = frozenset({"prompt", "chosen", "rejected", "system"})
SIDES = ("chosen", "rejected")
# A dialogue's tokens as a column, of each side; the chosen one has the names that chat evaluation reads.
FEATURES = {"chosen": ("input_ids", "labels"), "rejected": ("rejected_input_ids", "rejected_labels")}
REFERENCES = {side: f"reference_{side}" for side in SIDES}


def columns(data: DataSettings, present: Collection[str] = ()) -> dict[str, str]:
    if data.undersample:
        raise ConfigError("data.undersample: a pair has no label; only tasks with one take it")
    found = {name: getattr(data.columns, name) for name in ("prompt", *SIDES)}
    if present and found["prompt"] not in present:
        del found["prompt"]
    return found


def classes(data: DataSettings) -> list[str]:
    return []


def prepare(source: dict[str, pa.Array], data: DataSettings) -> Prepared:
    """`messages` and `rejected_messages` list<struct<role, content>>, equal but for the last turn.

    Pairs whose prompts open with the same words fall into one split. A pair of equal answers teaches nothing: it has
    no label, and so is counted and left out.
    """
    names = list(source)
    chosen: list[list[Message]] = []
    rejected: list[list[Message]] = []
    malformed: dict[int, str] = {}
    for number, values in enumerate(zip(*(source[name].to_pylist() for name in names), strict=True)):
        try:
            both = pair(dict(zip(names, values, strict=True)))
        except MalformedError as error:
            malformed[number] = str(error)
            both = [], []
        chosen.append(both[0])
        rejected.append(both[1])
    empty = np.array([not turns for turns in chosen], bool)
    empty[list(malformed)] = False
    differs = np.array([a != b for a, b in zip(chosen, rejected, strict=True)], bool)
    openings = normalise(pa.array([dialogues.opening(turns) for turns in chosen], pa.string()))
    texts = [json.dumps(both, ensure_ascii=False) for both in zip(chosen, rejected, strict=True)]
    said = [
        "\n".join(turn["content"] for turn in [*a, *b[-1:]]) for a, b in zip(chosen, rejected, strict=True)
    ]
    return Prepared(
        rows=pa.table(
            {"messages": pa.array(chosen, MESSAGES), "rejected_messages": pa.array(rejected, MESSAGES)}
        ),
        texts=pa.array(texts, pa.string()),
        labels=np.where(differs, 0, MISSING).astype(np.int32),
        values=pa.nulls(len(chosen), pa.string()),
        empty=empty,
        malformed=malformed,
        groups=pa.array([text.casefold() for text in openings.to_pylist()], pa.string()),
        compared=pa.array(said, pa.string()),
    )


def pair(row: dict[str, str | None]) -> tuple[list[Message], list[Message]]:
    """Both dialogues of a row, to the end of the answer; empty ones for a row that says nothing.

    Raises MalformedError for a row without a prompt, with one answer only, or whose dialogues differ before the
    last turn.
    """
    said = {side: turns(row[side], "assistant") for side in SIDES}
    asked = turns(row.get("prompt"), "user")
    if not any((*said.values(), asked)):
        return [], []
    for side, others in said.items():
        if not others:
            raise MalformedError(f"has no {side} answer; give both, or leave the row out")
    whole = {
        side: others if any(_role(turn) == "user" for turn in others) else asked + others
        for side, others in said.items()
    }
    both = [dialogues.messages({"messages": json.dumps(whole[side])}) for side in SIDES]
    if not any(turn["role"] == "user" for turn in both[0]):
        raise MalformedError("has no prompt; name its column under data.columns.prompt")
    if both[0][:-1] != both[1][:-1]:
        raise MalformedError(
            "has dialogues that differ before the last turn; only the last answer is compared"
        )
    return both[0], both[1]


def turns(text: str | None, speaker: str) -> list[dict[str, Any]]:
    """A column's value as raw turns: a JSON list of messages as it is, any other text as one of `speaker`."""
    if text is None or not text.strip():
        return []
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except ValueError:
            listed = None
        if isinstance(listed, list) and listed and all(isinstance(t, dict) and "role" in t for t in listed):
            return listed
    return [{"role": speaker, "content": text}]


def _role(turn: dict[str, Any]) -> str | None:
    return dialogues.SPEAKERS.get(str(turn["role"]).strip().lower())


def counts(rows: pa.Table, classes: list[str]) -> dict[str, int]:
    return {}


def encode(rows: pa.Table, model: ModelSettings) -> pa.Table:
    """Add each side's tokens and labels (FEATURES) list<int32>, `length` int32 of both together, `truncated` bool.

    Both sides keep the same turns before the answer: the oldest exchanges go until the longer of the two fits into
    `model.max_length`. Raises UnencodableError.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for names in FEATURES.values() for name in names}
    lengths, truncated = [], []
    for number, both in enumerate(
        zip(rows["messages"].to_pylist(), rows["rejected_messages"].to_pylist(), strict=True)
    ):
        try:
            encoded, cut = _encode_pair(list(both), model)
        except MalformedError as error:
            raise UnencodableError(number, str(error)) from None
        for side, one in zip(SIDES, encoded, strict=True):
            ids, labels = FEATURES[side]
            found[ids].append(one.input_ids)
            found[labels].append(last_answer_only(one.labels))
        lengths.append(sum(len(one.input_ids) for one in encoded))
        truncated.append(cut)
    for name, values in found.items():
        rows = rows.append_column(name, encoders.lists(values)[0])
    rows = rows.append_column("length", pa.array(lengths, pa.int32()))
    return rows.append_column("truncated", pa.array(truncated, pa.bool_()))


def _encode_pair(
    both: list[list[Message]], model: ModelSettings
) -> tuple[list[chat_templates.Encoded], bool]:
    whole = model.model_copy(update={"max_length": 2**31})
    cut = False
    while True:
        longest = max(len(one.input_ids) for one in (chat_templates.encode(each, whole) for each in both))
        fewer = [chat_templates.without_oldest(each) for each in both]
        if longest <= model.max_length or fewer[0] is None or fewer[1] is None:
            break
        both, cut = [fewer[0], fewer[1]], True
    encoded = [chat_templates.encode(each, model) for each in both]
    return encoded, cut or any(one.truncated for one in encoded)


def last_answer_only(labels: np.ndarray) -> np.ndarray:
    """Labels without those of earlier answers, which both sides share."""
    kept = labels.copy()
    if (labels != IGNORED).any():
        kept[: likelihood.last_answer(labels)] = IGNORED
    return kept


def collate(rows: pa.Table, pad: int) -> Batch:
    """`lib.causal.collate` of 2B sequences, the chosen ones first, and `reference` float32 [2, B] where rows have it."""
    import torch

    from lib import causal

    sides = []
    for ids, labels in FEATURES.values():
        lengths = pa.compute.list_value_length(rows[ids]).cast(pa.int32())
        sides.append(pa.table({"input_ids": rows[ids], "labels": rows[labels], "length": lengths}))
    batch = causal.collate(pa.concat_tables(sides), pad)
    if set(REFERENCES.values()) <= set(rows.column_names):
        known = np.stack([rows[name].to_numpy() for name in REFERENCES.values()])
        batch["reference"] = torch.from_numpy(known.astype(np.float32))
    return batch


def balance(manifest: dict[str, Any], settings: Settings) -> dict[str, float]:
    return {}


def weight(rows: pa.Table, settings: Settings, balance: dict[str, float]) -> float:
    """The number of pairs."""
    return float(rows.num_rows)


def log_probabilities(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probability of each answer float32 [2, B], chosen and rejected, and its tokens float32 [2, B]."""
    import torch

    from lib import causal

    losses, row = causal.token_losses(model, batch)
    pairs = int(batch["sequence"].max()) + 1
    sums = torch.zeros(pairs, device=losses.device).index_add(0, row, -losses.float())
    tokens = torch.zeros(pairs, device=losses.device).index_add(0, row, torch.ones_like(losses.float()))
    return sums.view(2, -1), tokens.view(2, -1)


def loss(
    model: nn.Module, batch: Batch, settings: Settings, balance: dict[str, float]
) -> tuple[torch.Tensor, Outputs]:
    """Sum over pairs of the loss above; outputs, in evaluation, `rewards` [B, 2]: β · (π - r) of both sides."""
    import torch

    policy, tokens = log_probabilities(model, batch)
    losses, rewards = dpo(policy, batch["reference"], tokens, settings.training.preference)
    if torch.is_grad_enabled():
        return losses.sum(), {}
    return losses.sum(), {"rewards": rewards.T.cpu().numpy()}


def dpo(
    policy: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor, preference: PreferenceSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [B] of each pair and rewards [2, B] of its sides, from summed log-probabilities [2, B] and tokens [2, B].

    `length_normalised` divides log-probabilities by the tokens of their answer. `sft` adds that multiple of the
    chosen answer's mean negative log-likelihood (Pang et al. 2024).
    """
    from torch.nn.functional import logsigmoid

    whole = policy
    if preference.length_normalised:
        policy, reference = policy / tokens.clamp(min=1), reference / tokens.clamp(min=1)
    rewards = preference.beta * (policy - reference)
    margin, smoothing = rewards[0] - rewards[1], preference.label_smoothing
    losses = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    if preference.sft:
        losses = losses - preference.sft * whole[0] / tokens[0].clamp(min=1)
    return losses, rewards.detach()


def metrics(outputs: Outputs) -> dict[str, float]:
    """`preference_accuracy`: share of pairs with a margin above 0; `margin`: its mean, times β; the rewards' means."""
    chosen, rejected = outputs["rewards"].T.astype(np.float64)
    return {
        "preference_accuracy": float((chosen > rejected).mean()),
        "margin": float((chosen - rejected).mean()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
    }


def save(model: nn.Module, base: Path, info: TaskFile, folder: Path) -> None:
    """A chat model's directory."""
    chat.save(model, base, dataclasses.replace(info, task="chat"), folder)


def from_feedback(event: dict[str, Any]) -> list[dict[str, Any]]:
    """The answer that a user preferred, or corrected it to, beside the one that was given."""
    prompt, worse = chat.asked(event), chat.given(event)
    better = event["feedback"]["preferred"] or event["feedback"]["correction"]
    if not prompt or not worse or not better or better == worse:
        return []
    return [{"prompt": prompt, "chosen": better, "rejected": worse}]
