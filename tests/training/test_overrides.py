"""A user's own DeepSpeed configuration over ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lib.errors import ConfigError, StorageError
from lib.settings import TrainingSettings
from lib.training import overrides, zero
from tests.trained import use


def merged(theirs: dict[str, Any], **training: Any) -> dict[str, Any]:
    values = {"precision": "fp32", "zero_stage": 3, "deepspeed": theirs}
    return zero.config(TrainingSettings.model_validate(values | training), 1000)


def test_what_nobody_else_decides_is_laid_over_ours() -> None:
    found = merged(
        {
            "zero_optimization": {"stage3_prefetch_bucket_size": 7, "offload_optimizer": {"buffer_count": 9}},
            "wall_clock_breakdown": True,
            "fp16": {"initial_scale_power": 12},
        },
        offload="optimizer",
    )
    section = found["zero_optimization"]
    assert section["stage3_prefetch_bucket_size"] == 7
    assert section["reduce_bucket_size"] == 1024
    assert section["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "buffer_count": 9}
    assert found["fp16"] == {"enabled": False, "initial_scale_power": 12}
    assert found["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage 2 contradicts training.zero_stage 3"),
        ({"bf16": {"enabled": True}}, "bf16.enabled True contradicts training.precision fp32"),
        ({"gradient_clipping": 5.0}, "gradient_clipping 5.0 contradicts training.clip 1.0"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu 8 contradicts training.tokens_per_batch 2048",
        ),
        ({"gradient_accumulation_steps": 4}, "contradicts training.accumulation 1"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "optimizer.type AdamW contradicts training.learning_rate",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "contradicts training.schedule linear"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param.device cpu contradicts training.offload none",
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "contradicts training.gradient_checkpointing",
        ),
    ],
)
def test_a_contradiction_names_both_keys(theirs: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merged(theirs)
    assert line in str(caught.value)
    assert "leave it out of training.deepspeed" in str(caught.value)


def test_the_same_said_twice_is_no_contradiction() -> None:
    said = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": 2,
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": "auto",
    }
    assert merged(said, accumulation=2) == merged({}, accumulation=2)


def test_a_file_is_read_once_and_checked_before_anything_starts(tmp_path: Path, tiny_base: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"sub_group_size": 1000}}))

    def given(value: Any) -> Any:
        base = use(tiny_base)
        return base.model_copy(update={"training": TrainingSettings(precision="fp32", deepspeed=value)})

    resolved = overrides.resolve(given(str(file)))
    assert resolved.training.deepspeed == {"zero_optimization": {"sub_group_size": 1000}}
    assert overrides.resolve(resolved) == resolved
    with pytest.raises(
        ConfigError, match=r"zero_optimization.sub_groupsize: .*did you mean 'sub_group_size'"
    ):
        overrides.resolve(given({"zero_optimization": {"sub_groupsize": 3}}))
    with pytest.raises(
        ConfigError, match=r"wall_clock_breakdwn is no key of DeepSpeed's.*mean 'wall_clock_breakdown'"
    ):
        overrides.resolve(given({"wall_clock_breakdwn": True}))
    known = {"wall_clock_breakdown": True, "communication_data_type": "fp32", "scheduler": "auto"}
    assert overrides.resolve(given(known)).training.deepspeed == known
    with pytest.raises(StorageError, match=r"absent\.json"):
        overrides.resolve(given(str(tmp_path / "absent.json")))
    file.write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        overrides.resolve(given(str(file)))


def test_an_nvme_disk_stands_in_for_the_host() -> None:
    section = merged({}, offload="all", offload_path="/nvme")["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        assert section[part]["device"] == "nvme"
        assert section[part]["nvme_path"].startswith("/nvme/")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"zero_stage": 2, "offload": "all"}, "offload all needs zero_stage 3, not 2"),
        ({"zero_stage": 0, "offload": "optimizer"}, "needs zero_stage 1, 2 or 3"),
        ({"zero_stage": 2, "offload": "optimizer", "offload_path": "/x"}, "offload_path needs zero_stage 3"),
        (
            {"zero_stage": 3, "offload": "all", "offload_path": "/x", "workers": [1, 2]},
            "offload_path needs a fixed number of workers",
        ),
        ({"layers": 2, "adapter": {}}, "adapter and layers exclude each other"),
    ],
)
def test_keys_that_do_not_go_together(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        TrainingSettings.model_validate(values)
