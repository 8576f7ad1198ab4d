"""Which layouts there are, which fit, which is the cheapest; and what this machine refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib.errors import ConfigError, ResourceError
from lib.planner import check, hardware, layouts, tables
from lib.planner.layouts import Judged
from lib.settings import Settings
from tests.trained import use

HOST = 1024 * 2**30


def settings(base: Path, training: dict[str, Any] | None = None, **plan: Any) -> Settings:
    values = use(base).model_dump()
    values["plan"] = {"architecture": "llama-7b", "accelerator": "h100", "tokens": 10**9, **plan}
    values["training"] |= {"epochs": 1} | (training or {})
    return Settings.model_validate(values)


def judged(base: Path, **plan: Any) -> Judged:
    tokens = plan.pop("tokens", 10**9)
    return layouts.report(settings(base, **plan), tokens).judged[0]


def test_every_layout_that_deepspeed_has(tiny_base: Path) -> None:
    found = judged(tiny_base, workers=[8, 1]).candidates
    assert [(c.layout.workers, c.layout.zero_stage, c.layout.offload) for c in found] == [
        (workers, stage, offload)
        for workers in (1, 8)
        for stage, offload in [
            (0, "none"),
            (1, "none"),
            (1, "optimizer"),
            (2, "none"),
            (2, "optimizer"),
            (3, "none"),
            (3, "optimizer"),
            (3, "all"),
        ]
    ]
    assert all(c.recomputed.device <= c.plain.device for c in found)


def test_without_a_gpu_there_is_nowhere_to_offload_from(tiny_base: Path) -> None:
    found = judged(tiny_base, accelerator="this", workers=2).candidates
    assert [(c.layout.zero_stage, c.layout.offload, c.layout.gpu) for c in found] == [
        (stage, "none", False) for stage in range(4)
    ]


def test_what_is_estimated_fits_and_the_rest_does_not(tiny_base: Path) -> None:
    found = judged(tiny_base, workers=[1, 8], zero_init=True)
    fitting = {e.layout for e in found.estimates}
    for candidate in found.candidates:
        best = [
            m for m in (candidate.plain, candidate.recomputed) if layouts.fits(m, found.accelerator, HOST)
        ]
        assert (best[0].layout in fitting) if best else (candidate.layout not in fitting)
    assert 0 < len(fitting) < len(found.candidates)
    for estimate in found.estimates:
        assert estimate.memory.device <= 0.92 * 79.1 * 2**30


def test_recommended_is_the_cheapest(tiny_base: Path) -> None:
    found = judged(tiny_base, workers=[1, 4, 8], price={"h100": 2.0})
    best = found.recommended
    assert best
    assert best.run
    assert best.run.cost is not None
    costs = [e.run.cost for e in found.estimates if e.run and e.run.cost is not None]
    assert best.run.cost == min(costs)
    assert found.reason.startswith(f"cheapest of {len(costs)} layouts that fit")


def test_of_equals_the_simplest_is_recommended(tiny_base: Path) -> None:
    best = judged(tiny_base, architecture="smollm2-135m", workers=1).recommended
    assert best
    assert (best.layout.zero_stage, best.layout.offload, best.layout.checkpointing) == (0, "none", False)


def test_a_time_limit_costs_more(tiny_base: Path) -> None:
    few: dict[str, Any] = {"architecture": "smollm2-135m", "accelerator": "t4", "workers": [1, 8]}
    free = judged(tiny_base, **few).recommended
    assert free
    assert free.run
    hours = free.run.seconds / 3600
    hurried = judged(tiny_base, **few, max_hours=hours / 2).recommended
    assert hurried
    assert hurried.run
    assert hurried.run.seconds <= free.run.seconds / 2
    assert hurried.run.gpu_hours > free.run.gpu_hours
    never = judged(tiny_base, **few, max_hours=hours / 1000)
    assert never.recommended is None
    assert "ends within" in never.reason


def test_what_never_fits_says_by_how_much(tiny_base: Path) -> None:
    small = judged(tiny_base, accelerator="t4", workers=8, architecture="llama-405b", offload="none")
    assert small.recommended is None
    assert "on a GPU of 13.4 that are usable" in small.reason
    host = judged(tiny_base, architecture="llama-405b", workers=8, host_memory_gib=100)
    assert "of the host's 92.0 that are usable" in host.reason
    here = judged(tiny_base, accelerator="this", architecture="llama-405b", workers=1)
    assert here.reason.startswith("none fits: the smallest takes")
    nothing = judged(tiny_base, zero_stage=0, offload="all")
    assert nothing.reason == "no layout of plan.zero_stage and plan.offload is one that DeepSpeed has"


def test_steps_end_with_max_steps(tiny_base: Path) -> None:
    wanted = settings(tiny_base, {"max_steps": 7}, architecture="smollm2-135m")
    runs = [e.run for e in layouts.report(wanted, 10**12).judged[0].estimates]
    assert all(run and run.steps == 7 for run in runs)


def test_the_base_model_is_the_shape_unless_one_is_named(tiny_base: Path) -> None:
    shape = layouts.shape(settings(tiny_base, architecture=None))
    assert (shape.width, shape.vocabulary_head) == (32, False)
    assert layouts.shape(settings(tiny_base, architecture=None, head="vocabulary")).vocabulary_head
    assert layouts.shape(settings(tiny_base)).vocabulary_head
    assert not layouts.shape(settings(tiny_base, head="classes")).vocabulary_head


def test_a_sequence_above_the_budget_is_a_batch_of_its_own(tiny_base: Path) -> None:
    wanted = settings(tiny_base, {"tokens_per_batch": 16})
    assert layouts.layout(layouts.shape(wanted), wanted, gpu=True).tokens == 32


def test_a_price_of_nothing_that_is_asked_for(tiny_base: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"plan.price: 'h200' is not among plan.accelerator; did you mean 'h100'\?"
    ):
        judged(tiny_base, price={"h200": 1})


def test_tables_line_up(tiny_base: Path) -> None:
    both = ["h100", "this"]
    wanted = settings(
        tiny_base, architecture="smollm2-135m", accelerator=both, workers=1, price={"h100": 2.0}
    )
    text = tables.render(layouts.report(wanted, 10**9))
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(row) for row in rows}) <= 1
        assert len({row.count("|") for row in rows}) <= 1
    assert "Times on this: not known" in text
    assert "training tokens: 1,000,000,000 in an epoch" in text


def machine(gib: float) -> hardware.Accelerator:
    return hardware.Accelerator("this", gib * 2**30, 0, 0, 0, 0, gpu=False)


def test_what_fits_is_not_refused(tiny_base: Path) -> None:
    used = check.check(settings(tiny_base, {"workers": 2}, architecture=None), machine(8))
    assert used.layout.workers == 2
    assert used.host < 8 * 2**30


@pytest.mark.parametrize(
    ("training", "gib"),
    [
        ({"workers": 4}, 3),
        ({"tokens_per_batch": 10_000_000}, 8),
        ({"workers": 2, "tokens_per_batch": 10_000_000}, 2),
    ],
)
def test_a_refusal_is_one_line_and_its_mends_are_true(
    tiny_base: Path, training: dict[str, int], gib: float
) -> None:
    wanted = settings(tiny_base, training, architecture=None)
    with pytest.raises(ResourceError) as caught:
        check.check(wanted, machine(gib))
    line = str(caught.value)
    assert "\n" not in line
    assert f"of {gib:.1f} GiB" in line
    assert "training.ignore_plan true" in line
    if " would fit" not in line:
        assert "take a smaller base model" in line
        return
    mends = line.partition("; ")[2].partition(" would fit")[0].split(" or ")
    for mend in mends:
        key, value = mend.removeprefix("training.").split()
        changed = training | {key: True if value == "true" else int(value)}
        check.check(settings(tiny_base, changed, architecture=None), machine(gib))


def test_a_model_that_cannot_even_be_loaded(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.planner.architecture import named

    monkeypatch.setattr(layouts, "base_shape", lambda _: named("llama-7b"))
    with pytest.raises(ResourceError, match=r"each builds the whole model in fp32: \d+\.\d\)"):
        check.check(
            settings(tiny_base, {"zero_stage": 3, "zero_init": False, "workers": 16, "tokens_per_batch": 32}),
            machine(300),
        )
    # Divided while it is read, as it is unless one says otherwise.
    check.check(settings(tiny_base, {"zero_stage": 3, "workers": 16, "tokens_per_batch": 32}), machine(300))


def shares(base: Path, **training: Any) -> float:
    wanted = settings(base, training, architecture=None)
    return layouts.layout(layouts.shape(wanted), wanted, gpu=False).trainable


def test_what_is_trained_follows_the_training_keys(tiny_base: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_base)
    total = model.num_parameters()
    assert shares(tiny_base) == 1.0
    # Width 32, inner 64: each layer has four maps 32 → 32 and one each way between 32 and 64.
    low_rank = 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64))
    lora = {"rank": 4}
    assert shares(tiny_base, adapter=lora) == pytest.approx(low_rank / total)
    some = {"rank": 4, "targets": ["query", "value"]}
    assert shares(tiny_base, adapter=some) == pytest.approx(2 * 4 * 2 * (32 + 32) / total)
    with_magnitudes = low_rank + 2 * (4 * 32 + 64 + 32)
    assert shares(tiny_base, adapter=lora | {"kind": "dora"}) == pytest.approx(with_magnitudes / total)
    last = sum(p.numel() for p in model.encoder.layer[-1].parameters())
    pooler = sum(p.numel() for p in model.pooler.parameters())
    assert shares(tiny_base, layers=1) == pytest.approx((last + pooler) / total)


def test_a_named_architecture_is_trained_by_its_widths(tiny_base: Path) -> None:
    wanted = settings(tiny_base, {"adapter": {"rank": 8}}, architecture="llama-7b")
    model = layouts.shape(wanted)
    h, inner = 4096, 11_008
    low_rank = 32 * 8 * (4 * 2 * h + 3 * (h + inner))
    assert layouts.layout(model, wanted, gpu=True).trainable == pytest.approx(low_rank / model.parameters)
    last = settings(tiny_base, {"layers": 4}, architecture="llama-7b")
    share = layouts.layout(model, last, gpu=True).trainable
    assert 4 / 32 < share < 4 / 32 + 0.03


def test_training_keys_reach_the_layout(tiny_base: Path) -> None:
    training = {"zero_stage": 3, "offload": "all", "gradient_checkpointing": True, "zero_init": False}
    wanted = settings(tiny_base, training, architecture=None)
    found = layouts.layout(layouts.shape(wanted), wanted, gpu=True)
    assert (found.offload, found.checkpointing, found.zero_init) == ("all", True, False)
    plain = settings(tiny_base, architecture=None)
    assert layouts.layout(layouts.shape(plain), plain, gpu=True).zero_init
