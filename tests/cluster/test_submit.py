"""cluster/submit.py before anything is sent: what goes along, how much that may be, and what is asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cluster import submit
from lib.errors import ConfigError, ResourceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("jobs/mine.py", ".venv/lib.so", ".whorl/data.bin", "data/rows.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * 1000)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in submit.shipped(folder)}


def test_what_git_would_take_goes_along(folder: Path) -> None:
    assert names(folder) == {"jobs/mine.py", "data/rows.csv"}, "without git, all but what is never code"
    (folder / ".gitignore").write_text(".venv\n.whorl\ndata/\n")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    assert names(folder) == {"jobs/mine.py", ".gitignore"}


def test_too_much_is_told_with_the_largest_files(folder: Path) -> None:
    (folder / "data/large.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(ConfigError) as refused:
        submit.check_size(folder, 2**20)
    assert str(refused.value).startswith(
        "the working tree has 3 MB to be sent, 1 at most: data/large.bin (3 MB)"
    )
    assert ".gitignore" in str(refused.value)
    assert submit.check_size(folder) == 3 * 2**20 + 2000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["jobs.finetune", "--config", "a b.yaml"], "python -m jobs.finetune --config 'a b.yaml'"),
        (["python", "x.py"], "python x.py"),
    ],
)
def test_a_job_is_named_by_its_module(words: list[str], expected: str) -> None:
    assert submit.entrypoint(words) == expected


@pytest.mark.parametrize(
    ("words", "said"), [([], "nothing to run"), (["jobs.finetun"], "there is no jobs.finetun")]
)
def test_what_cannot_run_is_refused_before_it_is_sent(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        submit.run("http://127.0.0.1:9", words)


def test_where_nothing_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "running_cluster", dict)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="no cluster: name one"):
        submit.connected(None)
    with pytest.raises(ConfigError, match="the dashboard's URL is wanted"):
        submit.connected("10.0.0.1:6379")
    with pytest.raises(ResourceError, match=r"http://127\.0\.0\.1:9 takes no jobs"):
        submit.connected("http://127.0.0.1:9")
