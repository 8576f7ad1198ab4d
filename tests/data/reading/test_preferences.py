"""The made preferences: balanced, split without leaks, the same on every machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lib import storage as files
from lib.artifacts import SPLITS
from lib.data.plan import plan
from lib.data.reading import preferences
from lib.errors import ConfigError
from lib.settings import load_settings

PAIRS = {f"question {i}?": f"answer {i}" for i in range(100)}


def test_every_answer_is_chosen_as_often_as_rejected_and_stays_in_its_split():
    rows = {split: preferences.preferences(PAIRS, split) for split in SPLITS}
    assert {split: len(found) for split, found in rows.items()} == {
        "train": 160,
        "validation": 20,
        "test": 20,
    }
    answers = {}
    for split, found in rows.items():
        chosen, rejected = (Counter(row[side] for row in found) for side in ("chosen", "rejected"))
        assert chosen == rejected
        assert set(chosen.values()) == {2}
        assert all(PAIRS[row["prompt"]] == row["chosen"] != row["rejected"] for row in found)
        assert len({tuple(row.values()) for row in found}) == len(found)
        answers[split] = set(chosen)
    assert not answers["train"] & answers["test"]
    assert not answers["validation"] & answers["test"]
    shuffled = dict(sorted(PAIRS.items(), reverse=True))
    assert preferences.preferences(shuffled, "test") == rows["test"]


def test_the_shipped_configuration_reads_it(storage: Path, tiny_chat_base: Path):
    words = ["--model.base", str(tiny_chat_base)]
    planned = plan(load_settings("jobs/configs/support_preference.yaml", words))
    assert [file.name for file in planned.reading.files] == [
        f"sample://support-preferences-{split}" for split in SPLITS
    ]
    assert set(planned.reading.columns) == {"prompt", "chosen", "rejected"}
    written = storage / "samples" / "support-preferences-train.jsonl"
    before = written.stat().st_mtime_ns
    uri = preferences.made("sample://support-preferences-train")
    assert uri.endswith("support-preferences-train.jsonl")
    assert written.stat().st_mtime_ns == before  # the same content is not written again
    assert len(written.read_text().splitlines()) > 500
    assert files.exists(uri)
    with pytest.raises(ConfigError, match="did you mean 'support-preferences-train'"):
        preferences.made("sample://support-preferences-trains")
