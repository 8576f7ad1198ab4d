"""Dialogues scored by vLLM, through Ray Data's own LLM support (`ray.data.llm`).

Rows stream through one engine a worker, many at once, and are gathered by shard before they are written. The prompts
are made here, by the tokeniser and template that the model was exported with.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.chat_templates import load_chat_tokenizer
from lib.data import blocks
from lib.data.scoring.grounded import context_of, grounded, prompter_of
from lib.data.scoring.plan import Planned
from lib.data.scoring.shards import asked_of, kept_of, shard_name, write_shard
from lib.data.stream import source
from lib.errors import DataError, RequestError
from lib.generation import check_prompt, prompt_of
from lib.settings import ServingSettings
from lib.vllm_engine import engine_arguments, engine_name, environment, worker_bundle

if TYPE_CHECKING:
    import ray.data

# Rows that an engine is handed at a time; it has several such batches at once.
BATCH = 64
# Of the shuffle that gathers rows by shard.
PARTITIONS = 4
ANSWERED = ("answer", "finish_reason", "prompt_tokens", "completion_tokens")


def batch_arguments(serving: ServingSettings) -> dict[str, Any]:
    """An engine's without an HTTP server: `serving.chat.options` may set what is the server's alone."""
    found = engine_arguments(serving)
    if not serving.chat.options:
        return found  # vLLM takes 10 s to import
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    frontend = {field.name for field in fields(FrontendArgs)} - {
        field.name for field in fields(AsyncEngineArgs)
    }
    return {name: value for name, value in found.items() if name not in frontend}


def answered(planned: Planned, folder: Path, uri: str) -> ray.data.Dataset:
    """A dataset of `counts`, a row for each shard (`lib.data.scoring.shards.write_shard`), which are written under `uri`."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    logging.getLogger("ray.data.llm").setLevel(logging.WARNING)
    serving, wanted = planned.settings.serving, planned.settings.score
    config = vLLMEngineProcessorConfig(
        model_source=str(folder),
        engine_kwargs=batch_arguments(serving),
        placement_group_config={"bundle_per_worker": worker_bundle(serving)},
        runtime_env={"env_vars": environment(serving)},
        concurrency=(wanted.workers, wanted.workers),
        batch_size=BATCH,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    sampling = {"max_tokens": wanted.max_tokens, "temperature": wanted.temperature}
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "tokenized_prompt": [int(token) for token in row["tokens"]],
            "sampling_params": dict(sampling),
        },
        postprocess=functools.partial(answer_of, ends=ends_of(folder)),
    )
    asked = (
        source(planned.reading, planned.texts, planned.rules, "score")
        .map_batches(
            ask_block,
            fn_kwargs={"planned": planned, "folder": str(folder), "context": context_of(serving, folder)},
            batch_size=1,
            batch_format="pyarrow",
        )
        .materialize()  # read once, for the good and for the bad
    )
    good, bad = (
        asked.map_batches(only, fn_kwargs={"good": which}, batch_size=None, batch_format="pyarrow")
        for which in (True, False)
    )
    return (
        processor(good)
        .union(bad)
        .groupby("shard", num_partitions=PARTITIONS)
        .map_groups(write_group, fn_kwargs={"planned": planned, "uri": uri}, batch_format="pyarrow")
    )


def ends_of(folder: Path) -> frozenset[int]:
    """Tokens that end an answer."""
    path = folder / "generation_config.json"
    found = storage.read_json(str(path)).get("eos_token_id") if path.is_file() else None
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Any:
    return load_chat_tokenizer(Path(folder), folder, None)


def ask_block(row: pa.Table, planned: Planned, folder: str, context: int) -> pa.Table:
    """Runs in a task: a packed block → its rows, flat, with their prompts in tokens."""
    block = blocks.from_row(row, list(planned.reading.columns))
    if block.problem:
        raise DataError(block.problem)
    asked = asked_of(planned, block.rows)
    messages, said = asked.inputs, dict[int, str]()
    sources: list[list[str]] = [[] for _ in messages]
    prompter = prompter_of(planned.settings.serving, Path(folder))
    if prompter:
        found = grounded(planned, asked, prompter)
        asked, said, sources = found.asked, found.said, found.sources
    bad, prompts = dict(asked.bad), []
    for number, turns in enumerate(asked.inputs):
        prompt: list[int] = []
        if number not in bad and number not in said:
            try:
                prompt = prompt_of(_tokenizer(folder), turns)
                check_prompt(prompt, context)
            except RequestError as error:
                prompt, bad[number] = [], str(error)
        prompts.append(prompt)
    kept = pa.table(kept_of(planned, block.rows)).to_pylist() or [{}] * len(prompts)
    size = len(prompts)
    return pa.table(
        {
            "shard": pa.array([shard_name(block)] * size, pa.string()),
            "position": block.rows[blocks.POSITION],
            "kept": pa.array([json.dumps(values) for values in kept], pa.string()),
            "messages": pa.array([json.dumps(turns) for turns in messages], pa.string()),
            "sources": pa.array([json.dumps(names) for names in sources], pa.string()),
            # Once a block.
            "redacted": pa.array(
                [json.dumps(blocks.redacted_of(row) if i == 0 else {}) for i in range(size)]
            ),
            "tokens": pa.array(prompts, pa.list_(pa.int32())),
            "problem": pa.array([bad.get(i, "") for i in range(size)], pa.string()),
            "answer": pa.array([said.get(i, "") for i in range(size)], pa.string()),
            "finish_reason": pa.array(["stop" if i in said else "" for i in range(size)], pa.string()),
            "prompt_tokens": pa.array([0] * size, pa.int64()),
            "completion_tokens": pa.array([0] * size, pa.int64()),
        }
    )


CARRIED = ("shard", "position", "kept", "messages", "sources", "redacted", "problem")


def only(rows: pa.Table, good: bool) -> pa.Table:
    """The rows that are to be asked, or, without their prompts, those that cannot be or are answered already."""
    fine = pc.greater(pc.list_value_length(rows["tokens"]), 0)
    if good:
        return rows.filter(fine).drop_columns(list(ANSWERED))
    return rows.filter(pc.invert(fine)).drop_columns(["tokens"])


def answer_of(row: dict[str, Any], ends: frozenset[int]) -> dict[str, Any]:
    """What the engine says to a row, as `lib.generation` would tell it."""
    tokens = [int(token) for token in row["generated_tokens"]]
    return {
        **{name: row[name] for name in CARRIED},
        "answer": str(row["generated_text"]).strip(),
        "finish_reason": "stop" if tokens and tokens[-1] in ends else "length",
        "prompt_tokens": int(row["num_input_tokens"]),
        "completion_tokens": len(tokens),
    }


def write_group(rows: pa.Table, planned: Planned, uri: str) -> pa.Table:
    """Runs in a task: all rows of one shard → the shard; its counts."""
    from lib.tasks.chat import MESSAGES

    rows = rows.sort_by("position")
    problems = rows["problem"].to_pylist()
    bad = {i: why for i, why in enumerate(problems) if why}
    fine = pa.array(np.array([not why for why in problems], bool))
    kept = [json.loads(text) for text in rows["kept"].to_pylist()]
    messages = [json.loads(text) for text in rows["messages"].to_pylist()]
    answers = {name: pc.if_else(fine, rows[name].combine_chunks(), None) for name in ANSWERED}
    answers |= {name: answers[name].cast(pa.int32()) for name in ("prompt_tokens", "completion_tokens")}
    if planned.knowledge:
        sources = [json.loads(text) for text in rows["sources"].to_pylist()]
        answers["citations"] = pa.array(sources, pa.list_(pa.string()))
    counts = write_shard(
        planned,
        uri,
        rows["shard"][0].as_py(),
        rows["position"].to_numpy(),
        {
            name: pa.array([values[name] for values in kept], pa.string())
            for name in planned.settings.score.keep
        },
        pa.table({"messages": pa.array(messages, MESSAGES)}),
        pa.table(answers),
        bad,
    )
    counts["engine"] = engine_name(planned.settings.serving)
    counts["redacted"] = sum((Counter(json.loads(text)) for text in rows["redacted"].to_pylist()), Counter())
    return pa.table({"counts": [json.dumps(counts)]})
