"""Keys of `knowledge` (`jobs.index`) and of `serving.knowledge`: documents that answers are grounded in."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lib.settings.redaction import RedactionSettings, switched
from lib.settings.sections import Listed, Name, Positive, Section, Share

INSTRUCTIONS = (
    "Answer from the numbered passages below and from nothing else. Name the passages that you use by their "
    "numbers in brackets, such as [1]. If they do not answer the question, say that you do not know."
)
NOTHING_FOUND = (
    "The knowledge base says nothing of what the user said last. If it is a question, say that you do not know, and do "
    "not guess an answer."
)


class KnowledgeSettings(Section):
    """From documents to an index (`jobs.index`)."""

    source: Listed[str] | None = None
    """URI, glob or folder of Markdown, HTML, text and PDF; several are read together."""
    index: Name | None = None
    """Names the index; None takes the configuration's name."""
    base_url: str | None = None
    """What citations put before a document's path below its source, such as `https://shop.example/help`."""
    base: str = "sample://minilm-l6"
    """The encoder of passages and questions, as `model.base` names one."""
    query_prefix: str = ""
    """What the encoder wants before a question, such as E5's `query: `; `passage_prefix` before a passage."""
    passage_prefix: str = ""
    chunk_tokens: Annotated[int, Field(ge=16)] = 160
    """Most tokens of a passage, by the encoder's tokenizer: title, headings and special tokens included."""
    overlap: Annotated[int, Field(ge=0)] = 32
    """Most tokens at the end of a passage that begin the next one too, in whole sentences."""
    language: str = "English"
    """Of the documents: how words are stemmed, and which are too common to be searched."""
    redact: Annotated[RedactionSettings | None, BeforeValidator(switched)] = None
    """Personal data that documents hold (the section is that of `data.redact`). Not by default: what customers may write to
    stands in help pages on purpose."""
    max_unreadable: Share = 0.05
    """Share of the documents that may be unreadable: they are named and left out. With more there is no index."""
    keep: Positive = 3
    """Versions of the index that are kept, the current one included."""
    workers: Positive = 1
    """Actors that embed; each takes `cpus_per_worker` and `gpus_per_worker`."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _overlap(self) -> KnowledgeSettings:
        if self.overlap > self.chunk_tokens // 2:
            raise ValueError(
                f"overlap {self.overlap} is more than half of chunk_tokens {self.chunk_tokens}; lower it"
            )
        return self


class SearchSettings(Section):
    """How passages are found (lib/retrieval/search.py)."""

    mode: Literal["hybrid", "vector", "text"] = "hybrid"
    """text: BM25 of the words; vector: cosine of the encoder's vectors; hybrid: both, fused."""
    fusion: Literal["sum", "rrf"] = "sum"
    """hybrid: by cosine plus `text_weight` of BM25, or by reciprocal rank fusion, which asks for ranks alone."""
    text_weight: Annotated[float, Field(ge=0)] = 0.1
    """What the highest BM25 of a question adds to a cosine."""
    top_k: Positive = 5
    """Passages at most."""
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.3
    """Cosine of question and passage under which a passage is not relevant."""
    rerank: str | None = None
    """A cross-encoder, as `model.base` names a model: it reads question and passage together, and what it says is the
    order of the best `rerank_candidates`. It takes a pass over each of them, and so some hundred milliseconds on a CPU."""
    rerank_candidates: Positive = 20


class GroundingSettings(SearchSettings):
    """How a chat model's answers are grounded (lib/retrieval/prompt.py, serve/grounding.py)."""

    index: Name
    """Made by `jobs.index`; its current version is followed."""
    passage_tokens: Positive = 1024
    """Most tokens of all passages together, by the chat model's tokenizer; its context may leave fewer."""
    answer_tokens: Positive = 256
    """Tokens of the context that are left to an answer of a request that does not say how long it may be."""
    instructions: str = INSTRUCTIONS
    """What the model is told before the passages."""
    nothing_found: str = NOTHING_FOUND
    """What it is told when nothing is relevant."""
    unknown: str | None = None
    """What is answered when nothing is relevant, without asking the model; None: the model is told `nothing_found`."""
    poll_s: Annotated[float, Field(gt=0)] = 5
    """How often a new version of the index is looked for."""


def named(value: Any) -> Any:
    """`knowledge: NAME` as `knowledge: {index: NAME}`."""
    return {"index": value} if isinstance(value, str) else value
