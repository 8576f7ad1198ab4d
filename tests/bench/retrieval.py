"""Hybrid search (the default fusion, and reciprocal rank fusion) beside BM25 alone and vectors alone.

Recall@1, 3 and 5, and nDCG@10.

    make bench-retrieval        (python -m tests.bench.retrieval --rerank MODEL with a cross-encoder of yours)

Two sets. `shop`: the questions of tests/bench/retrieval_questions.jsonl, in users' words, on jobs/knowledge; relevant is
a page's section. `pairs`: the questions of chatterbot-corpus on 13 subjects of knowledge (small talk left out), each of
which looks for its own answers among those to all. All that can be told from a question is ranked, without a threshold;
what the threshold does is told for itself: the share of questions with an answer that keep a relevant passage, and of
those without one that get none.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from lib import storage
from lib.artifacts import IndexRef
from lib.encoders import UNCUT, base_tokenizer
from lib.retrieval.build import passages
from lib.retrieval.chunks import Chunker
from lib.retrieval.documents import find_documents, read_document
from lib.retrieval.embedding import Embedder
from lib.retrieval.index import PASSAGE, Index, with_vectors, write_table
from lib.retrieval.measures import ndcg, recall
from lib.retrieval.prompt import questions_of
from lib.retrieval.search import CANDIDATES, Hit, search
from lib.samples import sample_path
from lib.settings import KnowledgeSettings, SearchSettings, ServingSettings
from tests.bench.report import Report

QUESTIONS = Path(__file__).with_name("retrieval_questions.jsonl")
# fmt: off
SUBJECTS = (
    "ai", "computers", "food", "health", "history", "literature", "money", "movies", "politics", "psychology", "science",
    "sports", "trivia",
)
# fmt: on
DEPTHS, NDCG_DEPTH = (1, 3, 5), 10
RIVALS: dict[str, dict[str, Any]] = {
    "BM25": {"mode": "text"},
    "vectors": {"mode": "vector"},
    "hybrid, rrf": {"fusion": "rrf"},
}
Key = tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """A question, as ways of putting it, and the keys of what answers it."""

    questions: list[str]
    relevant: frozenset[Key]


@dataclass(frozen=True)
class Set:
    name: str
    rows: list[dict[str, Any]]
    """Of PASSAGE."""
    asked: list[Asked]
    key: Callable[[Hit], Key]
    """What a hit stands for."""


def main(rerank: str | None) -> None:
    if rerank is not None:
        RIVALS["hybrid, reranked"] = {"rerank": rerank}
    knowledge = KnowledgeSettings()
    embedder = Embedder(knowledge.base, ServingSettings())
    report = Report("retrieval")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WHORL_STORAGE"] = folder
        sets = [shop(knowledge), pairs()]
        measured = [(one, publish(one, embedder)) for one in sets]
        for one, index in measured:
            compare(report, one, index, embedder)
        tell_threshold(report, *measured[0], embedder)
        del os.environ["WHORL_STORAGE"]
    report.finish()


def shop(knowledge: KnowledgeSettings) -> Set:
    chunker = Chunker(base_tokenizer(knowledge.base, UNCUT), knowledge.chunk_tokens, knowledge.overlap)
    rows: list[dict[str, Any]] = []
    for file in find_documents(["jobs/knowledge"]).files:
        rows += passages(file, read_document(file), chunker, len(rows))
    asked = []
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        given = json.loads(line)
        said = [{"role": "user", "content": text} for text in (*given.get("earlier", ()), given["question"])]
        relevant = frozenset((page, section) for page, section in given["relevant"])
        asked.append(Asked(questions_of(said), relevant))
    return Set("shop", rows, asked, lambda hit: (hit.source, *hit.headings[-1:]))


def pairs() -> Set:
    """Answers are passages without a title; a question's own answers are relevant, however often it is there."""
    files = sample_path("sample://small-talk", "data").parent
    answers: dict[str, set[str]] = {}
    for subject in SUBJECTS:
        for question, answer, *_ in yaml.safe_load((files / f"{subject}.yml").read_text())["conversations"]:
            answers.setdefault(str(question), set()).add(str(answer))
    texts = sorted(set().union(*answers.values()))
    rows = [
        {"id": i, "uri": "", "source": "", "title": "", "headings": [], "place": "", "text": text,
         "searched": text, "tokens": 0}
        for i, text in enumerate(texts)
    ]  # fmt: skip
    asked = [
        Asked([question], frozenset((text,) for text in found)) for question, found in sorted(answers.items())
    ]
    return Set("pairs", rows, asked, lambda hit: (hit.text,))


def publish(one: Set, embedder: Embedder) -> Index:
    ref = IndexRef(one.name, "0")
    table = pa.Table.from_pylist(one.rows, PASSAGE)
    with storage.publish(ref.uri) as folder:
        vectors = embedder.vectors(table["searched"].to_pylist())
        rows, _ = write_table(folder, iter([with_vectors(table, vectors)]), "English")
        storage.write_json(str(folder / "manifest.json"), {"passages": rows})
    return Index(ref)


def compare(report: Report, one: Set, index: Index, embedder: Embedder) -> None:
    asked = [question for question in one.asked if question.relevant]
    print(f"{one.name}: {len(asked):,} questions, {len(one.rows):,} passages", flush=True)
    figures = {}
    for name, chosen in {"ours": {}, **RIVALS}.items():
        settings = SearchSettings.model_validate({**chosen, "top_k": 2 * CANDIDATES, "threshold": -1})
        measured = [
            (
                keys(one, search(index, said.questions, embedder.vectors(said.questions), settings)),
                said.relevant,
            )
            for said in asked
        ]
        figures[name] = {
            **{f"recall@{k}": float(np.mean([recall(r, found, k) for r, found in measured])) for k in DEPTHS},
            f"nDCG@{NDCG_DEPTH}": float(np.mean([ndcg(r, found, NDCG_DEPTH) for r, found in measured])),
        }
    for figure, ours in figures["ours"].items():
        for rival in RIVALS:
            theirs = figures[rival][figure]
            report.row(f"{one.name}: {figure}", ours, unit="", rival=rival, theirs=theirs)


def tell_threshold(report: Report, one: Set, index: Index, embedder: Embedder) -> None:
    """What the default threshold lets through, with as many passages as are given to a model by default."""
    settings = SearchSettings()
    kept: dict[bool, list[bool]] = {True: [], False: []}
    for question in one.asked:
        found = keys(one, search(index, question.questions, embedder.vectors(question.questions), settings))
        is_right = bool(question.relevant.intersection(found)) if question.relevant else not found
        kept[bool(question.relevant)].append(is_right)
    report.row(f"{one.name}: answerable, passage given", float(np.mean(kept[True])), unit="share")
    report.row(f"{one.name}: unanswerable, none given", float(np.mean(kept[False])), unit="share")


def keys(one: Set, hits: list[Hit]) -> list[Key]:
    """What the hits stand for, each once."""
    return list(dict.fromkeys(one.key(hit) for hit in hits))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rerank", help="a cross-encoder, whose order is measured too")
    main(parser.parse_args().rerank)
