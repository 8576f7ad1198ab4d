"""One epoch over the same reviews: this project beside transformers' Trainer, twice.

    make bench-training

All train the same base model on the same 4,000 tokenised reviews with the same learning rate, schedule,
class weights and number of rows in an optimiser step. Timed is the training itself: for us everything
between the first row read and the last step (Ray Data, DeepSpeed, gloo), without start-up and validation;
for Trainer its own `train_runtime`. Rivals:
  first   Trainer as one would first write it: fp32, dynamic padding
  best    Trainer at its best on this machine: bf16 autocast where the processor has bf16, batches grouped by
          length, all cores
Each is a process of its own, one after the other, so that no one shares the cores.

Then ours beside itself: ZeRO 0 to 3; two workers of a thread each beside one of two threads, with as many tokens in a
step; a checkpoint every EVERY steps beside one at a validation (`saving_seconds`, and how much slower the steps are
while uploads go on). `--parts` takes some of these alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.environments import rival_python
from tests.bench.report import Report

CONFIG = "jobs/configs/reviews.yaml"
TOKENS_PER_BATCH = 2048
# Steps from one checkpoint to the next where their cost is measured.
EVERY = 5
PARTS = ("trainer", "stages", "workers", "checkpoints")
# The share of rows that a preprocessing limit of LIMIT leaves for training is 0.8.
LIMIT = 5150
COMMON = [
    "--data.limit", str(LIMIT),
    "--data.undersample", "{}",
    "--training.epochs", "1",
    "--training.tokens_per_batch", str(TOKENS_PER_BATCH),
    "--training.learning_rate", "1e-4",
]  # fmt: skip


@functools.cache
def ours(zero_stage: int, *more: str) -> dict[str, Any]:
    """Fine-tune through the job itself; what its run wrote down. `more` are overrides."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "WHORL_PIPELINE": f"bench-{zero_stage}-{time.time_ns()}"}
        log = Path(folder) / "log"
        words = [*COMMON, "--training.zero_stage", str(zero_stage), *more]
        with log.open("w") as out:
            command = [sys.executable, "-m", "jobs.finetune", "--config", CONFIG, *words]
            code = subprocess.run(command, env=environment, stdout=out, stderr=out).returncode
        if code:
            sys.exit(f"our own run failed ({code}):\n{log.read_text()[-3000:]}")
    from lib import tracking
    from lib.settings import load_settings

    os.environ["WHORL_PIPELINE"] = environment["WHORL_PIPELINE"]
    run = tracking.find_run(load_settings(CONFIG, words), "finetune")
    del os.environ["WHORL_PIPELINE"]
    path = run.client.download_artifacts(run.ref.id, "training.json")
    summary: dict[str, Any] = json.loads(Path(path).read_text())
    summary["macro_f1"] = macro_f1_on_test(run.ref.model_uri, words)
    return summary


def splits(words: list[str]) -> dict[str, Any]:
    """The tokenised splits of the dataset that `jobs.finetune` reads."""
    import pyarrow.parquet as pq

    from lib import storage
    from lib.data.plan import plan
    from lib.settings import load_settings

    settings = load_settings(CONFIG, words)
    ref = plan(settings).ref
    tables = {}
    for split in ("train", "validation", "test"):
        with storage.local_copy(ref.shards(split)[0]) as path:
            tables[split] = pq.read_table(path)
    return {"settings": settings, "manifest": ref.manifest(), **tables}


def macro_f1_on_test(model: str, words: list[str]) -> float:
    """Macro-F1 on the test split in fp32, by plain transformers for both sides alike."""
    import torch
    from sklearn.metrics import f1_score
    from transformers import AutoModelForSequenceClassification

    data = splits(words)
    module = AutoModelForSequenceClassification.from_pretrained(model.removeprefix("file://")).eval()
    labels, predicted = [], []
    with torch.inference_mode():
        rows = data["test"].to_pylist()
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            predicted.append(int(module(input_ids=ids).logits.argmax(-1)))
            labels.append(row["label"])
    return float(f1_score(labels, predicted, average="macro"))


def trainer(kind: str, rows_in_step: int, folder: str) -> None:
    """The rival, in a process of its own: prints one line of JSON."""
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from lib import tracking
    from lib.base_models import base_directory
    from lib.tasks import load_task

    data = splits(COMMON)
    settings = data["settings"]
    base = base_directory(settings.model.base)
    weights = load_task(settings.task).balance(data["manifest"], settings)
    class_weights = torch.tensor([weights[label] for label in settings.data.label_names])

    class Weighted(Trainer):
        """Trainer with class weights, the way its documentation shows."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, weight=class_weights)
            return (loss, outputs) if return_outputs else loss

    rows = [{"input_ids": r["input_ids"], "labels": r["label"]} for r in data["train"].to_pylist()]
    best = kind == "best"
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=rows_in_step,
        num_train_epochs=1,
        learning_rate=settings.training.learning_rate,
        weight_decay=settings.training.weight_decay,
        warmup_steps=settings.training.warmup,
        bf16=best and tracking.cpu_precision() == "bf16",
        train_sampling_strategy="group_by_length" if best else "random",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=settings.training.seed,
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(settings.data.label_names)
    )
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(base))
    result = Weighted(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
    model.save_pretrained(folder)
    from lib.training.loop import peak_memory_gib

    print(
        json.dumps(
            {"seconds": result.metrics["train_runtime"], "rows": len(rows), "memory": peak_memory_gib()}
        )
    )


def rival(kind: str, rows_in_step: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        python = rival_python("training", "accelerate==1.15.0")  # Trainer refuses to start without it
        command = [python, "-m", "tests.bench.training", "--rival", kind, str(rows_in_step), folder]
        command += ["--limit", COMMON[COMMON.index("--data.limit") + 1]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the rival {kind} failed:\n{done.stderr[-3000:]}")
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        result["macro_f1"] = macro_f1_on_test(folder, COMMON)
    return result


def matrix_peak(precision: str) -> float:
    """GFLOP/s of a large matrix product on all cores: what the machine could do at most."""
    import torch

    size, kind = 4096, torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(size, size, dtype=kind), torch.randn(size, size, dtype=kind)
    a @ b
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / float(np.median(times)) / 1e9


def flops_per_token(model: Any, length: float) -> float:
    """Training FLOPs a token: 6 · parameters outside the embeddings, and attention's 12 · layers · width · T
    (Kaplan et al. 2020, section 2.1, and the factor 3 for forward and backward)."""
    config = model.config
    embeddings = sum(p.numel() for n, p in model.named_parameters() if "embeddings" in n)
    dense = sum(p.numel() for p in model.parameters()) - embeddings
    return float(6 * dense + 12 * config.num_hidden_layers * config.hidden_size * length)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rival", nargs=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--limit", type=int, default=LIMIT, help="reviews, of which 0.8 are trained on")
    arguments = parser.parse_args()
    COMMON[COMMON.index("--data.limit") + 1] = str(arguments.limit)
    if arguments.rival:
        kind, rows, folder = arguments.rival
        trainer(kind, int(rows), folder)
        return
    preprocess = [sys.executable, "-m", "jobs.preprocess", "--config", CONFIG, *COMMON]
    subprocess.run(preprocess, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = Report("training")
    for part in arguments.parts:
        {"trainer": beside_trainer, "stages": stages, "workers": workers, "checkpoints": saving}[part](report)
    report.finish()


def rows_a_second(run: dict[str, Any]) -> float:
    return float(run["rows"] / run["seconds"])


def beside_trainer(report: Report) -> None:
    two = ours(2)
    rows_in_step = max(1, round(two["rows"] / two["steps"]))
    report.row("rows in an optimiser step", rows_in_step, unit="rows")
    for kind, target in (("first", 2.0), ("best", 1.0)):
        theirs = rival(kind, rows_in_step)
        name = f"Trainer, {kind}"
        report.row(
            "one epoch, ZeRO-2",
            rows_a_second(two),
            rival=name,
            theirs=theirs["rows"] / theirs["seconds"],
            unit="rows/s",
            target=target,
        )
        # Within 0.01 of the rival, or above it.
        report.row(
            "macro-F1 on test",
            two["macro_f1"],
            rival=name,
            theirs=theirs["macro_f1"],
            unit="",
            target=1 - 0.01 / theirs["macro_f1"],
        )
        report.row(
            "peak memory",
            max(two["peak_memory_gib"]),
            rival=name,
            theirs=theirs["memory"],
            unit="GiB",
            higher_is_better=False,
        )


def stages(report: Report) -> None:
    from transformers import AutoModelForSequenceClassification

    from lib.base_models import base_directory

    model = AutoModelForSequenceClassification.from_pretrained(base_directory("sample://minilm-l6"))
    for stage in range(4):
        run = ours(stage)
        tokens = run["tokens"] / run["seconds"]
        peak, each = matrix_peak(run["precision"]), flops_per_token(model, run["tokens"] / run["rows"])
        report.row(f"ZeRO-{stage}", tokens, unit="tokens/s")
        report.row(
            f"ZeRO-{stage}: share of the {run['precision']} peak",
            tokens * each / 1e9 / peak,
            unit=f"of {peak:.0f} GFLOP/s",
        )
        report.row(f"ZeRO-{stage}: peak memory of a worker", max(run["peak_memory_gib"]), unit="GiB")
        report.row(f"ZeRO-{stage}: macro-F1 on test", run["macro_f1"], unit="")


def workers(report: Report) -> None:
    """Scaling efficiency on as many threads: what is lost to the exchange of gradients."""
    two = ours(2)
    one = ours(
        2, "--training.workers", "1", "--training.cpus_per_worker", "2", "--training.accumulation", "2"
    )
    report.row(
        "two workers of a thread, one of two threads",
        rows_a_second(two),
        rival="one worker",
        theirs=rows_a_second(one),
        unit="rows/s",
    )
    memory = sum(two["peak_memory_gib"]), sum(one["peak_memory_gib"])
    report.row(
        "peak memory of all workers", memory[0], rival="one worker", theirs=memory[1], unit="GiB",
        higher_is_better=False,
    )  # fmt: skip


def saving(report: Report) -> None:
    none, often = ours(2), ours(2, "--training.checkpoint_every", str(EVERY))
    step = none["seconds"] / none["steps"]
    still = often["saving_seconds"] / often["saves"]
    slower = (often["seconds"] - none["seconds"]) / (often["saves"] - none["saves"])
    report.row(f"checkpoints, one every {EVERY} steps", often["saves"], unit="checkpoints")
    report.row("an optimiser step", step, unit="s")
    report.row("a checkpoint: training stands still", still, unit="s")
    report.row("a checkpoint: later steps are slower by", slower, unit="s")
    report.row("a checkpoint in all", (still + slower) / step, unit="steps")


if __name__ == "__main__":
    main()
