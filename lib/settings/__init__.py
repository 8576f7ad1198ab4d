"""Every configuration key of every job and application, in one place.

One YAML describes one use (`jobs/configs/reviews.yaml`); every job and application reads the same file
and takes its own section. The command line overrides single keys: `--training.epochs 2`. Unknown keys,
wrong types and impossible values end in one line that names the key (ConfigError). Imports neither torch
nor ray, so that `--help` and a mistake in a file answer in milliseconds.
"""

from lib.settings.augmentation import AugmentSettings, EditSettings, WriterSettings
from lib.settings.cleaning import (
    Bounds,
    CleanSettings,
    LengthSettings,
    NearSettings,
    QuarantineSettings,
    RepetitionSettings,
    SemanticSettings,
)
from lib.settings.data import DataSettings, HeadSettings, Labelled, Part, SourceSettings
from lib.settings.embedding import EmbedderSettings
from lib.settings.endpoint import EndpointSettings
from lib.settings.evaluation import (
    REFUSALS,
    AnswerSettings,
    Behaviour,
    EvaluationSettings,
    JudgeSettings,
    PromotionSettings,
)
from lib.settings.knowledge import GroundingSettings, KnowledgeSettings, SearchSettings
from lib.settings.labelling import ChatLabels, EmbeddingLabels, LabelSettings, NoiseSettings, RuleSettings
from lib.settings.loading import describe, load_settings, override, parse_overrides
from lib.settings.monitoring import MonitoringSettings, OpinionColumns, PlantSettings, WebhookSettings
from lib.settings.planning import PlanSettings
from lib.settings.recommend import (
    InteractionSettings,
    ItemSettings,
    OfferSettings,
    TableSettings,
    UserSettings,
)
from lib.settings.redaction import NameSettings, RedactionSettings
from lib.settings.scoring import ScoreSettings
from lib.settings.serving import (
    AccessSettings,
    CanarySettings,
    ChatEngineSettings,
    CurationSettings,
    EventSettings,
    LogSettings,
    ServingSettings,
)
from lib.settings.training import (
    AdapterSettings,
    Dimension,
    ModelSettings,
    PreferenceSettings,
    RecommenderSettings,
    TrainingSettings,
    TuningSettings,
)
from lib.settings.use import Settings, task_names

__all__ = [
    "REFUSALS",
    "AccessSettings",
    "AdapterSettings",
    "AnswerSettings",
    "AugmentSettings",
    "Behaviour",
    "Bounds",
    "CanarySettings",
    "ChatEngineSettings",
    "ChatLabels",
    "CleanSettings",
    "CurationSettings",
    "DataSettings",
    "Dimension",
    "EditSettings",
    "EmbedderSettings",
    "EmbeddingLabels",
    "EndpointSettings",
    "EvaluationSettings",
    "EventSettings",
    "GroundingSettings",
    "HeadSettings",
    "InteractionSettings",
    "ItemSettings",
    "JudgeSettings",
    "KnowledgeSettings",
    "LabelSettings",
    "Labelled",
    "LengthSettings",
    "LogSettings",
    "ModelSettings",
    "MonitoringSettings",
    "NameSettings",
    "NearSettings",
    "NoiseSettings",
    "OfferSettings",
    "OpinionColumns",
    "Part",
    "PlanSettings",
    "PlantSettings",
    "PreferenceSettings",
    "PromotionSettings",
    "QuarantineSettings",
    "RecommenderSettings",
    "RedactionSettings",
    "RepetitionSettings",
    "RuleSettings",
    "ScoreSettings",
    "SearchSettings",
    "SemanticSettings",
    "ServingSettings",
    "Settings",
    "SourceSettings",
    "TableSettings",
    "TrainingSettings",
    "TuningSettings",
    "UserSettings",
    "WebhookSettings",
    "WriterSettings",
    "describe",
    "load_settings",
    "override",
    "parse_overrides",
    "task_names",
]
