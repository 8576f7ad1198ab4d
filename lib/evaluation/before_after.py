"""A chat model measured beside its base: what `jobs.evaluate` does for a task that is judged by its answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from lib import likelihood, storage
from lib.artifacts import DatasetRef
from lib.base_models import base_directory
from lib.encoders import IGNORED
from lib.errors import ConfigError, DataError, ModelError
from lib.evaluation import chat, judge
from lib.evaluation.answering import Prompt, ask, load_tokenizer, read_columns
from lib.evaluation.chat import BASE, DECIDING, MAY_DECIDE, Asked
from lib.evaluation.classification import MODEL, Measured, Subject
from lib.evaluation.deciding import deciding as deciding_of
from lib.evaluation.nearest import Nearest
from lib.evaluation.nearest import nearest as look_up
from lib.evaluation.scoring import read_task
from lib.settings import Settings

Messages = list[dict[str, str]]
FEATURES = ("id", "length", "messages", "passages", "input_ids", "labels")


def deciding(settings: Settings) -> str:
    """The metric by which a chat model is promoted. Raises ConfigError for one that cannot decide."""
    metric = deciding_of(settings, DECIDING, MAY_DECIDE)
    if metric == "grounded" and not settings.data.grounded:
        raise ConfigError("promotion.metric: grounded needs dialogues with passages; set data.grounded")
    return metric


def measure(subject: Subject, model_uri: str, dataset: DatasetRef, settings: Settings) -> Measured:
    """Run the model and its base over the test split, ask the judge if there is one. Needs a connection to Ray.

    Raises DataError for a split without answers, ModelError for a model that cannot be used or that reads other
    tokens than the dataset holds, ConfigError for a judge that does not answer.
    """
    import ray

    metric = deciding(settings)
    judging = judge.connect(settings.evaluation.answers.judge)
    info = read_task(model_uri)
    check_vocabulary(model_uri, dataset)
    asked, prompts = read_test(
        dataset, settings.evaluation.answers.dialogues, list(dataset.manifest()["slices"])
    )
    questions = [question(each) for each in asked.prompts]
    looked_up = ray.remote(num_cpus=1)(look_up_answers).remote(
        dataset.shards("train"), questions, settings.evaluation.baseline_rows
    )
    answered = {
        name: ask(place, model_uri, dataset, prompts, settings, name)
        for name, place in ((MODEL, model_uri), (BASE, info.base))
    }
    found: Nearest = ray.get(looked_up)
    measured = chat.measure(
        subject, asked, answered[MODEL], answered[BASE], found, settings.evaluation, metric
    )
    return judged(measured, asked, judging, settings) if judging else measured


def judged(measured: Measured, asked: Asked, judging: judge.Judge, settings: Settings) -> Measured:
    """The report with what the judge says of model against base, over evenly spaced generated answers."""
    said = measured.predictions.filter(pa.compute.is_valid(measured.predictions["answer"]))
    count = len(asked.prompts)
    places = np.unique(np.linspace(0, count - 1, min(judging.settings.pairs, count)).astype(np.int64))
    pairs = [
        judge.Pair(
            prompt="\n\n".join(f"{turn['role']}: {turn['content']}" for turn in asked.prompts[i]),
            reference=asked.references[i],
            ours=said["answer"][int(i)].as_py(),
            theirs=said["base_answer"][int(i)].as_py(),
        )
        for i in places
    ]
    verdict = judge.compare(judging, pairs, settings.evaluation.bootstrap)
    assert measured.report.answers is not None
    answers = dataclasses.replace(measured.report.answers, judge=verdict)
    return dataclasses.replace(measured, report=dataclasses.replace(measured.report, answers=answers))


def check_vocabulary(model_uri: str, dataset: DatasetRef) -> None:
    """A model that reads other tokens than the dataset holds would be asked nonsense. Raises ModelError."""
    with storage.local_copy(model_uri) as folder:
        own = load_tokenizer(folder).get_vocab()
    base = dataset.manifest()["base"]
    if own != load_tokenizer(base_directory(base)).get_vocab():
        raise ModelError(
            f"{model_uri} has another vocabulary than {base}, with which dataset {dataset.name}/"
            f"{dataset.fingerprint} was made, so the two cannot be compared on it; use another name for the other base"
        )


def read_test(dataset: DatasetRef, most: int, slices: Sequence[str]) -> tuple[Asked, list[Prompt]]:
    """The test split, and prompts of at most `most` of its dialogues, evenly spaced by id.

    Raises DataError for a split without rows, or without a row that has an answer.
    """
    shards = dataset.shards("test")
    light = (
        pa.concat_tables([read_columns(shard, ["id", "length", *slices]) for shard in shards])
        if shards
        else None
    )
    where = f"the test split of {dataset.name}/{dataset.fingerprint}"
    if light is None or not light.num_rows:
        raise DataError(
            f"{where} has no rows; raise data.split.test or data.limit and run jobs.preprocess again"
        )
    light = light.sort_by("id")
    ids = light["id"].to_pylist()
    places = np.unique(np.linspace(0, len(ids) - 1, min(most, len(ids))).astype(np.int64))
    wanted = pa.array([ids[i] for i in places])
    parts = []
    for shard in shards:  # dialogues are large: one shard at a time
        rows = read_columns(shard, FEATURES)
        parts.append(rows.filter(pa.compute.is_in(rows["id"], wanted)))
    chosen = pa.concat_tables(parts).sort_by("id").to_pylist()
    labelled = [i for i, row in enumerate(chosen) if any(label != IGNORED for label in row["labels"][1:])]
    if not labelled:
        raise DataError(f"{where} has no dialogue with an answer; see data.source and model.max_length")
    rows, prompts = [chosen[i] for i in labelled], []
    told, references, counts = [], [], []
    for row in rows:
        labels = np.asarray(row["labels"], np.int64)
        labels[0] = IGNORED
        start = likelihood.last_answer(labels)
        prompts.append(Prompt(row["id"], np.asarray(row["input_ids"][:start], np.int64)))
        before, reference = last_exchange(row["messages"])
        told.append(before)
        references.append(reference)
        counts.append(max(int((labels[start:] != IGNORED).sum()) - 1, 0))  # without the end mark
    passages = [row["passages"] for row in rows] if "passages" in rows[0] else None
    return Asked(light, places[labelled], told, references, counts, passages), prompts


def last_exchange(messages: Messages) -> tuple[Messages, str]:
    """What lies before the assistant's last message, and that message."""
    last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
    return messages[:last], messages[last]["content"]


def question(messages: Messages) -> str:
    """The user's last message."""
    return next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), "")


def look_up_answers(shards: list[str], questions: list[str], most: int) -> Nearest:
    """The baseline, from at most `most` evenly spaced training dialogues."""
    pairs: list[tuple[str, str]] = []
    for shard in shards:
        for messages in read_columns(shard, ["messages"])["messages"].to_pylist():
            before, answer = last_exchange(messages)
            pairs.append((question(before), answer))
    if len(pairs) > most:
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, most).astype(np.int64)]
    return look_up([asked for asked, _ in pairs], [answer for _, answer in pairs], questions)
