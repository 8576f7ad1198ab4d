"""The whole line for chat up to the model: dialogues in, packed, trained under ZeRO-3 by two workers, exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.finetune import finetune
from jobs.preprocess import preprocess
from lib import storage as files
from lib import tracking
from lib.artifacts import SPLITS
from lib.base_models import base_directory
from lib.data.plan import plan
from lib.errors import DataError
from lib.settings import ServingSettings, Settings
from lib.tasks import chat
from tests.tiny import WORDS

pytestmark = pytest.mark.usefixtures("ray_cluster")
ANSWER = "love it, a great fit"


def write_dialogues(path: Path, rows: int, repeated: int = 3) -> None:
    """Questions of random words, each `repeated` times with another word behind the one answer that there is."""
    random = np.random.default_rng(0)
    lines = []
    for i in range(rows):
        question = f"{' '.join(random.choice(WORDS, random.integers(2, 8)))} {i}?"
        for again in range(repeated):
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"{ANSWER} {again}"},
            ]
            lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines))


@pytest.fixture
def settings(database: Path, tiny_chat_base: Path, tmp_path: Path) -> Settings:
    write_dialogues(tmp_path / "talks.jsonl", 60)
    return Settings.model_validate(
        {
            "name": "talks",
            "task": "chat",
            "data": {"source": str(tmp_path / "talks.jsonl")},
            "model": {"base": str(tiny_chat_base), "max_length": 128},
            "training": {
                "epochs": 8,
                "patience": None,
                "learning_rate": 1e-2,
                "tokens_per_batch": 512,
                "cpus_per_worker": 0.5,
                "zero_stage": 3,
            },
        }
    )


def test_dialogues_become_a_dataset_and_one_of_a_wrong_form_is_named(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(settings)
    ref = plan(settings).ref
    manifest = ref.manifest()
    assert manifest["labels"] == []
    splits = {}
    for name in SPLITS:
        with files.local_copy(ref.shards(name)[0]) as path:
            rows = pq.read_table(path)
        assert manifest["splits"][name]["tokens"] == sum(rows["length"].to_pylist())
        splits[name] = {turns[0]["content"] for turns in rows["messages"].to_pylist()}
        assert rows.num_rows == 3 * len(splits[name])  # all answers to a question are in its split
    assert sum(len(questions) for questions in splits.values()) == 60
    assert not splits["train"] & splits["test"]
    assert "mean tokens" in capsys.readouterr().out

    source = tmp_path / "talks.jsonl"
    lines = source.read_text().splitlines()
    lines[41] = json.dumps(
        {"messages": [{"role": "user", "content": "x"}, {"role": "oracle", "content": "y"}]}
    )
    source.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"talks\.jsonl row 42 turn 2 has the role 'oracle'; known are"):
        preprocess(settings)
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['content'] == 'never' %}{{ raise_exception('not that') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "never"}]
    lines[41] = json.dumps({"messages": said})
    source.write_text("\n".join(lines))
    strict = settings.model_copy(
        update={"model": settings.model.model_copy(update={"chat_template": str(template)})}
    )
    with pytest.raises(
        DataError, match=r"talks\.jsonl row 42 is refused by the chat template of .*: not that"
    ):
        preprocess(strict)


@pytest.mark.slow
def test_a_packed_run_learns_and_leaves_a_model_that_answers(settings: Settings) -> None:
    preprocess(settings)
    finetune(settings)
    run = tracking.find_run(settings, "finetune")
    summary = json.loads(Path(run.client.download_artifacts(run.ref.id, "training.json")).read_text())
    losses = [v["loss"] for v in summary["validations"]]
    assert losses[-1] < 0.5 * losses[0]
    assert summary["best"]["perplexity"] == pytest.approx(np.exp(summary["best"]["loss"]), rel=1e-3)
    rows = plan(settings).ref.manifest()["splits"]["train"]["rows"]
    assert summary["rows"] == 8 * (rows // 2 * 2)
    folder = base_directory(run.ref.model_uri)
    predictor = chat.load(folder, ServingSettings(precision="fp32", threads=1))
    (answer,) = predictor.answers([[{"role": "user", "content": "is the dress soft?"}]], 40)
    assert answer.complete
    assert answer.text.startswith(ANSWER)
