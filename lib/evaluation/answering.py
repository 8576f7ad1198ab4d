"""Causal models over a test split, on Ray: how likely they find its answers, and what they answer themselves.

Each actor holds one model. It is read in fp32, gives the probabilities, and is then turned to bf16 for the
answers where the hardware has it. Both models of a comparison get the tokens of the dataset, so that a
prompt is what training saw, cut at the same place, and a perplexity is over the same tokens.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import likelihood, storage, tracking
from lib.artifacts import DatasetRef, check_model_directory
from lib.base_models import base_directory
from lib.encoders import IGNORED
from lib.errors import ModelError
from lib.evaluation.scoring import Part, check_resources, parts_of
from lib.progress import Progress
from lib.settings import Settings

if TYPE_CHECKING:
    import torch

# Rows of a shard that an actor scores at a time.
ROWS_AT_ONCE = 64
# Columns of a dataset that hold the other side of a pair (lib.tasks.preference).
REJECTED = ("rejected_input_ids", "rejected_labels")


@dataclass(frozen=True)
class Answered:
    """What one model made of a split."""

    likelihoods: pa.Table
    """All rows, sorted by id: `id`, `prompt` (a digest of the tokens before the last answer), `loss` float64 (summed
    nats over the answer tokens), `tokens`, `bytes` int64, and for pairs `rejected_loss`, of the other answer."""
    answers: pa.Table
    """The prompts' rows in their order: `id`, `answer`, `tokens` int64, `cut` bool."""
    engine: str
    tokens_per_second: float
    """Answer tokens that one actor generated in a second of work; 0 without prompts."""


@dataclass(frozen=True)
class Prompt:
    """Token ids that an answer is to follow."""

    id: str
    tokens: np.ndarray


class Answerer:
    """An actor: one causal model and the tokeniser that the dataset was made with."""

    def __init__(self, model: str, tokenizer: str, settings: Settings, threads: int) -> None:
        self.model_uri, self.tokenizer_uri = model, tokenizer
        self.settings, self.threads = settings, threads
        self.loaded: tuple[Any, Any] | None = None
        self.ends: list[int] = []
        self.shard: tuple[str, pa.Table] | None = None

    def score(self, part: Part) -> pa.Table:
        """The likelihoods of some rows of a shard."""
        model, tokenizer = self._load()
        if self.shard is None or self.shard[0] != part.shard:
            self.shard = (part.shard, read_columns(part.shard, ["id", "input_ids", "labels", *REJECTED]))
        rows = self.shard[1].slice(part.start, part.rows)
        losses, tokens = score_rows(model, rows, "input_ids", "labels", self._budget(model))
        labels = [np.asarray(each, np.int64) for each in rows["labels"].to_pylist()]
        texts = tokenizer.batch_decode(
            [each[1:][each[1:] != IGNORED] for each in labels], skip_special_tokens=True
        )
        scored = {
            "id": rows["id"],
            "prompt": [
                prompt_digest(np.asarray(ids, np.int64), wanted)
                for ids, wanted in zip(rows["input_ids"].to_pylist(), labels, strict=True)
            ],
            "loss": losses,
            "tokens": tokens,
            "bytes": np.array([len(text.encode()) for text in texts], np.int64),
        }
        if set(REJECTED) <= set(rows.column_names):
            scored["rejected_loss"], _ = score_rows(model, rows, *REJECTED, self._budget(model))
        return pa.table(scored)

    def generate(self, prompts: list[Prompt]) -> tuple[pa.Table, str, float]:
        """Greedy answers to some prompts; what they were computed in; seconds."""
        import torch

        model, tokenizer = self._load()
        kind = generation_dtype(self.settings.evaluation.answers.precision, model.device.type)
        if model.dtype != kind:
            model.to(kind)
        began = time.perf_counter()
        answers = generate(
            model,
            tokenizer,
            [p.tokens for p in prompts],
            self.settings.evaluation.answers.max_new_tokens,
            self.ends,
        )
        seconds = time.perf_counter() - began
        table = pa.table(
            {
                "id": [p.id for p in prompts],
                "answer": pa.array([text for text, _, _ in answers], pa.string()),
                "tokens": pa.array([n for _, n, _ in answers], pa.int64()),
                "cut": pa.array([cut for _, _, cut in answers], pa.bool_()),
            }
        )
        return table, "bf16" if kind == torch.bfloat16 else "fp32", seconds

    def _load(self) -> tuple[Any, Any]:
        """Model and tokeniser. Here, not in `__init__`: an error in a method reaches the caller as itself."""
        if self.loaded is None:
            import torch

            torch.set_num_threads(self.threads)
            kind = torch.bfloat16 if self.settings.evaluation.answers.precision == "bf16" else torch.float32
            trust = self.settings.model.trust_remote_code
            with storage.local_copy(self.tokenizer_uri) as folder:
                tokenizer = load_tokenizer(folder)
                own = generation_ends(folder)
            if self.model_uri == self.tokenizer_uri:
                with storage.local_copy(self.model_uri) as folder:
                    model = load_model(folder, kind, trust)
            else:
                model = load_model(base_directory(self.model_uri), kind, trust)
            if torch.cuda.is_available() and self.settings.serving.gpus_per_replica:
                model.to("cuda")
            self.ends = end_tokens(model, tokenizer, own)
            self.loaded = (model, tokenizer)
        return self.loaded

    def _budget(self, model: Any) -> int:
        """Padded tokens of a batch: what the settings say, and no more logits than memory should hold."""
        most = max(likelihood.LOGITS_AT_ONCE // model.config.get_text_config().vocab_size, 1)
        return int(min(self.settings.evaluation.tokens_per_batch, most))


def prompt_digest(ids: np.ndarray, labels: np.ndarray) -> str:
    """16 hex digits: rows with the same tokens before their last answer have the same."""
    labelled = (labels[1:] != IGNORED).any()
    before = ids[: likelihood.last_answer(labels)] if labelled else ids
    return hashlib.sha256(before.tobytes()).hexdigest()[:16]


def load_model(folder: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A causal language model, ready to be asked. Raises ModelError for a directory that holds none."""
    from transformers import AutoModelForCausalLM

    check_model_directory(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"{folder} does not load as a causal language model: {error}") from error
    return model.eval()


def load_tokenizer(folder: Any) -> Any:
    """Raises ModelError when the directory has no tokeniser that transformers reads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{folder} has no usable tokenizer: {error}") from error


def generation_dtype(precision: str, device: str) -> torch.dtype:
    """bf16 where it is wanted, or where `auto` finds that the hardware has it."""
    import torch

    if precision == "auto":
        has = torch.cuda.is_bf16_supported() if device == "cuda" else tracking.cpu_precision() == "bf16"
        return torch.bfloat16 if has else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def score_rows(
    model: Any, rows: pa.Table, ids: str, labels: str, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """Summed negative log-likelihood float64 [N] of the labelled tokens of each row, and their number int64 [N]."""
    import torch

    tokens = [np.asarray(each, np.int64) for each in rows[ids].to_pylist()]
    wanted = [np.asarray(each, np.int64) for each in rows[labels].to_pylist()]
    losses, counts = np.zeros(len(tokens)), np.zeros(len(tokens), np.int64)
    for group in likelihood.batches([len(each) for each in tokens], budget):
        chosen = [tokens[i] for i in group]
        arrays = (
            likelihood.padded(chosen, 0),
            likelihood.mask(chosen),
            likelihood.padded([wanted[i] for i in group], IGNORED),
        )
        with torch.inference_mode():
            inputs = (torch.from_numpy(array).to(model.device) for array in arrays)
            sums, number = likelihood.answer_log_probabilities(model, *inputs)
        losses[group], counts[group] = -sums.double().cpu().numpy(), number.cpu().numpy()
    return losses, counts


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[np.ndarray], most: int, ends: list[int]
) -> list[tuple[str, int, bool]]:
    """A greedy answer to each prompt: its text, its tokens without the end mark, whether `most` cut it off.

    One batch, padded on the left. What the model's own generation_config says of sampling and penalties is left
    aside: two models are compared by the same rule.
    """
    import torch
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=ends, pad_token_id=pad, use_cache=True
    )
    rows = list(prompts)
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.from_numpy(likelihood.padded(rows, pad, left=True)).to(model.device),
            attention_mask=torch.from_numpy(likelihood.mask(rows, left=True)).to(model.device),
            generation_config=config,
        )
    made = out[:, max(len(row) for row in rows) :].cpu().numpy()
    answers = []
    for row in made:
        found = np.flatnonzero(np.isin(row, ends))
        kept = row[: found[0]] if len(found) else row
        answers.append((tokenizer.decode(kept, skip_special_tokens=True).strip(), len(kept), not len(found)))
    return answers


def generation_ends(folder: Any) -> Any:
    """The end tokens that a model directory's generation_config names: a number, a list, or None."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder).eos_token_id


def end_tokens(model: Any, tokenizer: Any, also: Any = None) -> list[int]:
    """Every token that ends an answer: of the tokeniser, of the model's configuration, and `also`.

    The base does not know the end that fine-tuning taught; both are cut at the same tokens. Raises ModelError when
    nothing names one.
    """
    named = [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id, also]
    ends = {int(i) for one in named if one is not None for i in (one if isinstance(one, list) else [one])}
    if not ends:
        raise ModelError(
            f"{model.name_or_path}: neither tokenizer nor config names an eos_token, so an answer could not end"
        )
    return sorted(ends)


def ask(
    model: str, tokenizer: str, dataset: DatasetRef, prompts: list[Prompt], settings: Settings, what: str
) -> Answered:
    """Score the test split with a model, then let it answer the prompts. Needs a connection to Ray.

    `model`: URI of a model directory, or a base as `model.base` names one; `tokenizer`: URI of the model
    directory whose tokeniser made the dataset. Raises DataError for a split without rows, ModelError for a
    directory that cannot be used, ResourceError when the cluster is too small for the actors.
    """
    import ray
    from ray.util import ActorPool

    serving, answers = settings.serving, settings.evaluation.answers
    work = parts_of(dataset, "test", ROWS_AT_ONCE)
    batches = grouped(prompts, answers.batch)
    workers = min(settings.evaluation.workers, max(len(work), len(batches)))
    check_resources(workers, serving)
    actor = ray.remote(Answerer).options(num_cpus=serving.cpus_per_replica, num_gpus=serving.gpus_per_replica)
    threads = serving.threads or max(1, (os.cpu_count() or 1) // workers)
    pool = ActorPool([actor.remote(model, tokenizer, settings, threads) for _ in range(workers)])
    scored = _run(
        pool, lambda a, part: a.score.remote(part), work, [p.rows for p in work], f"{what}: scoring"
    )
    made = _run(
        pool,
        lambda a, some: a.generate.remote(some),
        batches,
        [len(b) for b in batches],
        f"{what}: answering",
    )
    written, seconds = sum(sum(t["tokens"].to_pylist()) for t, _, _ in made), sum(s for _, _, s in made)
    table = pa.concat_tables([t for t, _, _ in made]) if made else None
    if table is not None:
        place = {name: i for i, name in enumerate(table["id"].to_pylist())}
        table = table.take(pa.array([place[p.id] for p in prompts]))
    precision = made[0][1] if made else "fp32"
    return Answered(
        likelihoods=pa.concat_tables(scored).sort_by("id"),
        answers=table if table is not None else pa.table({"id": pa.array([], pa.string())}),
        engine=f"transformers {precision}, greedy, at most {answers.max_new_tokens} tokens",
        tokens_per_second=written / seconds if seconds else 0.0,
    )


def _run(
    pool: Any, call: Callable[[Any, Any], Any], work: list[Any], sizes: list[int], what: str
) -> list[Any]:
    """Hand out work to the actors; the results in the order in which they came."""
    progress = Progress(sum(sizes), what, "rows", sys.stdout.isatty())
    found = []
    for number, result in enumerate(pool.map_unordered(call, work)):
        found.append(result)
        progress.to(sum(sizes[: number + 1]))
    progress.close()
    return found


def grouped(prompts: list[Prompt], size: int) -> list[list[Prompt]]:
    """Prompts of like lengths together, longest first."""
    ordered = sorted(prompts, key=lambda p: -len(p.tokens))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def read_columns(shard: str, wanted: Sequence[str]) -> pa.Table:
    """Those of some columns that a shard has."""
    fs, inside = storage.filesystem(shard)
    present = set(pq.read_schema(inside, filesystem=fs).names)
    return pq.read_table(inside, filesystem=fs, columns=[name for name in wanted if name in present])
