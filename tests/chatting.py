"""A small chat use: dialogues with a rule in them, as a dataset, and runs whose models have learned it or not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage, tracking
from lib.artifacts import SPLITS, DatasetRef, TaskFile
from lib.settings import Settings
from lib.tasks import load_task
from tests.tiny import WORDS

# What a question about each word is answered with.
GOOD = {"dress": "love the fit", "shirt": "great color", "fabric": "so soft"}
BAD = "okay okay"
# Shown on a page, never run.
MARKUP = "<script>alert(1)</script>"


def use(base: Path, task: str = "chat", name: str = "desk", **sections: dict[str, Any]) -> Settings:
    values: dict[str, Any] = {
        "name": name,
        "task": task,
        "data": {"source": "unused.jsonl", "slices": {"topic": "topic"}},
        "model": {"base": str(base), "max_length": 96},
        "evaluation": {"bootstrap": 200, "answers": {"max_new_tokens": 12, "precision": "fp32", "batch": 4}},
        "serving": {"threads": 1},
    }
    return Settings.model_validate(
        {
            name: {**values.get(name, {}), **sections.get(name, {})}
            if isinstance(values.get(name, {}), dict)
            else values[name]
            for name in values.keys() | sections.keys()
        }
    )


def make_dataset(settings: Settings, rows: int = 24, fingerprint: str = "0123456789abcdef") -> DatasetRef:
    """`rows` dialogues in each split: each asks about one of three things, in words of its own."""
    random = np.random.default_rng(0)
    task, ref = load_task(settings.task), DatasetRef(settings.name, fingerprint)
    counts: dict[str, Any] = {}
    with storage.publish(ref.uri) as folder:
        for split in SPLITS:
            topics = [str(random.choice(list(GOOD))) for _ in range(rows)]
            asked = [f"{' '.join(random.choice(WORDS, 3))} {topic}?" for topic in topics]
            if split == "test":
                asked[::3] = [f"{MARKUP} {question}" for question in asked[::3]]
            chosen = [
                [_said("user", q), _said("assistant", GOOD[t])] for q, t in zip(asked, topics, strict=True)
            ]
            columns: dict[str, Any] = {
                "id": [hashlib.sha256(f"{split}{i}".encode()).hexdigest()[:16] for i in range(rows)],
                "messages": chosen,
            }
            if settings.task == "preference":
                columns["rejected_messages"] = [[q, _said("assistant", BAD)] for q, _ in chosen]
            table = pa.table({**columns, "topic": topics})
            encoded = task.encode(table, settings.model)
            (folder / split).mkdir()
            half = rows // 2
            pq.write_table(encoded.slice(0, half), folder / split / "part-00000.parquet", row_group_size=8)
            pq.write_table(encoded.slice(half), folder / split / "part-00001.parquet", row_group_size=8)
            tokens = int(encoded["length"].to_numpy().sum())
            counts[split] = {"rows": rows, "tokens": tokens, "truncated": 0, "labels": {}, "shards": []}
        manifest = {
            "name": ref.name,
            "fingerprint": fingerprint,
            "task": settings.task,
            "base": settings.model.base,
            "labels": [],
            "slices": ["topic"],
            "splits": counts,
        }
        storage.write_json(str(folder / "manifest.json"), manifest)
    return ref


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def make_run(settings: Settings, dataset: DatasetRef, steps: int) -> tracking.Run:
    """A finished fine-tuning run: the base after `steps` full-batch steps on the training dialogues."""
    import torch

    task, base = load_task("chat"), Path(settings.model.base)
    model = task.build(base, settings)
    rows = pa.concat_tables([pq.read_table(s.removeprefix("file://")) for s in dataset.shards("train")])
    batch, optimizer = task.collate(rows, 0), torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        loss, _ = task.loss(model, batch, settings, {})
        (loss / task.weight(rows, settings, {})).backward()
        optimizer.step()
        optimizer.zero_grad()
    info = TaskFile("chat", [], settings.model.max_length, settings.model.base, dataset.fingerprint)
    with tracking.start_run("finetune", settings) as run, storage.publish(run.ref.model_uri) as folder:
        task.save(model, base, info, folder)
    return run
