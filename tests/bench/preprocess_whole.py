"""From raw texts to a clean, private, deduplicated, tokenised dataset: ours beside what people put together.

Part of make bench-preprocess        (python -m tests.bench.preprocess --whole 100000 1000000 3000000 --rows)

Texts are put together of the sentences of the sample's reviews, so that any number of them are unlike; of them 3% are there
twice, 5% are another with a word changed, 2% have HTML in them and 1% an e-mail address. Ours mends Unicode, HTML and blanks,
leaves out texts of fewer than three words, takes personal data out, drops exact and near duplicates (Jaccard 0.8 of pairs of
words), keeps what is alike in one split and tokenises.

One process: `datasets.map` with ftfy and lxml, a set of hashes, datasketch's MinHashLSH of the same shingles (128 permutations, 0.8),
`datasets.map` with the same tokeniser, Parquet. datatrove: two workers, its reader, the same ftfy and lxml as a formatter, its
MinHash (pairs of words, 14 buckets of 8 hashes, its default) in four stages, and Parquet; it tokenises nothing. Neither looks for
personal data, nor at splits.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from lib.base_models import base_directory
from lib.samples import sample_path
from tests.bench.environments import rival_python
from tests.bench.measuring import MIB, OUR_PROGRAM, measure
from tests.bench.report import Report

BASE, MAX_LENGTH = "sample://minilm-l6", 128
# Rows up to which the rivals are run too.
RIVALS_UP_TO = 1_000_000
AT_ONCE = 50_000
TWICE, CHANGED, MARKED, PRIVATE = 0.03, 0.05, 0.02, 0.01

MENDED = """
import re, ftfy, lxml.html
def mend(text):
    text = ftfy.fix_text(text or "")
    if "<" in text or "&" in text:
        text = lxml.html.fromstring("<div>" + text + "</div>").text_content()
    return " ".join(text.split())
def shingles(text):
    words = re.findall(r"\\w+", text.lower())
    return {" ".join(pair).encode() for pair in zip(words, words[1:])} or {" ".join(words).encode()}
"""

ONE_PROCESS = (
    MENDED
    + """
import hashlib, json, sys, time
import datasets
from datasketch import MinHash, MinHashLSH
from transformers import AutoTokenizer

source, out, base, max_length = sys.argv[1:4] + [int(sys.argv[4])]
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(base)
start = time.perf_counter()
rows = datasets.load_dataset("parquet", data_files=source, split="train", cache_dir=out + "/cache")
rows = rows.map(lambda batch: {"text": [mend(t) for t in batch["text"]]}, batched=True)
rows = rows.filter(lambda batch: [len(t.split()) >= 3 for t in batch["text"]], batched=True)
seen, lsh, kept = set(), MinHashLSH(threshold=0.8, num_perm=128), []
for place, text in enumerate(rows["text"]):
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if digest in seen:
        continue
    seen.add(digest)
    sketch = MinHash(128)
    sketch.update_batch(list(shingles(text)))
    if lsh.query(sketch):
        continue
    lsh.insert(place, sketch)
    kept.append(place)
rows = rows.select(kept)
rows = rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length,
                return_attention_mask=False, return_token_type_ids=False), batched=True)
rows.to_parquet(out + "/rows.parquet")
print(json.dumps({"seconds": time.perf_counter() - start, "kept": len(kept)}))
"""
)

DATATROVE = (
    MENDED
    + """
import json, sys, time
import pyarrow.parquet as pq
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (MinhashBuildIndex, MinhashDedupBuckets, MinhashDedupCluster,
    MinhashDedupFilter, MinhashDedupSignature)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter

class Mend(BaseFormatter):
    name = "mend"
    def format(self, text):
        return mend(text)

class Blanks:
    # Punctuation is gone by then. Its own tokeniser of English is spaCy, which takes longer.
    def word_tokenize(self, text):
        return text.split()

def main():
    source, out = sys.argv[1:3]
    config = MinhashConfig(n_grams=2)
    signature = MinhashDedupSignature(out + "/signatures", config, language="aii")  # one that asks for no package
    signature.word_tokenizer = Blanks()
    workers = 2
    def run(steps, tasks):
        LocalPipelineExecutor(pipeline=steps, tasks=tasks, workers=workers, skip_completed=False,
                              logging_dir=out + "/logs").run()
    start = time.perf_counter()
    run([ParquetReader(source, text_key="text", batch_size=1000), Mend(), LambdaFilter(lambda d: len(d.text.split()) >= 3),
         ParquetWriter(out + "/mended")], workers)
    read = lambda: ParquetReader(out + "/mended", batch_size=1000)
    run([read(), signature], workers)
    run([MinhashDedupBuckets(out + "/signatures", out + "/buckets", config=config)], config.num_buckets)
    run([MinhashDedupCluster(out + "/buckets", out + "/remove", config=config)], 1)
    run([read(), MinhashDedupFilter(out + "/remove"), ParquetWriter(out + "/kept")], workers)
    seconds = time.perf_counter() - start
    kept = sum(pq.ParquetFile(file).metadata.num_rows for file in Path(out, "kept").rglob("*.parquet"))
    print(json.dumps({"seconds": seconds, "kept": kept}))

if __name__ == "__main__":
    main()
"""
)

RIVALS = {
    "datasets, datasketch": (
        "onehouse",
        ("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==3.6.0", "datasketch==2.0.0"),
        ONE_PROCESS,
    ),
    "datatrove": (
        "datatrove",
        (
            "datatrove==0.10.1", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==3.6.0", "humanize==4.14.0",
            "loguru==0.7.3", "fasteners==0.20", "pyahocorasick==2.2.0", "nltk==3.9.2", "tldextract==5.3.0",
        ),
        DATATROVE,
    ),
}  # fmt: skip


def compare(report: Report, sizes: list[int], scratch: Path) -> None:
    """A row for each size and side; then how time and memory grow."""
    times, peaks = [], []
    for rows in sizes:
        source = texts(scratch / f"texts-{rows}.parquet", rows)
        folder = scratch / f"whole-{rows}"
        ours = ours_of(source, folder)
        times.append(ours["seconds"])
        peaks.append(ours["process"])
        case = f"{rows:,} texts, all steps"
        kept = sum(one["rows"] for one in ours["manifest"]["splits"].values())
        if rows > RIVALS_UP_TO:
            report.row(case, rows / ours["seconds"], unit="rows/s")
        for name, (environment, packages, program) in RIVALS.items() if rows <= RIVALS_UP_TO else ():
            theirs = theirs_of(
                rival_python(environment, *packages), program, source, scratch / f"{environment}-{rows}"
            )
            report.row(case, rows / ours["seconds"], unit="rows/s", rival=name, theirs=rows / theirs["seconds"],
                       target=1.0 if rows == RIVALS_UP_TO else None)  # fmt: skip
            report.row(f"{case}: rows that stay", kept, unit="", rival=name, theirs=theirs["kept"])
            report.row(f"{case}: largest process", ours["process"] / MIB, unit="MiB", rival=name,
                       theirs=theirs["process"] / MIB, higher_is_better=False)  # fmt: skip
        report.row(f"{case}: largest process of ours", ours["process"] / MIB, unit="MiB", target=2048,
                   higher_is_better=False)  # fmt: skip
        source.unlink()
    if len(sizes) > 1:
        exponent = math.log(times[-1] / times[0]) / math.log(sizes[-1] / sizes[0])
        report.row(f"time grows with rows to the power of, {sizes[0]:,} to {sizes[-1]:,}", exponent, unit="",
                   target=1.0, higher_is_better=False)  # fmt: skip


def texts(path: Path, rows: int) -> Path:
    """A Parquet file of `text` and `label`."""
    random = np.random.default_rng(rows)
    reviews = pq.read_table(sample_path("sample://reviews", "data"), columns=["Review Text"])["Review Text"]
    sentences = sorted(
        {s.strip() for text in reviews.drop_null().to_pylist() for s in re.split(r"(?<=[.!?])\s", text)}
    )
    sentences = [s for s in sentences if len(s.split()) >= 4]
    with pq.ParquetWriter(path, pa.schema({"text": pa.string(), "label": pa.int64()})) as file:
        for table in _tables(sentences, rows, random):
            file.write_table(table, row_group_size=16_384)
    return path


def _tables(sentences: list[str], rows: int, random: np.random.Generator) -> Iterator[pa.Table]:
    before: list[str] = []
    for start in range(0, rows, AT_ONCE):
        count = min(AT_ONCE, rows - start)
        picks = random.integers(0, len(sentences), (count, 5))
        sizes, lots, places = random.integers(3, 6, count), random.random(count), random.random(count)
        made: list[str] = []
        for number in range(count):
            known = made if len(made) > 1 else before
            lot = lots[number]
            if known and lot < TWICE:
                made.append(known[int(places[number] * len(known))])
            elif known and lot < TWICE + CHANGED:
                words = known[int(places[number] * len(known))].split()
                words[int(places[number] * len(words))] = "indeed"
                made.append(" ".join(words))
            else:
                text = " ".join(sentences[i] for i in picks[number, : sizes[number]].tolist())
                if lot > 1 - MARKED:
                    text = f"<p>{text}</p> <b>Thanks &amp; bye</b>"
                elif lot > 1 - MARKED - PRIVATE:
                    text = f"{text} Write to user{start + number}@example.com."
                made.append(text)
        before = made
        yield pa.table({"text": made, "label": random.integers(1, 3, count)})


def ours_of(source: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    values = {
        "name": "bench",
        "task": "sentiment",
        "data": {
            "source": str(source),
            "labels": {1: "bad", 2: "good"},
            "clean": {"unicode": True, "html": True, "whitespace": True, "length": {"words": {"least": 3}}},
            "near": {"duplicates": "drop"},
        },
        "model": {"base": BASE, "max_length": MAX_LENGTH},
    }
    config = folder / "bench.yaml"
    config.write_text(yaml.safe_dump(values))
    environment = {**os.environ, "WHORL_STORAGE": str(folder), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    return measure([sys.executable, "-c", OUR_PROGRAM, str(config)], environment)


def theirs_of(python: str, program: str, source: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    script = folder / "program.py"  # a file: its workers are started anew and read it again
    script.write_text(program)
    words = [python, str(script), str(source), str(folder), str(base_directory(BASE)), str(MAX_LENGTH)]
    return measure(words, {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")})
