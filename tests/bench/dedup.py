"""Near duplicates found, against exact Jaccard of all pairs, beside datasketch's MinHashLSH.

    make bench-dedup        (python -m tests.bench.dedup [--rows 30000 --threshold 0.8])

The set is made: reviews of the sample and sentences of ChatterBot's Chinese corpus, put together to texts of several
lengths, and of two in five of them one to four copies in which up to 30 of 100 words or characters are changed, left out,
put in or swapped. Truth is the Jaccard similarity of the shingles themselves, runs of two words (or Chinese characters), of
all pairs that could be at the threshold; the rival gets the same shingles. Measured are pairs (of those found, the share that is at the threshold; of those at the
threshold, the share that is found), which pairs the clusters put together, and, through Ray, what a build of the same
rows drops.

Ours finds the candidates by its bands and compares sketches; the rival is asked for each text once and inserted after
that, and what it answers is the result (128 permutations, its default). Both run alone in a process of their own, one after the other, on one core.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from lib import storage
from lib.data.alike import near
from lib.data.clean import words
from lib.samples import sample_path
from lib.settings import NearSettings
from lib.text import normalise
from tests.bench.preprocess import OUR_PROGRAM, measure
from tests.bench.report import Report

MIB = 1 << 20
RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)

OURS = """
import json, resource, sys, time
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lib.data.alike import clusters, near
from lib.settings import NearSettings

texts = pq.read_table(sys.argv[1])["text"].to_pylist()
wanted = NearSettings(threshold=float(sys.argv[2]))
near.band_keys(["warm"], wanted)
start = time.perf_counter()
keys, _ = near.band_keys(texts, wanted)
pairs = near.candidates(keys.ravel(), np.repeat(np.arange(len(texts)), keys.shape[1]))
rows = np.unique(np.concatenate([pairs["a"].to_numpy(), pairs["b"].to_numpy()]))
sketches = near.sketches([texts[row] for row in rows], wanted)
sides = [sketches.take(pa.array(np.searchsorted(rows, pairs[side].to_numpy()))) for side in ("a", "b")]
alike = near.similarities(*sides) >= wanted.threshold
links = pairs.filter(pa.array(alike))
members = clusters.components(links)
seconds = time.perf_counter() - start
pq.write_table(links, sys.argv[3])
print(json.dumps({"seconds": seconds, "candidates": pairs.num_rows}))
"""

THEIRS = """
import json, sys, time
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasketch import MinHash, MinHashLSH

rows = pq.read_table(sys.argv[1])["shingles"]
threshold, permutations = float(sys.argv[2]), 128
start = time.perf_counter()
lsh = MinHashLSH(threshold=threshold, num_perm=permutations)
empty = MinHash(num_perm=permutations, seed=1, scheme="affine32")
a, b = [], []
for row, shingles in enumerate(rows):
    sketch = empty.copy()
    sketch.update_batch([shingle.encode() for shingle in shingles.as_py()])
    for other in lsh.query(sketch):
        a.append(other)
        b.append(row)
    lsh.insert(row, sketch)
seconds = time.perf_counter() - start
pq.write_table(pa.table({"a": pa.array(a, pa.int64()), "b": pa.array(b, pa.int64())}), sys.argv[3])
print(json.dumps({"seconds": seconds}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--threshold", type=float, default=0.8)
    given = parser.parse_args()
    wanted = NearSettings(threshold=given.threshold)
    texts = planted(given.rows)
    report = Report("dedup")
    with tempfile.TemporaryDirectory(prefix="whorl-bench-") as scratch:
        folder = Path(scratch)
        sets = [shingles(text) for text in texts]
        source, hashed = folder / "texts.parquet", folder / "shingles.parquet"
        numbers = list(range(len(texts)))
        pq.write_table(pa.table({"text": texts, "label": [str(n % 2) for n in numbers]}), source)
        pq.write_table(pa.table({"shingles": [list(one) for one in sets]}), hashed)
        truth = similar(sets, given.threshold)
        del sets
        print(
            f"{len(texts):,} texts, {len(truth):,} pairs of {given.threshold:g} or more; {near.Bands.of(given.threshold)}"
        )
        found = {"ours": run(OURS, source, given.threshold, folder / "ours.parquet")}
        if find_spec("datasketch") is None:
            print("datasketch is not installed: pip install datasketch; ours alone is measured")
        else:
            found["theirs"] = run(THEIRS, hashed, given.threshold, folder / "theirs.parquet")
        compare(report, found, truth, len(texts))
        through_ray(report, source, folder, truth, len(texts), wanted)
    report.finish()


def compare(report: Report, found: dict[str, Any], truth: set[tuple[int, int]], rows: int) -> None:
    """Pairs, clusters, speed and memory of both."""
    scores = {side: scored(each["links"], truth, rows) for side, each in found.items()}
    rival = "MinHashLSH" if "theirs" in found else ""
    for name in ("pairs: precision", "pairs: recall", "clusters: precision", "clusters: recall"):
        report.row(name, scores["ours"][name], unit="of 1", target=0.95)
        if rival:
            report.row(name, scores["ours"][name], unit="of 1", rival=rival, theirs=scores["theirs"][name])
    speeds = {side: rows / each["seconds"] for side, each in found.items()}
    report.row(
        "speed",
        speeds["ours"],
        unit="rows/s",
        rival=rival,
        theirs=speeds.get("theirs"),
        target=1.0 if rival else None,
    )
    peaks = {side: each["process"] / MIB for side, each in found.items()}
    report.row(
        "peak memory",
        peaks["ours"],
        unit="MiB",
        rival=rival,
        theirs=peaks.get("theirs"),
        higher_is_better=False,
    )


def scored(links: set[tuple[int, int]], truth: set[tuple[int, int]], rows: int) -> dict[str, float]:
    """Of the links, and of all pairs that clusters put together: precision and recall."""
    homes, true_homes = joined(links, rows), joined(truth, rows)
    together, true_together = same(homes), same(true_homes)
    return {
        "pairs: precision": len(links & truth) / max(len(links), 1),
        "clusters: precision": len(together & true_together) / max(len(together), 1),
        "clusters: recall": len(together & true_together) / max(len(true_together), 1),
        "pairs: recall": len(together & truth) / max(len(truth), 1),
    }


def joined(links: set[tuple[int, int]], rows: int) -> np.ndarray:
    """The first row of the cluster of each, by another way than ours."""
    parent = list(range(rows))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for a, b in links:
        first, second = sorted((root(a), root(b)))
        parent[second] = first
    return np.array([root(row) for row in range(rows)])


def same(homes: np.ndarray) -> set[tuple[int, int]]:
    members: dict[int, list[int]] = defaultdict(list)
    for row, home in enumerate(homes.tolist()):
        members[home].append(row)
    return {(a, b) for group in members.values() for place, a in enumerate(group) for b in group[place + 1 :]}


def through_ray(
    report: Report, source: Path, folder: Path, truth: set[tuple[int, int]], rows: int, wanted: NearSettings
) -> None:
    """A whole build of these rows: how many it leaves, beside how many clusters there are in truth."""
    config = folder / "bench.yaml"
    values = {
        "name": "bench",
        "task": "sentiment",
        "data": {
            "source": str(source),
            "labels": ["0", "1"],
            "near": {"duplicates": "drop", "threshold": wanted.threshold},
        },
        "model": {"base": "sample://minilm-l6", "max_length": 128},
    }
    config.write_text(yaml.safe_dump(values))
    environment = {**os.environ, "WHORL_STORAGE": str(folder / "storage"), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    measured = measure([sys.executable, "-c", OUR_PROGRAM, str(config)], environment)
    kept = sum(count["rows"] for count in measured["manifest"]["splits"].values())
    clusters = len(set(joined(truth, rows).tolist()))
    report.row("build: rows that stay", kept, unit="rows", rival="clusters in truth", theirs=clusters)
    report.row(
        "build: largest process", measured["process"] / MIB, unit="MiB", target=2048, higher_is_better=False
    )


def run(program: str, source: Path, threshold: float, out: Path) -> dict[str, Any]:
    words = [sys.executable, "-c", program, str(source), str(threshold), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(storage.PROJECT), "OMP_NUM_THREADS": "1"}
    measured = measure(words, environment)
    links = pq.read_table(out)
    pairs = zip(links["a"].to_pylist(), links["b"].to_pylist(), strict=True)
    return {**measured, "links": {(min(pair), max(pair)) for pair in pairs}}


def planted(rows: int) -> list[str]:
    """Texts in English and Chinese, many of them edited copies of others, in an order of chance."""
    rng = random.Random(0)
    english, chinese = reviews(), sentences()
    # So many more words and characters than the texts have themselves, so that none is like another by chance.
    vocabulary = sorted({word for text in english[:2000] for word in text.split()})
    signs = sorted({sign for text in chinese for sign in text if sign > "\u3000"})
    texts: list[str] = []
    for number in itertools.count():
        if len(texts) > 1.3 * rows:  # some are exact duplicates
            break
        if number % 3:
            units, join, others = english[number % len(english)].split(), " ", vocabulary
            units = units[: rng.randint(8, 100)]
        else:
            units = list("".join(rng.sample(chinese, rng.randint(1, 5))))
            join, others = "", signs
        texts.append(join.join(units))
        if rng.random() < 0.4:
            texts += [join.join(edited(units, others, rng)) for _ in range(rng.randint(1, 4))]
    # Exact duplicates go before: the rest is what near duplicates are looked for in.
    found = [text for text in dict.fromkeys(normalise(pa.array(texts)).to_pylist()) if text][:rows]
    rng.shuffle(found)
    return found


def edited(units: list[str], others: list[str], rng: random.Random) -> list[str]:
    rate = rng.choice(RATES)
    changed: list[str] = []
    for unit in units:
        if rng.random() >= rate:
            changed.append(unit)
            continue
        kind = rng.randrange(4)
        if kind == 0:
            changed.append(rng.choice(others))
        elif kind == 1:
            changed += [unit, rng.choice(others)]
        elif kind == 2 and changed:
            changed.insert(-1, unit)
    return changed


def reviews() -> list[str]:
    table = pq.read_table(sample_path("sample://reviews", "data"), columns=["Review Text"])
    return [text for text in dict.fromkeys(table["Review Text"].to_pylist()) if text]


def sentences() -> list[str]:
    folder = sample_path("sample://small-talk", "data").parent.parent / "chinese"
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    found: dict[str, None] = {}
    for file in sorted(folder.glob("*.yml")):
        for said in yaml.load(file.read_bytes(), loader)["conversations"]:
            found |= dict.fromkeys(text for text in said if isinstance(text, str) and len(text) > 6)
    return list(found)


def shingles(text: str) -> set[str]:
    """The set that both are asked about, by another way than ours."""
    units = words(unicodedata.normalize("NFKC", text).casefold())
    size = min(NearSettings().size, len(units))
    return {" ".join(units[place : place + size]) for place in range(len(units) - size + 1)}


def similar(sets: list[set[str]], threshold: float) -> set[tuple[int, int]]:
    """All pairs at the threshold, exactly. Two sets that are have one of their rarest shingles in common, of which
    |A| - ceil(t |A|) + 1 are enough to look at (Chaudhuri, Ganti and Kaushik 2006: prefix filtering)."""
    frequency: dict[str, int] = defaultdict(int)
    for one in sets:
        for shingle in one:
            frequency[shingle] += 1
    known: dict[str, list[int]] = defaultdict(list)
    pairs = set()
    for row, one in enumerate(sets):
        rarest = sorted(one, key=lambda shingle: (frequency[shingle], shingle))
        prefix = rarest[: len(one) - int(np.ceil(threshold * len(one) - 1e-9)) + 1]
        for other in set(_known(known, prefix)):
            common = len(one & sets[other])
            if common / (len(one) + len(sets[other]) - common) >= threshold:
                pairs.add((other, row))
        for shingle in prefix:
            known[shingle].append(row)
    return pairs


def _known(known: dict[str, list[int]], prefix: list[str]) -> Iterator[int]:
    for shingle in prefix:
        yield from known[shingle]


if __name__ == "__main__":
    main()
