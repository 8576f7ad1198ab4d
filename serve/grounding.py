"""Answers grounded in a knowledge base: passages found for a conversation's question, put before the model, and cited.

`Knowledge` follows an index: a thread looks at its pointer and opens a new version beside the old one, which goes on
answering until then. `Grounding` finds the passages of a request and writes them into its system message.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib import storage
from lib.artifacts import IndexRef, ModelRef
from lib.errors import ModelError, unwrap
from lib.retrieval.embedding import Embedder
from lib.retrieval.index import Index, current
from lib.retrieval.prompt import Prompter, questions_of
from lib.retrieval.rerank import reranker
from lib.retrieval.search import Hit, search
from lib.settings import GroundingSettings, ServingSettings
from serve import metrics
from serve.batching import LengthBatcher

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("ray.serve")

QUESTION_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Grounded:
    """A conversation as the model is to see it, and what it is grounded in."""

    messages: list[dict[str, Any]]
    citations: list[dict[str, Any]]
    """Of each passage: number, title, headings, text, source, place, cosine."""
    answer: str | None = None
    """What is answered without the model."""


class Opened:
    """An index version and the encoder of its questions."""

    embedder: Embedder
    batcher: LengthBatcher[np.ndarray, np.ndarray]

    def __init__(self, ref: IndexRef, before: Opened | None) -> None:
        self.index = Index(ref)
        self.encoder: str = self.index.manifest["encoder"]
        if before is not None and before.encoder == self.encoder:
            self.embedder, self.batcher = before.embedder, before.batcher
            return
        # One thread: a question is short, and the engine beside it wants the cores.
        self.embedder = Embedder(self.index.manifest["base"], ServingSettings(threads=1))
        # One thread owns the encoder, and questions that wait are computed together.
        self.batcher = LengthBatcher(
            self.embedder.encoder.vectors,
            QUESTION_TOKENS_PER_BATCH,
            self.embedder.encoder.padding_per_batch,
        )

    async def search(self, questions: Sequence[str], settings: GroundingSettings) -> list[Hit]:
        prefix = self.index.manifest["query_prefix"]
        rows = self.embedder.rows([prefix + question for question in questions])
        vectors = np.stack(await self.batcher.results(rows))
        return await asyncio.to_thread(search, self.index, questions, vectors, settings)


class Knowledge:
    """The current version of an index.

    Raises RegistryError when there is none at first; later a version that cannot be opened leaves the former in place.
    """

    def __init__(self, settings: GroundingSettings) -> None:
        self._settings = settings
        self._opened = Opened(current(settings.index), None)
        if settings.rerank is not None:
            reranker(settings.rerank)  # so that it is not the first who asks that waits for it
        self._closed = threading.Event()
        threading.Thread(target=self._follow, name="knowledge", daemon=True).start()

    @property
    def version(self) -> IndexRef:
        return self._opened.index.ref

    async def search(self, questions: Sequence[str]) -> list[Hit]:
        return await self._opened.search(questions, self._settings)

    def close(self) -> None:
        self._closed.set()

    def _follow(self) -> None:
        retired: list[LengthBatcher[np.ndarray, np.ndarray]] = []
        while not self._closed.wait(self._settings.poll_s):
            # By now nobody uses them any more.
            while retired:
                retired.pop().close()
            try:
                ref = current(self._settings.index)
                if ref == self.version:
                    continue
                former, self._opened = self._opened, Opened(ref, self._opened)
                if former.batcher is not self._opened.batcher:
                    retired.append(former.batcher)
                logger.info("grounding answers in %s", ref)
            except Exception as error:
                logger.warning("index %s stays: %s", self.version, unwrap(error) or repr(error))


class Grounding:
    """Grounds requests to one chat model (`Prompter`)."""

    def __init__(
        self, knowledge: Knowledge, settings: GroundingSettings, tokenizer: Tokenizer, context: int
    ) -> None:
        self._knowledge = knowledge
        self._prompter = Prompter(settings, tokenizer, context)

    @classmethod
    def of(cls, settings: GroundingSettings, ref: ModelRef, max_model_len: int | None) -> Grounding:
        """For a registered chat model: of its files only the tokenizer and config.json are read.

        Raises ModelError when they do not tell what is needed, RegistryError when there is no such index.
        """
        from tokenizers import Tokenizer

        context = max_model_len or storage.read_json(storage.join(ref.uri, "config.json")).get(
            "max_position_embeddings"
        )
        if not isinstance(context, int):
            raise ModelError(f"{ref} does not say how long its context is; set serving.chat.max_model_len")
        tokenizer = Tokenizer.from_str(storage.read_bytes(storage.join(ref.uri, "tokenizer.json")).decode())
        tokenizer.no_truncation()
        return cls(Knowledge(settings), settings, tokenizer, context)

    async def ground(self, messages: Sequence[dict[str, Any]], answer_tokens: int | None) -> Grounded:
        """The conversation with passages in its system message; as it is where the user says nothing.

        Raises RequestError when the conversation leaves no room for a passage.
        """
        questions = questions_of(messages)
        if not questions:
            return Grounded(list(messages), [])
        hits = await self._knowledge.search(questions)
        metrics.current().count("whorl_retrievals_total", found="yes" if hits else "no")
        if not hits and self._prompter.settings.unknown is not None:
            return Grounded(list(messages), [], self._prompter.settings.unknown)
        # Long conversations take long to count, and others wait for this thread.
        told, chosen = await asyncio.to_thread(self._prompter.told, messages, hits, answer_tokens)
        return Grounded(told, [cited(i, hit) for i, hit in enumerate(chosen, 1)])


def cited(number: int, hit: Hit) -> dict[str, Any]:
    """A passage as a client sees it: not where it lies on our disks, nor how it was ranked."""
    shown = {key: value for key, value in asdict(hit).items() if key not in ("uri", "score")}
    return {"number": number, **shown, "headings": list(hit.headings), "cosine": round(hit.cosine, 4)}
