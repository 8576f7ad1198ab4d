"""Raw Parquet to tokenised shards: this project beside Hugging Face `datasets`, at 230,000 and 1,000,000 reviews.

    make bench-preprocess        (python -m tests.bench.preprocess [--rows 230000 1000000] [--whole 100000 1000000 3000000])

Both read the same Parquet file, cut at the same length and write Parquet. Ours is the whole pipeline: read
twice, take personal data out, normalise, drop empty and duplicate rows, map labels, split, tokenise. The rival only tokenises, with
`map(batched=True, num_proc=2)`, and is spared the attention masks that it would write by default. Each runs
in a process of its own, one after the other; timed is the work without start-up (imports, Ray's head), but
with the start of workers on both sides.

Memory of the largest process is its peak of private memory (RssAnon); memory of all processes is the peak
of the sum of their proportional set sizes (private pages, libraries, and Ray's object store, each once).
Processor time is that of all of a side's processes from first to last, start-up included.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from lib.base_models import base_directory
from lib.data.alike.dedup import hash_texts, row_ids
from lib.samples import sample_path
from lib.text import normalise
from tests.bench import preprocess_whole
from tests.bench.environments import rival_python
from tests.bench.measuring import MIB, OUR_PROGRAM, measure
from tests.bench.report import Report

BASE = "sample://minilm-l6"
MAX_LENGTH = 128
# The rival, and what it needs that we have not.
RIVAL = ("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0")

RIVAL_PROGRAM = """
import json, sys, time
import datasets
from transformers import AutoTokenizer

source, out, base, max_length = sys.argv[1:4] + [int(sys.argv[4])]
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(base)

def encode(batch):
    texts = [text or "" for text in batch["text"]]
    return tokenizer(texts, truncation=True, max_length=max_length,
                     return_attention_mask=False, return_token_type_ids=False)

start = time.perf_counter()
rows = datasets.load_dataset("parquet", data_files=source, split="train", cache_dir=out + "/cache")
rows.map(encode, batched=True, num_proc=2).to_parquet(out + "/rows.parquet")
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[230_000, 1_000_000], help="only tokenised")
    parser.add_argument(
        "--whole", type=int, nargs="*", default=[100_000, 1_000_000, 3_000_000], help="all steps"
    )
    given = parser.parse_args()
    report = Report("preprocess")
    with tempfile.TemporaryDirectory(prefix="whorl-bench-") as scratch:
        if given.rows:
            compare(report, given.rows, Path(scratch))
        if given.whole:
            preprocess_whole.compare(report, given.whole, Path(scratch))
    report.finish()


def compare(report: Report, sizes: list[int], scratch: Path) -> None:
    """Tokenising alone, beside what only tokenises."""
    python = rival_python("datasets", *RIVAL)
    peaks: dict[str, list[float]] = {"ours": [], "theirs": []}
    for rows in sizes:
        source = reviews(scratch / f"reviews-{rows}.parquet", rows)
        ours = measure_ours(source, scratch / f"ours-{rows}")
        theirs = measure_theirs(python, source, scratch / f"theirs-{rows}")
        target = 1.0 if rows == max(sizes) else None
        case = f"{rows:,} reviews"
        report.row(case, rows / ours["seconds"], unit="rows/s", rival="datasets.map", target=target,
                   theirs=rows / theirs["seconds"])  # fmt: skip
        for key, what in (("process", "largest process"), ("all", "all processes")):
            report.row(f"{case}: {what}", ours[key] / MIB, unit="MiB", rival="datasets.map",
                       theirs=theirs[key] / MIB, higher_is_better=False)  # fmt: skip
        report.row(f"{case}: processor time", ours["cpu"], unit="s", rival="datasets.map",
                   theirs=theirs["cpu"], higher_is_better=False)  # fmt: skip
        peaks["ours"].append(ours["process"])
        peaks["theirs"].append(theirs["process"])
        agreement = agreeing(ours["shards"], theirs["rows"])
        report.row(f"{case}: same token ids", agreement, unit="of 1", target=1.0)
    if len(sizes) > 1:
        growth = {side: values[-1] / values[0] for side, values in peaks.items()}
        report.row(f"largest process, {sizes[-1]:,} over {sizes[0]:,}", growth["ours"], unit="times",
                   target=1.15, higher_is_better=False)  # fmt: skip


def reviews(path: Path, rows: int) -> Path:
    """The sample's reviews again and again, each copy with its number, so that no text is twice."""
    table = pq.read_table(sample_path("sample://reviews", "data"), columns=["Review Text", "Rating"])
    table = table.rename_columns(["text", "label"])
    copies = []
    for copy in range(-(-rows // table.num_rows)):
        numbered = (
            pc.binary_join_element_wise(table["text"], f"Order {copy}.", " ") if copy else table["text"]
        )
        copies.append(table.set_column(0, "text", numbered))
    pq.write_table(pa.concat_tables(copies).slice(0, rows), path, row_group_size=16_384)
    return path


def measure_ours(source: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    config = folder / "bench.yaml"
    labels = {1: "negative", 2: "negative", 3: "neutral", 4: "positive", 5: "positive"}
    values = {
        "name": "bench",
        "task": "sentiment",
        # The copies of a review differ by their numbers alone: they are alike on purpose.
        "data": {"source": str(source), "labels": labels, "leakage": "off"},
        "model": {"base": BASE, "max_length": MAX_LENGTH},
    }
    config.write_text(yaml.safe_dump(values))
    environment = {**os.environ, "WHORL_STORAGE": str(folder), "RAY_AUTH_MODE": "disabled"}
    # A Ray of its own, so that only its processes are measured.
    environment.pop("RAY_ADDRESS", None)
    measured = measure([sys.executable, "-c", OUR_PROGRAM, str(config)], environment)
    shards = folder / "datasets" / "bench" / measured["manifest"]["fingerprint"] / "train"
    return {**measured, "shards": sorted(shards.glob("*.parquet"))}


def measure_theirs(python: str, source: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    words = [
        python,
        "-c",
        RIVAL_PROGRAM,
        str(source),
        str(folder),
        str(base_directory(BASE)),
        str(MAX_LENGTH),
    ]
    # Two processes of one thread each: two of two threads would only contend.
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**measure(words, environment), "rows": folder / "rows.parquet"}


def agreeing(shards: list[Path], theirs: Path, rows: int = 2000) -> float:
    """Of the rival's first rows: the share for which our token ids are the same.

    Compared are those that lie in our train split and in whose text we changed nothing but white space
    (we also resolve &#39; and mend encodings, which changes tokens on purpose).
    """
    ours = pq.read_table(shards[0], columns=["id", "input_ids"])
    tokens = dict(zip(ours["id"].to_pylist(), ours["input_ids"].to_pylist(), strict=True))
    first = next(pq.ParquetFile(theirs).iter_batches(rows, columns=["text", "input_ids"]))
    texts = normalise(first["text"].cast(pa.string()))
    ids = row_ids(hash_texts(texts)[0]).to_pylist()
    pairs = [
        (tokens[name], theirs_ids)
        for name, raw, text, theirs_ids in zip(
            ids, first["text"].to_pylist(), texts.to_pylist(), first["input_ids"].to_pylist(), strict=True
        )
        if name in tokens and " ".join(raw.split()) == text
    ]
    if len(pairs) < rows // 2:
        sys.exit(f"only {len(pairs)} of {rows} rows could be compared")
    return sum(ours_ids == theirs_ids for ours_ids, theirs_ids in pairs) / len(pairs)


if __name__ == "__main__":
    main()
