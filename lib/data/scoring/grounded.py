"""Chat's questions with the passages of a knowledge base before them, when files are scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from lib import storage
from lib.data.grounding import prompter, tell
from lib.data.scoring.plan import Planned
from lib.errors import RequestError
from lib.retrieval.prompt import Prompter
from lib.settings import ServingSettings
from lib.tasks import Asked


@dataclass(frozen=True)
class Grounded:
    """What is asked of a block's rows, once passages were put before them."""

    asked: Asked
    said: dict[int, str]
    """Row → what is answered without the model."""
    sources: list[list[str]]
    """Of each row's passages."""

    def answered(self, answers: pa.Table) -> pa.Table:
        """The model's answers, one for each row, with what was said without it, and the sources as `citations`."""
        places = list(self.said)
        said = {
            "answer": list(self.said.values()),
            "finish_reason": ["stop"] * len(places),
            "prompt_tokens": [0] * len(places),
            "completion_tokens": [0] * len(places),
        }
        both = pa.concat_tables([answers, pa.table(said).cast(answers.schema)])
        index = np.arange(answers.num_rows)
        index[places] = answers.num_rows + np.arange(len(places))
        citations = pa.array(self.sources, pa.list_(pa.string()))
        return both.take(pa.array(index)).append_column("citations", citations)


def grounded(planned: Planned, asked: Asked, prompter: Prompter) -> Grounded:
    """Raises nothing for a row without room for a passage, which is a bad one."""
    assert planned.knowledge is not None
    inputs, bad, said = list(asked.inputs), dict(asked.bad), dict[int, str]()
    sources: list[list[str]] = [[] for _ in inputs]
    places = [i for i in range(len(inputs)) if i not in bad]
    told = tell([inputs[i] for i in places], planned.settings, planned.knowledge, prompter)
    for i, one in zip(places, told, strict=True):
        if isinstance(one, RequestError):
            bad[i] = str(one)
        elif one.answer is not None:
            said[i] = one.answer
        else:
            inputs[i], sources[i] = one.messages, one.sources
    return Grounded(Asked(asked.rows, inputs, bad), said, sources)


def context_of(serving: ServingSettings, model: Path) -> int:
    """The most tokens that a prompt and its answer may have together, for the chat model in that folder."""
    own = storage.read_json(str(model / "config.json"))["max_position_embeddings"]
    return min(int(own), serving.chat.max_model_len or int(own))


def prompter_of(serving: ServingSettings, model: Path) -> Prompter | None:
    """What puts passages before that model's questions, where it is to."""
    if serving.knowledge is None:
        return None
    return prompter(serving.knowledge, model, context_of(serving, model))
