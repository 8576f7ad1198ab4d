"""One use, whole: all sections together."""

from __future__ import annotations

from pathlib import Path

from pydantic import (
    field_validator,
    model_validator,
)

from lib.errors import nearest
from lib.settings.data import DataSettings
from lib.settings.evaluation import EvaluationSettings, PromotionSettings
from lib.settings.knowledge import KnowledgeSettings
from lib.settings.labelling import LabelSettings
from lib.settings.monitoring import MonitoringSettings
from lib.settings.planning import PlanSettings
from lib.settings.scoring import ScoreSettings
from lib.settings.sections import Name, Section
from lib.settings.serving import CurationSettings, ServingSettings
from lib.settings.training import ModelSettings, TrainingSettings, TuningSettings


class Settings(Section):
    """One use, whole: what `jobs/configs/*.yaml` holds."""

    name: Name
    """Names the dataset, the runs and the registered model."""
    task: str
    """A module of `lib.tasks`."""
    data: DataSettings
    model: ModelSettings
    training: TrainingSettings = TrainingSettings()
    tuning: TuningSettings = TuningSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    promotion: PromotionSettings = PromotionSettings()
    plan: PlanSettings = PlanSettings()
    serving: ServingSettings = ServingSettings()
    curation: CurationSettings = CurationSettings()
    score: ScoreSettings = ScoreSettings()
    label: LabelSettings = LabelSettings()
    knowledge: KnowledgeSettings = KnowledgeSettings()
    monitoring: MonitoringSettings | None = None
    """None: the application takes no opinions."""

    @field_validator("task")
    @classmethod
    def _task(cls, value: str) -> str:
        known = task_names()
        if value not in known:
            raise ValueError(f"no task {value!r}{nearest(value, known)} (known: {', '.join(known)})")
        return value

    @model_validator(mode="after")
    def _markers(self) -> Settings:
        if self.model.case_markers and self.task != "tagging":
            raise ValueError(
                f"model.case_markers: {self.task} does not take them, only tagging does; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _grounded(self) -> Settings:
        if self.data.grounded and self.task != "chat":
            raise ValueError(f"data.grounded: only chat is grounded, not {self.task}; leave it out")
        if self.data.grounded and self.serving.knowledge is None:
            raise ValueError("data.grounded needs serving.knowledge, the name of an index; add it")
        return self

    @model_validator(mode="after")
    def _refit(self) -> Settings:
        own = self.model.recommender
        if self.data.interactions.refit and own.ranker != "none" and own.ranker_from is None:
            raise ValueError(
                "data.interactions.refit: validation teaches no ranker then; name the model directory of the run before in "
                "model.recommender.ranker_from, or set model.recommender.ranker to none"
            )
        return self

    @model_validator(mode="after")
    def _parts(self) -> Settings:
        if bool(self.data.parts) != (self.task == "multitask"):
            raise ValueError("the task multitask needs data.parts, and only it takes them")
        return self

    def part(self, name: str) -> Settings:
        """What a part would be as a use of its own, called `NAME-PART`."""
        part = self.data.parts[name]
        whole = self.model_dump(mode="json")
        data = part.model_dump(mode="json", exclude={"task", "weight", "metric"})
        return Settings.model_validate(
            whole
            | {"name": f"{self.name}-{name}", "task": part.task, "data": data}
            | {"training": whole["training"] | {"metric": part.metric}}
            | {"evaluation": whole["evaluation"] | {"behaviours": []}}
            | {"promotion": whole["promotion"] | {"behaviours": {}, "metric": part.metric}}
        )

    @model_validator(mode="after")
    def _monitoring(self) -> Settings:
        if self.monitoring is not None:
            if self.task != "sentiment":
                raise ValueError(
                    f"monitoring: {self.task} gives no opinions, only sentiment does; leave it out"
                )
            heads = list(self.data.heads.values())
            self.monitoring.check_labels(heads[0].label_names if heads else self.data.label_names)
        return self

    @model_validator(mode="after")
    def _labelled(self) -> Settings:
        sizes = [len(head.label_names) for head in self.data.heads.values()]
        self.label.check_labels(self.data.class_names, max([*sizes, len(self.data.label_names)]))
        return self

    @model_validator(mode="after")
    def _behaviours(self) -> Settings:
        names = [behaviour.name for behaviour in self.evaluation.behaviours]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"evaluation.behaviours: {name!r} is there twice")
        for name in self.promotion.behaviours:
            if name not in names:
                raise ValueError(f"promotion.behaviours: no behaviour {name!r}{nearest(name, names)}")
        return self

    @model_validator(mode="after")
    def _weights(self) -> Settings:
        chosen = {"training": (self.training.class_weights, self.data.class_names)}
        for name, head in self.data.heads.items():
            chosen[f"data.heads.{name}"] = (head.class_weights or "none", head.label_names)
        for section, (weights, known) in chosen.items():
            for label in weights if isinstance(weights, dict) else ():
                if label not in known:
                    raise ValueError(f"{section}.class_weights: no label {label!r}{nearest(label, known)}")
        return self


def task_names() -> list[str]:
    """The tasks there are: the modules of `lib/tasks`, found by looking, not by a list."""
    folder = Path(__file__).parents[1] / "tasks"
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
