"""Step time, runs and checkpoints: the formulas' own numbers."""

from __future__ import annotations

import dataclasses

import pytest

from lib.planner import architecture, hardware, timing
from lib.planner.memory import Layout
from lib.planner.timing import Rates

SEVEN = architecture.named("llama-7b")
N = SEVEN.parameters
H100 = hardware.accelerator("h100")
RATES = Rates(mfu=0.4, network=50e9, storage=1e9)


def step(layout: Layout, accelerator: hardware.Accelerator = H100) -> timing.Step:
    one = timing.step(SEVEN, layout, accelerator, RATES)
    assert one is not None
    return one


def test_operations_are_six_for_each_parameter_and_eight_with_recomputation() -> None:
    short = dataclasses.replace(Layout(2), sequence=0)
    assert timing.flops(SEVEN, short, 100) == pytest.approx(600 * SEVEN.multiplied)
    again = dataclasses.replace(short, checkpointing=True)
    assert timing.flops(SEVEN, again, 100) == pytest.approx(800 * SEVEN.multiplied)
    # With nearly all frozen the gradients of the weights are left out.
    frozen = dataclasses.replace(short, trainable=0.001)
    assert timing.flops(SEVEN, frozen, 100) == pytest.approx(400.2 * SEVEN.multiplied)


def test_attention_adds_the_term_of_kaplan_and_half_of_it_when_causal() -> None:
    encoder = architecture.named("bert-base")
    for model, factor in ((encoder, 12), (SEVEN, 6)):
        more = timing.flops(model, Layout(2, sequence=512), 1) - timing.flops(model, Layout(2, sequence=0), 1)
        assert more == pytest.approx(factor * model.layers * model.width * 512)


@pytest.mark.parametrize(
    ("stage", "once", "four_times"),
    [
        # As Rajbhandari et al. 2020 count, 2 and 3; ZeRO-1 and 2 as DeepSpeed 0.19 sends: all-reduce and gather.
        (0, 2, 2),
        (1, 3, 3),
        (2, 3, 2 * 4 + 1),
        (3, 3, 3 * 4),
    ],
)
def test_what_a_worker_sends(stage: int, once: int, four_times: int) -> None:
    endless = dataclasses.replace(SEVEN, parameters=10**13)  # too large for ZeRO-3 to keep anything gathered
    for accumulation, times in ((1, once), (4, four_times)):
        sent = sum(timing.volume(endless, Layout(stage, 8, accumulation=accumulation)).values())
        assert sent == pytest.approx(times * 2 * 10**13 * 7 / 8, rel=1e-3)
    assert sum(timing.volume(SEVEN, Layout(stage, 1)).values()) == 0


def test_a_small_model_stays_gathered_in_zero_3() -> None:
    small = architecture.named("smollm2-135m")
    sent = timing.volume(small, Layout(3, 2))
    assert sum(sent.values()) == pytest.approx(2 * 2 * small.parameters / 2)


def test_compute_is_operations_over_the_stated_share_of_the_peak() -> None:
    layout = Layout(2, 1, tokens=16_384, sequence=2048)
    expected = timing.flops(SEVEN, layout, 16_384) / (0.4 * 989e12)
    assert step(layout).compute == pytest.approx(expected)
    assert step(dataclasses.replace(layout, precision="fp32")).compute == pytest.approx(2 * expected)


def test_tiny_batches_are_bound_by_memory() -> None:
    one = step(Layout(2, 1, tokens=1, sequence=1))
    assert one.compute == pytest.approx(3 * 2 * SEVEN.multiplied / 3350e9, rel=0.01)


def test_zero_2_on_gpus_hides_its_reduction_behind_backward() -> None:
    long = Layout(2, 8, tokens=65_536, sequence=2048)
    gather = timing.volume(SEVEN, long)["gather"] / 450e9
    assert step(long).communication == pytest.approx(gather)
    assert step(dataclasses.replace(long, zero_stage=1)).communication == pytest.approx(3 * gather)


def test_between_hosts_the_network_decides() -> None:
    near, far = (step(Layout(1, 8, workers_per_host=n)).communication for n in (8, 4))
    assert far == pytest.approx(near * 450 / 50)


def test_offloading_goes_over_pcie_and_adam_over_the_hosts_memory() -> None:
    inside, outside = step(Layout(2, 8)), step(Layout(2, 8, offload="optimizer"))
    assert outside.offload == pytest.approx((2 + 2) * N / 8 / 64e9)
    assert outside.update == pytest.approx(8 * (N / 8) * 30 / 100e9)
    assert inside.offload == 0
    assert inside.update < outside.update / 50
    parameters = step(Layout(3, 8, offload="all"))
    assert parameters.offload > step(Layout(3, 8, offload="optimizer")).offload


def test_workers_without_gpus_share_the_processors() -> None:
    here = hardware.Accelerator("this", 2**35, 1e12, 1e10, 5e9, 5e9, gpu=False)
    one, two = (step(Layout(0, n, n, gpu=False, tokens=512), here) for n in (1, 2))
    assert two.compute == pytest.approx(2 * one.compute)
    assert two.tokens_per_second < one.tokens_per_second


def test_unknown_rates_give_no_times() -> None:
    assert timing.step(SEVEN, Layout(2), hardware.this_machine(), RATES) is None


def test_a_run_and_its_cost() -> None:
    one = step(Layout(2, 8))
    run = timing.run(one, 10 * one.tokens + 1, 8, 2.5)
    assert run.steps == 11
    assert run.seconds == pytest.approx(11 * one.total)
    assert run.gpu_hours == pytest.approx(8 * run.seconds / 3600)
    assert run.cost == pytest.approx(2.5 * run.gpu_hours)
    assert timing.run(one, 1, 8, None).cost is None


def test_a_checkpoint_is_weights_master_weights_and_moments() -> None:
    assert [timing.checkpoint(SEVEN, Layout(stage, 8)) for stage in range(4)] == [
        14 * N,
        14 * N,
        14 * N,
        12 * N,
    ]
    assert timing.checkpoint(SEVEN, Layout(0, precision="fp32")) == 12 * N
    # Frozen weights are in the base model already.
    few = Layout(3, 8, trainable=0.01)
    assert timing.checkpoint(SEVEN, few) == pytest.approx(0.01 * 12 * N, rel=1e-6)


def test_the_first_accelerator_of_a_misspelt_name_is_named() -> None:
    with pytest.raises(hardware.ConfigError, match=r"no accelerator 'h10'; did you mean 'h100'\?"):
        hardware.accelerator("h10")


def test_this_machine_is_measured_on_request() -> None:
    here = hardware.this_machine(measured=True)
    assert not here.gpu
    assert 2**30 < here.memory < 2**46
    assert 1e9 < here.flops < 1e16
    assert 1e8 < here.bandwidth < 1e14


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        hardware.ResourceError, match=r"training.gpus_per_worker asks for a GPU and this machine has none"
    ):
        hardware.this_machine(on_gpu=True)
