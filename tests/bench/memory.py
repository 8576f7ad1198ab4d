"""Memory of a Train worker beside what the planner says, for every ZeRO stage.

    make bench-memory

A random model of SmolLM2-135M's shape (134.5 M parameters, so that its states outweigh the rest) is trained
for a few steps by two Ray Train workers through `lib.training.zero`, the code that `jobs.finetune` runs.
Measured is what a worker's process holds (resident memory, read from the kernel) above what it held before
it had that model, a tiny one trained and gone: at most while it loads and while it steps, Adam's moments being there. Planned is the same
layout's largest phase, without libraries and without the validation that is not run here. A checkpoint is
written and its size compared too, and what a worker sends in a step. `agreement` is 1 - |planned / measured - 1|, to be 0.85 at least.

How the model is read and where its states lie is measured apart: the same shape is written as safetensors and read
as `lib.training.loop` does, in ZeRO-3 with and without zero.Init, and with offload. Pages of the mapped file do not
count there: the kernel takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lib import tracking
from lib.planner import architecture, memory, timing
from lib.planner.architecture import Architecture
from lib.planner.memory import GIB, HOST_LIBRARIES, Layout
from lib.settings import TrainingSettings
from tests.bench.report import Report

PARTS = ("states", "read")
AGREEMENT = 0.85
# DeepSpeed learns the order of ZeRO-3's parameters from the second and goes by it from the third.
STEPS = 4


@dataclass(frozen=True)
class Measured:
    """Bytes of one worker's process."""

    baseline: int
    """Before there is a model: Python, torch, transformers, DeepSpeed, Ray, each used once."""
    loading: int
    """At most while the model is built."""
    stepping: int
    """At most in steps after the first."""
    between: int
    """Of all tensors that are alive between two steps."""
    checkpoint: int
    """Of the files that this worker wrote."""
    sent: int
    """By this worker in the last step, as ring algorithms send."""


class Sent:
    """Counts what the collective operations of torch.distributed send (`timing.volume` has the factors)."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.bytes = 0.0
        world = dist.get_world_size()
        ring = (world - 1) / world
        # Name → the argument that holds the whole tensor, its position, and how often it goes around.
        for name, whole, position, times in (
            ("all_reduce", "tensor", 0, 2),
            ("all_gather_into_tensor", "output_tensor", 0, 1),
            ("reduce_scatter_tensor", "input", 1, 1),
        ):
            setattr(dist, name, self._counted(getattr(dist, name), whole, position, times * ring))

    def _counted(self, collective: Any, whole: str, position: int, factor: float) -> Any:
        def call(*tensors: Any, **more: Any) -> Any:
            tensor = more[whole] if whole in more else tensors[position]
            self.bytes += factor * tensor.numel() * tensor.element_size()
            return collective(*tensors, **more)

        return call


def peak_resident(reset: bool = False) -> int:
    """The most that this process held since the last reset (proc(5): VmHWM, clear_refs)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * peak


class Private:
    """The most that this process holds of its own inside the block, mapped files left out (proc(5): RssAnon)."""

    def __enter__(self) -> Private:
        self.bytes, self._ends = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        # The kernel keeps no peak of this figure, so it is looked at as often as does no harm.
        while not self._ends.wait(0.002):
            self.bytes = max(self.bytes, private_bytes())


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def tensor_bytes() -> int:
    """Bytes of all storages behind the tensors that are alive."""
    import torch

    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def build(shape: Architecture) -> Any:
    """A random decoder of that shape, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            intermediate_size=shape.inner,
            tie_word_embeddings=shape.lookups == 0,
            use_cache=False,
        )
    )


def train(engine: Any, vocabulary: int, layout: Layout) -> None:
    """One optimiser step on random tokens."""
    import torch

    for _ in range(layout.accumulation):
        ids = torch.randint(0, vocabulary, (layout.tokens // layout.sequence, layout.sequence))
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss, scale_wrt_gas=False)
    engine.step()


def worker(config: dict[str, Any]) -> list[dict[str, int]]:
    """Train some steps; the fields of `Measured` for every worker."""
    import torch
    import torch.distributed as dist

    from lib.training import checkpoints, loop, zero

    assert loop  # a worker of a real run imports it
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape, layout = Architecture(**config["shape"]), Layout(**config["layout"])
    training = TrainingSettings(zero_stage=layout.zero_stage, precision=layout.precision)  # type: ignore[arg-type]
    sent = Sent()  # before DeepSpeed takes these functions over
    # Libraries load much of themselves when they are first used: that is theirs, not the model's.
    tiny = zero.initialize(build(architecture.llama("tiny", 1, 64, 2, 2, 64, 64)), training)
    train(tiny, 64, layout)
    tiny.destroy()
    del tiny
    known = tensor_bytes()
    baseline = psutil.Process().memory_info().rss
    peak_resident(reset=True)
    model = build(shape)
    loading = peak_resident(reset=True)
    engine = zero.initialize(model, training)
    for number in range(STEPS):
        sent.bytes = 0
        train(engine, shape.vocabulary, layout)
        if number == 0:  # Adam's moments are made by the first
            peak_resident(reset=True)
    stepping, last = peak_resident(), int(sent.bytes)
    between = tensor_bytes() - known
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag=checkpoints.ENGINE, client_state={})
        written = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    everyone: list[Any] = [None] * dist.get_world_size()
    mine = {"baseline": baseline, "loading": loading, "stepping": stepping, "between": between}
    dist.all_gather_object(everyone, mine | {"checkpoint": written, "sent": last})
    return everyone


def reader(config: dict[str, Any]) -> list[dict[str, int]]:
    """Read a model from a directory as the loop does and train some steps; private bytes of every worker."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from lib.training import loop, trainable, zero

    assert loop
    torch.set_num_threads(1)
    layout, base = Layout(**config["layout"]), Path(config["base"])
    training = TrainingSettings(
        zero_stage=layout.zero_stage,  # type: ignore[arg-type]
        precision=layout.precision,  # type: ignore[arg-type]
        zero_init=layout.zero_init,
        offload=layout.offload,
    )
    tiny = zero.initialize(build(architecture.llama("tiny", 1, 64, 2, 2, 64, 64)), training)
    train(tiny, 64, layout)
    tiny.destroy()
    del tiny
    gc.collect()
    baseline = private_bytes()
    with Private() as loading, zero.divided(training):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
        model = trainable.prepare(model, base, training)
    model.config.use_cache = False
    engine = zero.initialize(model, training, base=base)
    train(engine, model.config.vocab_size, layout)
    with Private() as stepping:
        for _ in range(STEPS - 1):
            train(engine, model.config.vocab_size, layout)
    everyone: list[Any] = [None] * dist.get_world_size()
    mine = {"loading": loading.bytes - baseline, "stepping": stepping.bytes - baseline}
    dist.all_gather_object(everyone, mine)
    return everyone


def measure(shape: Architecture, layout: Layout, folder: str) -> list[Measured]:
    """Run `worker` on Ray Train workers; Ray is connected already."""
    return [Measured(**fields) for fields in on_workers(shape, layout, folder)]


def on_workers(
    shape: Architecture, layout: Layout, folder: str, base: str | None = None
) -> list[dict[str, int]]:
    """What `worker` returns, or `reader` where there is a directory to read from."""
    from dataclasses import asdict

    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    environment = {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    if "HF_HUB_OFFLINE" in os.environ:
        environment["HF_HUB_OFFLINE"] = os.environ["HF_HUB_OFFLINE"]
    trainer = TorchTrainer(
        worker if base is None else reader,
        train_loop_config={"shape": asdict(shape), "layout": asdict(layout), "base": base},
        scaling_config=ScalingConfig(num_workers=layout.workers, resources_per_worker={"CPU": 0.5}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(storage_path=folder, worker_runtime_env={"env_vars": environment}),
    )
    fields: list[dict[str, int]] = trainer.fit().return_value
    return fields


def planned_stepping(shape: Architecture, layout: Layout) -> memory.Phase:
    """The largest phase of a step, without validation."""
    phases = [p for p in memory.plan(shape, layout).phases if p.name != "validate"]
    return max(phases, key=lambda phase: sum(phase.device.values()))


def main(parts: list[str]) -> None:
    from lib.command import connect

    connect()
    report = Report("memory")
    shape = architecture.named("smollm2-135m")
    # Where the processor lacks bf16, a step in it takes minutes.
    kinds = ("bf16", "fp32") if tracking.cpu_precision() == "bf16" else ("fp32",)
    for precision in kinds if "states" in parts else ():
        for stage in range(4):
            layout = Layout(
                stage, 2, 2, precision=precision, tokens=256, sequence=128, gpu=False, accumulation=1
            )
            with tempfile.TemporaryDirectory() as folder:
                measured = measure(shape, layout, folder)
            compare(report, shape, layout, measured)
    if "read" in parts:
        read(report, shape, kinds[0])
    report.finish()


def read(report: Report, shape: Architecture, precision: str) -> None:
    """Rows for zero.Init and offload, of a model that is read from disk."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        # As models are published: what is built in fp32 of it is a copy, not the file's own pages.
        build(shape).bfloat16().save_pretrained(base)
        for zero_init, offload in ((False, "none"), (True, "none"), (True, "optimizer"), (True, "all")):
            layout = Layout(
                3, 2, 2, precision=precision, tokens=256, sequence=128, gpu=False, zero_init=zero_init,
                offload=offload,  # type: ignore[arg-type]
            )  # fmt: skip
            measured = on_workers(shape, layout, str(Path(folder) / "ray"), str(base))
            case = f"ZeRO-3 {precision}, {'zero.Init' if zero_init else 'whole model'}, offload {offload}"
            planned = memory.load(shape, layout) - HOST_LIBRARIES
            loading = max(m["loading"] for m in measured)
            report.row(f"{case}: loading", planned / GIB, rival="measured", theirs=loading / GIB, unit="GiB")
            stepping = max(m["stepping"] for m in measured)
            phase = planned_stepping(shape, layout)
            planned = sum(phase.device.values()) + sum(phase.host.values()) - HOST_LIBRARIES
            report.row(
                f"{case}: stepping", planned / GIB, rival="measured", theirs=stepping / GIB, unit="GiB"
            )


def compare(report: Report, shape: Architecture, layout: Layout, measured: list[Measured]) -> None:
    case = f"ZeRO-{layout.zero_stage} {layout.precision}"
    phase = planned_stepping(shape, layout)
    used = memory.plan(shape, layout)
    largest = max(measured, key=lambda m: m.stepping - m.baseline)
    pairs = {
        f"stepping, most in {phase.name}": (
            sum(phase.device.values()) - HOST_LIBRARIES,
            largest.stepping - largest.baseline,
        ),
        "loading": (used.load - HOST_LIBRARIES, max(m.loading - m.baseline for m in measured)),
        "checkpoint": (timing.checkpoint(shape, layout), sum(m.checkpoint for m in measured)),
        "sent": (sum(timing.volume(shape, layout).values()), max(m.sent for m in measured)),
    }
    for what, (ours, theirs) in pairs.items():
        print(f"{case}: {what}: planned {ours / GIB:.3f}, measured {theirs / GIB:.3f} GiB", file=sys.stderr)
        report.row(f"{case}: {what}", ours / GIB, rival="measured", theirs=theirs / GIB, unit="GiB")
        agreement = 1 - abs(ours / theirs - 1)
        report.row(f"{case}: {what.split(',')[0]}, agreement", agreement, unit="", target=AGREEMENT)
    libraries = max(m.baseline for m in measured)
    report.row(
        f"{case}: libraries", HOST_LIBRARIES / GIB, rival="measured", theirs=libraries / GIB, unit="GiB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    main(parser.parse_args().parts)
