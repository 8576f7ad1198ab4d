"""One epoch of supervised fine-tuning over the same packed dialogues: this project beside TRL's SFTTrainer.

    make bench-chat-training

Both fine-tune all of SmolLM2-135M-Instruct on the same tokenised tech-support pairs, with loss on the same tokens,
the same learning rate, schedule, clipping and tokens in an optimiser step, in bf16 with fp32 masters (in fp32 where
the processor has no bf16), on all cores:
ours two Ray Train workers of one thread each under ZeRO-2, TRL one process of as many threads, packing by
best-fit decreasing (`packing_strategy="bfd"`, which makes it padding-free). Timed is the training alone: for us
from the first row read to the last step, for TRL its `train_runtime`. Tokens are those of the examples, without
padding. The held-out loss is measured for both by plain transformers in fp32, one example at a time, over the
answers of the validation and the test split; where they are equal, the speeds can be compared.

Each is a process of its own, one after the other. TRL is taken twice: with one process' default attention (sdpa,
whose block mask is dense), and as one would first write it, without packing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.tracking import cpu_precision
from tests.bench.environments import rival_python
from tests.bench.report import Report

CONFIG = "jobs/configs/support_chat.yaml"
RIVAL = ("trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0")
PACKS_IN_STEP = 2
TARGET = 1.2
# Of the held-out loss, relative: what counts as equal.
EQUAL = 0.05


def words(limit: int | None, base: str | None, precision: str) -> list[str]:
    """The configuration that both sides are trained by."""
    chosen = [
        "--training.workers", str(PACKS_IN_STEP),
        "--training.epochs", "1",
        "--training.validate_every", "epoch",
        "--training.schedule", "linear",
        "--training.precision", precision,
    ]  # fmt: skip
    if limit is not None:
        chosen += ["--data.limit", str(limit)]
    if base is not None:
        chosen += ["--model.base", base, "--model.max_length", "256", "--training.tokens_per_batch", "256"]
    return chosen


def ours(chosen: list[str]) -> dict[str, Any]:
    """Fine-tune through the job itself; what its run wrote down."""
    from lib import tracking
    from lib.settings import load_settings

    pipeline = f"bench-chat-{time.time_ns()}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as out:
            command = [sys.executable, "-m", "jobs.finetune", "--config", CONFIG, *chosen]
            environment = {**os.environ, "WHORL_PIPELINE": pipeline}
            code = subprocess.run(command, env=environment, stdout=out, stderr=out).returncode
        if code:
            sys.exit(f"our own run failed ({code}):\n{log.read_text()[-3000:]}")
    os.environ["WHORL_PIPELINE"] = pipeline
    run = tracking.find_run(load_settings(CONFIG, chosen), "finetune")
    del os.environ["WHORL_PIPELINE"]
    path = run.client.download_artifacts(run.ref.id, "training.json")
    summary: dict[str, Any] = json.loads(Path(path).read_text())
    return {
        "seconds": summary["seconds"],
        "tokens": summary["tokens"],
        "steps": summary["steps"],
        "memory": sum(summary["peak_memory_gib"]),
        "model": run.ref.model_uri.removeprefix("file://"),
    }


def splits(chosen: list[str]) -> dict[str, Any]:
    """The settings, and the tokenised splits of the dataset that `jobs.finetune` reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lib import storage
    from lib.data.plan import plan
    from lib.settings import load_settings

    settings = load_settings(CONFIG, chosen)
    ref = plan(settings).ref
    found: dict[str, Any] = {"settings": settings}
    for split in ("train", "validation", "test"):
        tables = []
        for shard in ref.shards(split):
            with storage.local_copy(shard) as path:
                tables.append(pq.read_table(path, columns=["input_ids", "labels", "length"]))
        found[split] = pa.concat_tables(tables)
    return found


def held_out_loss(model: str, chosen: list[str]) -> float:
    """Mean loss of an answer's token over validation and test."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    data = splits(chosen)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = [*data["validation"].to_pylist(), *data["test"].to_pylist()]
    weights: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for row in rows:  # equal examples have equal losses
        key = (tuple(row["input_ids"]), tuple(row["labels"]))
        weights[key] = weights.get(key, 0) + 1
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for (ids, labels), times in weights.items():
            logits, truth = module(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:])
            total += times * float(functional.cross_entropy(logits, truth, reduction="sum"))
            tokens += times * int((truth != -100).sum())
    return total / tokens


def trainer(kind: str, chosen: list[str], folder: str) -> None:
    """The rival, in a process of its own: prints one line of JSON."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from lib.base_models import base_directory

    data = splits(chosen)
    settings = data["settings"]
    training, base = settings.training, base_directory(settings.model.base)
    rows = data["train"].select(["input_ids", "labels"]).to_pylist()
    tokens = sum(data["train"]["length"].to_pylist())
    torch.set_num_threads(os.cpu_count() or 1)
    packed = kind == "packed"
    # Without packs, as many examples as fill the same step.
    examples = max(1, round(PACKS_IN_STEP * settings.model.max_length * len(rows) / tokens))
    arguments = SFTConfig(
        output_dir=folder,
        max_length=settings.model.max_length,
        packing=packed,
        packing_strategy="bfd",
        per_device_train_batch_size=PACKS_IN_STEP if packed else examples,
        num_train_epochs=1,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip,
        lr_scheduler_type="linear",
        warmup_steps=training.warmup,
        bf16=training.precision == "bf16",
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=training.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sft = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    result = sft.train()
    sft.save_model(folder)
    from lib.training.loop import peak_memory_gib

    measured = {"seconds": result.metrics["train_runtime"], "tokens": tokens, "memory": peak_memory_gib()}
    print(json.dumps({**measured, "steps": result.global_step}))


def rival(kind: str, chosen: list[str]) -> dict[str, Any]:
    python = rival_python("trl", *RIVAL)
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "tests.bench.chat_training", "--rival", kind, folder, *chosen]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the rival {kind} failed:\n{done.stderr[-3000:]}")
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return {**result, "loss": held_out_loss(folder, chosen)}


def compare(chosen: list[str], kinds: list[str]) -> None:
    from lib.base_models import base_directory
    from lib.settings import load_settings

    report = Report("chat_training")
    mine = ours(chosen)
    mine["loss"] = held_out_loss(mine["model"], chosen)
    untrained = held_out_loss(str(base_directory(load_settings(CONFIG, chosen).model.base)), chosen)
    report.row("held-out loss before training", untrained, unit="nats a token")
    for kind in kinds:
        theirs, name = rival(kind, chosen), f"TRL SFTTrainer, {kind}"
        report.row(
            "one epoch",
            mine["tokens"] / mine["seconds"],
            rival=name,
            theirs=theirs["tokens"] / theirs["seconds"],
            unit="tokens/s",
            target=TARGET if kind == "packed" else None,
        )
        report.row(
            "held-out loss",
            mine["loss"],
            rival=name,
            theirs=theirs["loss"],
            unit="nats a token",
            higher_is_better=False,
            target=1 - EQUAL if kind == "packed" else None,
        )
        report.row(
            "peak memory of all processes",
            mine["memory"],
            rival=name,
            theirs=theirs["memory"],
            unit="GiB",
            higher_is_better=False,
        )
        report.row("optimiser steps", mine["steps"], rival=name, theirs=theirs["steps"], unit="steps")
    report.finish()


def main() -> None:
    if sys.argv[1:2] == ["--rival"]:
        kind, folder, *chosen = sys.argv[2:]
        trainer(kind, chosen, folder)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, help="take only the first rows of the source")
    parser.add_argument("--base", help="another base model than the configuration's, at 256 tokens")
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], help="default: bf16 where the processor has it"
    )
    parser.add_argument("--kinds", nargs="+", choices=["packed", "padded"], default=["packed", "padded"])
    arguments = parser.parse_args()
    precision = arguments.precision or cpu_precision()
    chosen = words(arguments.limit, arguments.base, precision)
    preprocess = [sys.executable, "-m", "jobs.preprocess", "--config", CONFIG, *chosen]
    subprocess.run(preprocess, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    compare(chosen, arguments.kinds)


if __name__ == "__main__":
    main()
