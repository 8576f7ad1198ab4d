"""Bytes by part and phase: against DeepSpeed's own estimators, and against the code whose buffers they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from lib.planner import architecture, memory
from lib.planner.memory import GPU_LIBRARIES, HOST_LIBRARIES, Layout
from lib.settings import TrainingSettings
from lib.training import loop, zero

SEVEN = architecture.named("llama-7b")
NAMES = ("smollm2-135m", "llama-7b", "llama-70b")


def step_states(model: architecture.Architecture, layout: Layout) -> dict[str, int]:
    """What the estimators count, while the optimiser steps: no buckets, no flattened copies."""
    phase = next(p for p in memory.plan(model, layout).phases if p.name == "step")
    return {
        part: phase.device[part]
        for part in ("parameters", "gradients", "master", "moments", "fp32 gradients")
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_zero_2_states_are_those_of_the_estimator(name: str, workers: int) -> None:
    model = architecture.named(name)
    _, theirs = estimate_zero2_model_states_mem_needs(model.parameters, workers, 1, cpu_offload=False)
    ours = sum(step_states(model, Layout(2, workers)).values())
    # They cut fractions off once, we round up each part.
    assert ours == pytest.approx(theirs, abs=32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_offloaded_zero_2_is_that_of_the_estimator(name: str, workers: int) -> None:
    model = architecture.named(name)
    host, device = estimate_zero2_model_states_mem_needs(
        model.parameters, workers, 1, cpu_offload=True, additional_buffer_factor=1
    )
    used = memory.plan(model, Layout(2, workers, offload="optimizer"))
    step = used.phases[-2]
    assert (step.name, step.device["parameters"]) == ("step", device)
    states = sum(step.host[part] for part in ("master", "moments", "fp32 gradients"))
    if workers <= 4:  # above, 4 bytes of each rank's whole model in fp32 are more: their term for loading
        assert workers * states == pytest.approx(host, abs=32 * workers)
    else:
        assert workers * (used.load - HOST_LIBRARIES) == host
    # What they leave to a factor of 1.5 is here: parameters on their way back and accumulated gradients.
    more = step.host["gradients"] + step.host["buffers"] - 2 * model.largest
    assert workers * more == pytest.approx(4 * model.parameters, abs=32 * workers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workers", [8, 64])
def test_zero_3_states_are_those_of_the_estimator(name: str, workers: int) -> None:
    model = architecture.named(name)
    host, device, largest = estimate_zero3_model_states_mem_needs(
        model.parameters,
        model.largest,
        8,
        workers // 8,
        cpu_offload=False,
        zero_init=True,
        additional_buffer_factor=1,
    )
    layout = Layout(3, workers, zero_init=True)
    states = step_states(model, layout)
    # They leave out the 16-bit gradients, for which DeepSpeed 0.19 keeps a buffer of the partition's size. The
    # fp32 gradients of a group of 1e9 exist at a time; they count those of the whole partition.
    own = -(-model.parameters // workers)
    uncounted = 4 * max(0, own - memory.STEP_GROUP)
    assert states["gradients"] == 2 * own
    ours = sum(states.values()) - states["gradients"] + uncounted
    assert ours == pytest.approx(device - largest, abs=32)
    assert 8 * (memory.load(model, layout) - HOST_LIBRARIES) == host


@pytest.mark.parametrize("name", NAMES)
def test_offloaded_zero_3_is_that_of_the_estimator(name: str) -> None:
    model = architecture.named(name)
    for offload, parameters in (("optimizer", False), ("all", True)):
        host, _, _ = estimate_zero3_model_states_mem_needs(
            model.parameters,
            model.largest,
            8,
            1,
            True,
            parameters,
            zero_init=True,
            additional_buffer_factor=1,
        )
        used = memory.plan(model, Layout(3, 8, offload=offload, zero_init=True))  # type: ignore[arg-type]
        kept = used.phases[0].host
        counted = sum(kept.get(part, 0) for part in ("parameters", "master", "moments", "fp32 gradients"))
        assert 8 * counted == pytest.approx(host, abs=32 * 8)


def test_whole_load_is_that_of_the_estimator() -> None:
    host, _ = estimate_zero2_model_states_mem_needs(
        SEVEN.parameters, 8, 1, cpu_offload=False, additional_buffer_factor=1
    )
    assert 8 * (memory.load(SEVEN, Layout(2, 8)) - HOST_LIBRARIES) == host


def test_constants_are_those_of_the_code_they_describe() -> None:
    assert loop.VALIDATION_BATCH == memory.VALIDATION_BATCH
    for parameters in (1, 22_713_216, SEVEN.parameters):
        ours = memory.sizes(replace(SEVEN, parameters=parameters), Layout(2)).bucket
        theirs = zero.config(TrainingSettings(precision="bf16"), parameters)["zero_optimization"]
        assert ours == theirs["reduce_bucket_size"] == theirs["allgather_bucket_size"]
    defaults = DeepSpeedZeroConfig()
    assert defaults.sub_group_size == memory.STEP_GROUP
    assert defaults.prefetch_bucket_size == memory.PREFETCH
    assert defaults.max_reuse_distance == defaults.max_live_parameters == memory.REUSE
    from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE

    assert MEMORY_OPT_ALLREDUCE_SIZE == memory.REDUCE_AT_ONCE


def test_each_stage_takes_less_where_states_are_most_of_it() -> None:
    peaks = [memory.plan(SEVEN, Layout(stage, 8, tokens=64, sequence=64)).device for stage in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    more = [memory.plan(SEVEN, Layout(3, workers)).device for workers in (1, 2, 8, 64)]
    assert more == sorted(more, reverse=True)


def test_fp32_has_no_copies_without_zero() -> None:
    used = memory.plan(SEVEN, Layout(0, precision="fp32"))
    assert used.part("master") == used.part("fp32 gradients") == 0
    assert used.part("parameters") == used.part("gradients") == 4 * SEVEN.parameters
    assert memory.plan(SEVEN, Layout(1, precision="fp32")).part("master") == 4 * SEVEN.parameters


def test_frozen_parameters_have_neither_gradients_nor_states() -> None:
    whole, few = (memory.plan(SEVEN, Layout(0, trainable=share)) for share in (1.0, 0.01))
    assert few.part("parameters") == whole.part("parameters")
    for part in ("gradients", "master", "moments", "fp32 gradients"):
        assert few.part(part) == pytest.approx(0.01 * whole.part(part), rel=1e-6)


def test_a_peak_is_a_phase_and_not_a_sum() -> None:
    long = memory.plan(SEVEN, Layout(2, 8, tokens=16_384, sequence=2048))
    assert long.peak.name in ("forward", "reduce")
    assert memory.plan(SEVEN, Layout(2, 8, tokens=64, sequence=64)).peak.name == "step"
    assert long.device < sum(long.part(part) for part in memory.PARTS)
    assert long.part("libraries") == GPU_LIBRARIES


def test_accumulation_keeps_gradients_from_one_micro_batch_to_the_next() -> None:
    once, often = (memory.plan(SEVEN, Layout(2, 8, accumulation=n)) for n in (1, 4))
    own = -(-SEVEN.parameters // 8)
    assert often.phases[0].device["gradients"] - once.phases[0].device["gradients"] == 2 * own


def test_a_host_without_gpus_holds_every_worker() -> None:
    one, two = (
        memory.plan(SEVEN, Layout(3, n, n, tokens=64, sequence=64, gpu=False, zero_init=True)) for n in (1, 2)
    )
    assert two.host_running == 2 * two.device
    assert one.host_running < two.host_running < 2 * one.host_running
    assert memory.plan(SEVEN, Layout(3, 2, 2, gpu=False)).host >= 2 * 4 * SEVEN.parameters


def test_a_host_keeps_the_heap_of_the_loaded_model() -> None:
    small = architecture.named("smollm2-135m")
    # All but the embedding, whose tensor is above glibc's limit.
    assert small.small == small.parameters - small.vocabulary * small.width
    assert SEVEN.small == 65 * SEVEN.width
    for stage in range(4):
        here = memory.plan(small, Layout(stage, 2, 2, tokens=256, sequence=128, gpu=False))
        kept = {phase.name: phase.device["heap"] for phase in here.phases}
        assert kept["step"] == (4 * small.small if stage else 0)
        # Activations are put into it.
        forward = here.phases[0].device
        assert kept["forward"] == (max(0, 4 * small.small - forward["activations"]) if stage else 0)
        assert memory.plan(small, Layout(stage, 2)).part("heap") == 0


def test_zero_3_gathers_what_is_used_again_soon() -> None:
    small, large = architecture.named("smollm2-135m"), architecture.named("llama-70b")
    # A small model stays whole between its two uses; beside it a buffer that gathers ahead.
    assert memory.plan(small, Layout(3, 8)).part("gathered") == 2 * (small.parameters + memory.PREFETCH)
    expected = memory.REUSE // 2 + large.largest + memory.PREFETCH + large.largest
    assert memory.plan(large, Layout(3, 8)).part("gathered") == 2 * expected
    assert memory.plan(large, Layout(2, 8)).part("gathered") == 0


@pytest.mark.parametrize(("stage", "offload"), [(0, "optimizer"), (1, "all"), (2, "all")])
def test_what_deepspeed_does_not_have_is_refused(stage: int, offload: memory.Offload) -> None:
    with pytest.raises(ValueError, match="offload"):
        memory.plan(SEVEN, Layout(stage, offload=offload))
