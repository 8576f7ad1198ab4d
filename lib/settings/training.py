"""Keys of `model`, `training` and `tuning`: from a dataset to a model (`jobs.finetune`, `jobs.tune`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from lib.settings.data import ClassWeights
from lib.settings.sections import Positive, Section, Share


class RecommenderSettings(Section):
    """recommend: what is built around the encoder (`lib.recommender.model`)."""

    width: Annotated[int, Field(ge=4)] = 64
    """Of the vectors of items and users."""
    sequence: Literal["gru", "transformer"] = "gru"
    """What reads a user's history (Hidasi et al. 2016; Kang and McAuley 2018)."""
    layers: Positive = 1
    heads: Positive = 2
    """Of the transformer's attention."""
    history: Annotated[int, Field(ge=2)] = 200
    """Interactions that are read of a user, the latest ones; training learns from as many."""
    text: Literal["frozen", "tuned", "none"] = "frozen"
    """frozen: the encoder's vectors, computed once, below a learned map; tuned: the encoder is trained too; none:
    items are known by their id and features alone."""
    id_dropout: Share = 0.1
    """Share of the items that a training step knows by text and features alone, as it is with new ones."""
    item_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Of the vectors of the history."""
    user_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Of the user's vector."""
    time_gaps: bool = True
    """Whether the model is told how long after the one before each interaction came."""
    new_bias: float | None = None
    """Added to the scores of items that training has not seen; None: fitted on the validation split."""
    sampled: Annotated[int, Field(ge=0)] = 0
    """0: softmax over the whole catalogue; else over what is foreseen in the batch and so many items drawn by
    popularity, corrected for how likely each was to be there (Yi et al. 2019)."""
    ranker: Literal["cross", "none"] = "cross"
    """cross: a cross network puts the retrieval's best in order (`lib.recommender.ranker`), fitted on the validation split after
    training; none: the retrieval's order is the answer."""
    ranker_from: str | None = None
    """URI of the model directory whose ranker is taken, where validation can teach none (`data.interactions.refit`)."""
    exact_items: Annotated[int, Field(ge=0)] = 100_000
    """A request looks at all items of a catalogue of so many or fewer. One that has more gets an index at export, which reads
    a small part of them, and a replica holds a second copy of its vectors (`lib.recommender.index`)."""

    @model_validator(mode="after")
    def _heads(self) -> RecommenderSettings:
        if self.sequence == "transformer" and self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads, {self.heads}")
        return self


class ModelSettings(Section):
    """What is fine-tuned."""

    base: str
    """`sample://NAME`, a local directory, any storage URI, or a hub id."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Longest sequence in tokens, special tokens included; longer texts are cut."""
    dropout: Share | None = None
    """Dropout of the encoder; None keeps what the base model's config says."""
    case_markers: bool = False
    """tagging: a token behind each word with capitals, for a base whose tokeniser makes everything small."""
    chat_template: str | None = None
    """chat: `chatml` or the file of a Jinja template; None takes the base model's own."""
    trust_remote_code: bool = False
    recommender: RecommenderSettings = RecommenderSettings()


class AdapterSettings(Section):
    """Matrices of low rank beside the weights (PEFT), trained in their place; fresh heads are trained whole."""

    kind: Literal["lora", "dora"] = "lora"
    """lora: Hu et al. 2021; dora: magnitude and direction apart (Liu et al. 2024)."""
    rank: Positive = 8
    alpha: Positive = 16
    """The product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapters' input."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the modules that get an adapter, such as `[query, value]`; all-linear: every linear map of the layers."""


class PreferenceSettings(Section):
    """Direct preference optimisation (`lib.tasks.preference`)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to its base: the larger, the closer it stays."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that is taken to be the wrong way round (conservative DPO, Mitchell 2023)."""
    length_normalised: bool = False
    """Compare log-probabilities per token instead of per answer."""
    sft: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answer's mean negative log-likelihood beside the loss (Pang et al. 2024)."""


class TrainingSettings(Section):
    """From a dataset to a model (`jobs.finetune`): Ray Train workers, each with a DeepSpeed engine."""

    workers: Positive | tuple[Positive, Positive] = 2
    """A number, or `[least, most]`: as many as the cluster has room for, changing with it."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage (Rajbhandari et al. 2020): 0 replicates, 1 shards optimiser state, 2 gradients too, 3 parameters too."""
    zero_init: bool = True
    """In ZeRO-3 the model is divided while it is read, so that no worker ever holds all of it."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in the host's memory instead of the GPU's: nothing, optimiser states (ZeRO-1 to 3), or parameters
    too (ZeRO-3)."""
    offload_path: str | None = None
    """Folder on an NVMe disk of each node that takes what `offload` names instead of the host's memory (ZeRO-3)."""
    deepspeed: str | dict[str, Any] | None = None
    """DeepSpeed's own configuration, a JSON file or a mapping, laid over ours; what another key decides is refused."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer and compute the rest again in the backward pass (Chen et al. 2016)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the processor or GPU has it, else fp32."""
    epochs: Positive = 3
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    adapter: AdapterSettings | None = None
    """None trains the weights themselves."""
    layers: Positive | None = None
    """Train only so many of the last layers and what comes after them; None trains all."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor by which each layer learns more slowly than the one above it; the head learns at `learning_rate`
    (Howard and Ruder 2018; Clark et al. 2020)."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Strength of the uniform noise on the embeddings while training (NEFTune, Jain et al. 2023); 0 is none."""
    warmup: Share = 0.1
    """Share of all steps over which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    tokens_per_batch: Positive = 2048
    """Padded tokens in one micro-batch of one worker."""
    accumulation: Positive = 1
    """Micro-batches between two optimiser steps."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest L2 norm of the gradient; 0 switches clipping off."""
    packing: bool | None = None
    """Several examples in one sequence of `model.max_length`, none of which sees another; None: where the task
    can (chat)."""
    class_weights: ClassWeights = "none"
    """balanced: rows / (classes · rows of the class), or a weight for each label."""
    label_smoothing: Share = 0.0
    preference: PreferenceSettings = PreferenceSettings()
    validate_every: Literal["epoch"] | Positive = "epoch"
    """Validate after each epoch, or every N optimiser steps."""
    metric: str | None = None
    """The validation metric that decides which checkpoint is best and when to stop (`loss` and `perplexity` count
    down); with several heads one's own, such as `topic/macro_f1`, or the mean over them. None takes the task's
    own: macro_f1, or loss for chat."""
    patience: Positive | None = 2
    """Stop after this many validations without a better metric; None trains to the end."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as better."""
    shuffle_rows: Positive = 4096
    """Rows one worker holds while it shuffles and forms batches of like lengths."""
    log_every: Positive = 10
    checkpoint_every: Literal["validation"] | Positive = "validation"
    """Save what training can go on from at each validation, or every N optimiser steps. The best so far
    and the end are always saved."""
    keep_checkpoints: Positive = 1
    """How many of the best checkpoints are kept; the latest is kept besides."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How often a run goes on by itself, from its latest checkpoint, after a worker or a node failed; -1 is no limit."""
    resume: str | None = None
    """Id of a run to go on with, or `auto`: the latest unfinished run of this configuration, else a new one."""
    seed: int = 0
    ignore_plan: bool = False
    """Train even where the planner says that this machine's memory cannot hold it."""

    @field_validator("workers")
    @classmethod
    def _workers(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[least, most] must rise, not fall from {value[0]} to {value[1]}")
        return value

    @model_validator(mode="after")
    def _together(self) -> TrainingSettings:
        if self.adapter and self.layers:
            raise ValueError("adapter and layers exclude each other; leave one of them out")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload {self.offload} needs zero_stage 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload all needs zero_stage 3, not {self.zero_stage}")
        if self.offload_path and (self.offload == "none" or self.zero_stage != 3):
            raise ValueError("offload_path needs zero_stage 3 and offload optimizer or all")
        if self.offload_path and not isinstance(self.workers, int):
            raise ValueError("offload_path needs a fixed number of workers")
        return self

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Dimension(Section):
    """Values that one key may take in a search: exactly one of these."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    """Even over the exponents: for values such as a learning rate."""
    integer: tuple[int, int] | None = None
    """Both ends included."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Dimension:
        given = {name: value for name, value in self.__dict__.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}, not {len(given)}")
        kind, value = self.chosen
        if kind != "choice" and value[0] >= value[1]:
            raise ValueError(f"{kind} must rise, not go from {value[0]:g} to {value[1]:g}")
        if kind == "log_uniform" and value[0] <= 0:
            raise ValueError(f"log_uniform must begin above 0, not at {value[0]:g}")
        return self

    @property
    def chosen(self) -> tuple[str, Any]:
        """Which kind it is, and its value."""
        return next((name, value) for name, value in self.__dict__.items() if value is not None)

    @property
    def ends(self) -> list[Any]:
        """Values that stand for all: both ends, or every choice."""
        return list(self.chosen[1])


class TuningSettings(Section):
    """How better settings are searched (`jobs.tune`), judged by `training.metric` on the validation split."""

    space: dict[str, Dimension] = {}
    """Key of `training` or `model` → what it may be, such as `training.learning_rate: {log_uniform: [1e-5, 1e-3]}`."""
    trials: Positive = 8
    algorithm: Literal["random", "tpe"] | None = None
    """tpe: values near those that were good, by Optuna; random: drawn independently. None is tpe, and random
    where the scheduler is pbt, which chooses values itself."""
    scheduler: Literal["none", "asha", "pbt"] = "asha"
    """asha: of the trials with as many validations, only the best 1 / `reduction` go on; none: all to their end;
    pbt: population based training, all trials to their end while the worst take over from the best."""
    grace: Positive = 1
    """Validations before a trial may be ended."""
    reduction: Annotated[int, Field(ge=2)] = 3
    perturb_every: Positive = 1
    """pbt: validations between two moments at which trials take over from others."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """pbt: the share of the trials that takes over, from the best trials that are as many."""
    concurrency: Positive | None = None
    """Trials at a time; None: as many as the cluster has room for."""
    resume: str | None = None
    """Id of an interrupted search to go on with."""
    seed: int = 0

    @field_validator("space")
    @classmethod
    def _space(cls, value: dict[str, Dimension]) -> dict[str, Dimension]:
        for key in value:
            if key.partition(".")[0] not in ("training", "model"):
                raise ValueError(
                    f"{key!r} cannot be searched; keys of training and model can, such as training.learning_rate"
                )
        return value
