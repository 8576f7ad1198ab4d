"""What a checkpoint holds besides the engine: state, counters, random numbers, and Ray's record of the whole ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import storage as files
from lib.errors import StorageError, unwrap
from lib.training import checkpoints
from lib.training.checkpoints import Own, Position, State


def test_state_and_counters_come_back_as_they_were(tmp_path: Path) -> None:
    state = State(
        2,
        Position(1, 512, 3, 640, (520, 530)),
        41,
        1012.5,
        3.25,
        1,
        {"macro_f1": 0.1 + 0.2},
        [{"loss": 1 / 3}],
    )
    state.write(tmp_path)
    assert State.read(files.uri(tmp_path)) == state
    own = Own(500, 9000, [(1 / 3, 8.0)], checkpoints.random_state(), [520, 521])
    own.write(tmp_path, 1)
    assert Own.read(files.uri(tmp_path), 1) == own


def test_a_checkpoint_of_another_format_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop.json").write_text('{"format": 99}')
    with pytest.raises(StorageError, match="not of format 1"):
        State.read(files.uri(tmp_path))


def draw() -> list[float]:
    return [float(torch.rand(1)), float(np.random.normal()), random.gauss(0, 1), random.random()]


def test_random_numbers_go_on_where_they_were() -> None:
    draw()  # leaves NumPy and Python with half of a pair of normal numbers
    state = json.loads(json.dumps(checkpoints.random_state()))
    expected = [draw(), draw()]
    checkpoints.set_random_state(state)
    assert [draw(), draw()] == expected


def test_counters_of_another_number_of_workers_keep_their_sums(tmp_path: Path) -> None:
    parts = [Own(30, 300, [(2.0, 8.0), (1.0, 9.0)], {"torch": "00"}), Own(31, 310, [(3.0, 8.0), (4.0, 9.0)])]
    for rank, own in enumerate(parts):
        own.write(tmp_path, rank)
    folder = files.uri(tmp_path)
    assert [Own.share(folder, rank, 2, 2) for rank in range(2)] == parts
    assert Own.share(folder, 0, 1, 2) == Own(61, 610, [(5.0, 8.0), (5.0, 9.0)])
    assert Own.share(folder, 2, 3, 2) == Own()


def test_another_number_of_workers_begins_with_the_rows_that_were_left(tmp_path: Path) -> None:
    Own(left=[514, 519]).write(tmp_path, 0)
    Own(left=[570]).write(tmp_path, 1)
    folder = files.uri(tmp_path)
    state = State(2, Position(1, 512, 3, 640))
    assert state.position_for(2, folder) == state.position
    assert state.position_for(3, folder) == Position(1, 512, 0, 640, (514, 519, 570))
    between = State(2, Position(1, 640))
    assert between.position_for(3, folder) == between.position


def record(folder: Path, names: list[str], latest: str) -> str:
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {}} for name in names]
    text = json.dumps(
        {"checkpoint_results": results, "latest_checkpoint_result": {"checkpoint_dir_name": latest}}
    )
    (folder / checkpoints.RECORD).write_text(text)
    return text


def test_only_whole_checkpoints_are_gone_on_with(tmp_path: Path) -> None:
    folder = files.uri(tmp_path)
    assert checkpoints.committed(folder) == []
    assert checkpoints.latest_state(folder) is None
    for step in (10, 20, 30):
        (tmp_path / checkpoints.name_of(step)).mkdir()
        State(2, step=step).write(tmp_path / checkpoints.name_of(step))
    record(tmp_path, ["step_000020", "step_000010"], "step_000020")  # the best is the last of the list
    assert checkpoints.committed(folder) == ["step_000010", "step_000020"]
    assert checkpoints.latest_state(folder).step == 20
    checkpoints.remove_uncommitted(folder)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000010", "step_000020"]


@pytest.mark.parametrize("left", ["", '{"checkpoint_results": [{"check'])
def test_a_record_that_was_cut_off_is_mended(tmp_path: Path, left: str) -> None:
    folder = files.uri(tmp_path)
    checkpoints.mend_record(folder)  # nothing there: a new run
    whole = record(tmp_path, ["step_000010"], "step_000010")
    checkpoints.Keeper(folder).after_report(None, [], checkpoint=object())
    checkpoints.mend_record(folder)
    assert (tmp_path / checkpoints.RECORD).read_text() == whole
    (tmp_path / checkpoints.RECORD).write_text(left)
    checkpoints.mend_record(folder)
    assert checkpoints.committed(folder) == ["step_000010"]
    # Without a copy it was the first record: nothing is whole, and the run begins anew.
    (tmp_path / checkpoints.RECORD).write_text(left)
    (tmp_path / checkpoints.RECORD_COPY).unlink()
    checkpoints.mend_record(folder)
    assert checkpoints.committed(folder) == []


def test_what_a_user_can_mend_is_not_tried_again() -> None:
    keeper = checkpoints.Keeper("file:///nowhere")
    keeper.after_exception(None, {0: RuntimeError("connection closed by peer")})
    with pytest.raises(StorageError, match="no space"):
        keeper.after_exception(None, {0: RuntimeError("peer"), 1: checkpoints.no_space("/data/abc")})


def test_the_one_line_is_found_in_what_ray_train_raises() -> None:
    from ray.train.v2.api.exceptions import ControllerError

    line = checkpoints.no_space("/data/abc")
    assert unwrap(ControllerError(line)) is line
    assert str(line).endswith("go on with --training.resume abc")
