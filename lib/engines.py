"""Encoder inference: token ids in, logits out, on OpenVINO or torch.

Both engines take rows of any length, batch like lengths under a token budget, and compute in bf16 where
the processor has it. Which is faster was measured (MiniLM-L6, 2 cores with AVX-512 BF16, reviews of 77
tokens on average, rows/s in sorted batches of 32, milliseconds for one row):

                    fp32           bf16
    torch           97    19 ms    294    7.9 ms
    OpenVINO       222     6 ms    412    4.7 ms

so `auto` takes OpenVINO on a CPU and torch on a GPU. `make bench-serving` measures the served whole.

A classifier of sequences answers with one row of logits, one of tokens with a row for each of them, and a
sentence encoder with a vector of length 1.

Shapes: B rows in a batch, T tokens in its longest row, C classes, D width of a vector.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lib import storage, tracking
from lib.errors import ModelError, ResourceError, StorageError
from lib.settings import ServingSettings

if TYPE_CHECKING:
    import openvino
    import torch
    from torch import nn

logger = logging.getLogger(__name__)
# OpenVINO's conversion reports to its makers, from a process that it forks; where this package cannot be imported it
# has a stub in its place. Nothing of a company's models is told to anybody.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

Forward = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`input_ids` and `attention_mask`, both int64 [B, T] → logits float32 [B, C], or [B, T, C], or vectors [B, D]."""
Head = Literal["SequenceClassification", "TokenClassification", "pairs", "mean", "cls"]
"""Behind `AutoModelFor`, transformers' name of a classifier; `pairs` is one of sequences that reads two texts; or how
the last layer's tokens become one vector."""
KINDS = {
    "SequenceClassification": "a sequence classifier",
    "TokenClassification": "a token classifier",
    "pairs": "a sequence classifier",
}
# What sentence-transformers writes beside a model, and the pooling of it that is computed here.
POOLING_FILE = Path("1_Pooling", "config.json")
POOLING: dict[str, Head] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}

# Engines compile a kernel for each new shape; rounding T up keeps the shapes few.
WIDTH_STEP = 8
# Padded tokens that take a CPU about as long as one more call does (MiniLM-L6: 1 to 2 ms).
CPU_CALL_TOKENS = 64


class Encoder:
    """A loaded model: `logits(rows)`. Not for use by two threads at once."""

    def __init__(
        self,
        forward: Forward,
        *,
        name: str,
        pad: int,
        positions: int,
        tokens_per_batch: int,
        padding_per_batch: int,
    ) -> None:
        self.name = name
        """Engine and precision, such as `openvino bf16`."""
        self.tokens_per_batch = tokens_per_batch
        self.padding_per_batch = padding_per_batch
        """Padding above which two batches are quicker than one."""
        self._forward = forward
        self._pad = pad
        self._positions = positions
        # The first call compiles, so that it is not a client who waits for it.
        self.classes = int(self._run([np.full(WIDTH_STEP, pad, np.int32)]).shape[-1])

    def logits(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Logits float32 [len(rows), C] of rows of token ids, in their order."""
        out = np.empty((len(rows), self.classes), np.float32)
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        for chosen in like_lengths(lengths, self.tokens_per_batch):
            out[chosen] = self._run([rows[i] for i in chosen])
        return out

    def _run(self, rows: list[np.ndarray]) -> np.ndarray:
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        longest = int(lengths.max())
        # RoBERTa and its kin keep two positions for themselves.
        width = min(rounded(longest), max(longest, self._positions - 2))
        mask = np.arange(width) < lengths[:, None]
        input_ids = np.full(mask.shape, self._pad, np.int64)
        input_ids[mask] = np.concatenate(rows)
        return self._forward(input_ids, mask.astype(np.int64))


class TokenEncoder(Encoder):
    """A classifier of tokens."""

    def logits(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:  # type: ignore[override]
        """Logits float32 [T, C] of each row's own T tokens, in the order of the rows."""
        out: dict[int, np.ndarray] = {}
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        for chosen in like_lengths(lengths, self.tokens_per_batch):
            computed = self._run([rows[i] for i in chosen])
            out |= {int(i): computed[place, : lengths[i]] for place, i in enumerate(chosen)}
        return [out[i] for i in range(len(rows))]


class SentenceEncoder(Encoder):
    """An encoder of texts as points: the cosine of two is how alike their meanings are."""

    def vectors(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Vectors float32 [len(rows), D] of length 1, in the order of the rows."""
        pooled = self.logits(rows)
        length: np.ndarray = np.linalg.norm(pooled, axis=1, keepdims=True)
        return np.asarray(pooled / np.maximum(length, 1e-12))


def rounded(length: int) -> int:
    """The width that a row of this many tokens is padded to when it is the longest of its batch."""
    return -(-length // WIDTH_STEP) * WIDTH_STEP


def like_lengths(lengths: np.ndarray, tokens_per_batch: int) -> Iterator[np.ndarray]:
    """Indices of rows, in batches from short to long, each of at most `tokens_per_batch` padded tokens.

    A row that alone is above the budget is a batch of its own.
    """
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * rounded(int(lengths[order[end]])) > tokens_per_batch:
            yield order[start:end]
            start = end


def load_encoder(folder: Path, serving: ServingSettings) -> Encoder:
    """A sequence classifier from a checked model directory, on the engine that `serving` asks for.

    Raises ModelError when transformers cannot load the directory or, with `engine: openvino`, when
    OpenVINO cannot convert it; ResourceError when a GPU is asked for and there is none.
    """
    return Encoder(**_loaded(folder, serving, "SequenceClassification"))


def load_token_encoder(folder: Path, serving: ServingSettings) -> TokenEncoder:
    """A classifier of tokens, as `load_encoder` loads one of sequences."""
    return TokenEncoder(**_loaded(folder, serving, "TokenClassification"))


def load_cross_encoder(folder: Path, serving: ServingSettings) -> Encoder:
    """A classifier of pairs of texts, as `load_encoder` loads one of single texts."""
    return Encoder(**_loaded(folder, serving, "pairs"))


def load_sentence_encoder(folder: Path, serving: ServingSettings) -> SentenceEncoder:
    """An encoder of sentences, as `load_encoder` loads a classifier.

    Vectors are the mean of the last layer's tokens, padding left out (Reimers and Gurevych 2019), unless
    `1_Pooling/config.json` says that it is the first token. Raises ModelError for any other pooling, too.
    """
    return SentenceEncoder(**_loaded(folder, serving, _pooling(folder)))


def _pooling(folder: Path) -> Head:
    path = folder / POOLING_FILE
    if not path.is_file():
        return "mean"
    given = storage.read_json(str(path))
    chosen = [name for name, value in given.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in POOLING:
        raise ModelError(f"{path} asks for {', '.join(chosen) or 'nothing'}; known are {', '.join(POOLING)}")
    return POOLING[chosen[0]]


def _loaded(folder: Path, serving: ServingSettings, head: Head) -> dict[str, Any]:
    """What an Encoder is made of."""
    config = _config(folder)
    gpu = serving.gpus_per_replica > 0
    engine = _engine(serving)
    threads = serving.threads or os.cpu_count() or 1
    precision = chosen_precision(serving.precision, gpu)
    forward: Forward | None = None
    if engine == "openvino":
        try:
            forward = _openvino(folder, head, precision, threads)
        except ModelError as error:
            if serving.engine == "openvino":
                raise
            logger.warning("%s; serving it with torch instead", error)
            engine = "torch"
    if forward is None:
        forward = _torch(folder, head, precision, threads, gpu)
    return {
        "forward": forward,
        "name": f"{engine} {precision}",
        "pad": int(config.get("pad_token_id") or 0),
        "positions": int(config.get("max_position_embeddings") or 1 << 30),
        "tokens_per_batch": serving.tokens_per_batch,
        # On a GPU a call costs as much as thousands of tokens.
        "padding_per_batch": serving.tokens_per_batch if gpu else CPU_CALL_TOKENS,
    }


def _engine(serving: ServingSettings) -> Literal["torch", "openvino"]:
    gpu = serving.gpus_per_replica > 0
    if serving.engine == "auto":
        return "torch" if gpu else "openvino"
    if serving.engine == "openvino" and gpu:
        raise ResourceError(
            "serving.engine openvino runs on CPUs; set serving.gpus_per_replica 0 or engine torch"
        )
    return serving.engine


def chosen_precision(wanted: Literal["auto", "bf16", "fp32"], gpu: bool) -> Literal["bf16", "fp32"]:
    if wanted != "auto":
        return wanted
    if gpu:
        import torch

        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return tracking.cpu_precision()


def _config(folder: Path) -> dict[str, Any]:
    values = storage.read_json(str(folder / "config.json"))
    if not isinstance(values, dict):
        raise ModelError(f"{folder / 'config.json'} must hold an object")
    return values


def _module(folder: Path, head: Head) -> nn.Module:
    """The model in fp32, ready for inference: `input_ids` and `attention_mask` in, one tensor out, which is also
    what a tracer can follow. Raises ModelError."""
    import torch
    import transformers

    kind = KINDS.get(head)
    behind = "ForSequenceClassification" if head == "pairs" else f"For{head}" if kind else ""
    auto_class = getattr(transformers, f"AutoModel{behind}")
    try:
        model: nn.Module = auto_class.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise ModelError(f"{folder} does not load as {kind or 'an encoder'}: {error}") from error

    types = head == "pairs" and getattr(model.config, "type_vocab_size", 1) > 1
    separator = transformers.AutoTokenizer.from_pretrained(folder).sep_token_id if types else None

    class Answering(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            more = {}
            if types:  # which of the two texts a token belongs to: what is behind the first separator is the second's
                ends = torch.eq(input_ids, torch.tensor(separator)).long()
                more["token_type_ids"] = (ends.cumsum(1) - ends).clamp(max=1) * attention_mask
            answer = self.model(input_ids=input_ids, attention_mask=attention_mask, **more)
            if kind:
                logits: torch.Tensor = answer.logits
                return logits
            hidden: torch.Tensor = answer.last_hidden_state.float()
            if head == "cls":
                return hidden[:, 0]
            mask = attention_mask.unsqueeze(-1).float()
            return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)

    return Answering().eval()


def _torch(folder: Path, head: Head, precision: str, threads: int, gpu: bool) -> Forward:
    import torch

    if gpu and not torch.cuda.is_available():
        raise ResourceError("serving.gpus_per_replica asks for a GPU, and torch sees none; set it to 0")
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        torch.set_num_threads(threads)  # Ray sets OMP_NUM_THREADS to the replica's CPU share
    model = _module(folder, head).to(device)

    def forward(input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        # Autocast was faster here than bf16 weights, and it keeps the layer norms in fp32.
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
            inputs = {"input_ids": input_ids, "attention_mask": mask}
            tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
            answer: torch.Tensor = model(**tensors)
        return answer.float().cpu().numpy()

    return forward


def _openvino(folder: Path, head: Head, precision: str, threads: int) -> Forward:
    import openvino

    compiled = openvino.Core().compile_model(
        _graph(folder, head),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            # One stream over all threads: two streams give 4% more rows and twice the latency.
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
        },
    )
    request = compiled.create_infer_request()

    def forward(input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        result = request.infer({"input_ids": input_ids, "attention_mask": mask})
        # The request owns its output and overwrites it in the next call.
        return np.array(result[0], np.float32)

    return forward


def _graph(folder: Path, head: Head) -> openvino.Model | Path:
    """The model in OpenVINO's own form, converted once and kept in the project's cache.

    A replica that finds it there starts without importing torch or transformers.
    """
    import openvino

    key = {p.name: storage.checksum(str(p)) for p in sorted(folder.glob("*.safetensors"))}
    key["config.json"] = storage.checksum(str(folder / "config.json"))
    key["head"] = head
    key |= {package: version(package) for package in ("openvino", "transformers")}
    home = storage.PROJECT / ".whorl" / "cache" / "openvino" / storage.fingerprint(key)
    if storage.published(str(home)):
        return home / "model.xml"
    graph = _convert(folder, head)
    try:
        with storage.publish(str(home)) as scratch:
            openvino.save_model(graph, str(scratch / "model.xml"), compress_to_fp16=False)
    except StorageError as error:  # another replica was quicker, or nothing can be written here
        logger.info("not cached: %s", error)
    return graph


def _convert(folder: Path, head: Head) -> openvino.Model:
    import openvino
    import torch

    model = _module(folder, head)
    # Two rows and more tokens than one, so that the tracer takes neither axis for a constant.
    example = {name: torch.ones(2, 16, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return openvino.convert_model(model, example_input=example)
    except Exception as error:  # whatever the tracer or a missing operator raises
        raise ModelError(f"{folder}: OpenVINO cannot convert it ({type(error).__name__}: {error})") from error
