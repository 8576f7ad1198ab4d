"""Model versions: registered once, never changed, found by number or by alias, promoted through a gate.

    models/NAME/VERSION/    the model directory, and version.json: every file's checksum, and the lineage
    MLflow's registry       the same lineage as tags; the aliases champion and candidate

A number is taken in the database first, whose unique key gives no two promotions the same one. Then the
directory is published under it, and only that makes the version exist: for a promotion that was killed in
between, a row stays in MLflow that no reader here takes for a version.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lib import champions, storage, tracking
from lib.artifacts import ADAPTER_FOLDER, PICKLES, EvalReport, ModelRef, TaskFile, check_model_directory
from lib.direction import gain, lower_is_better
from lib.errors import ConfigError, ModelError, RegistryError, nearest
from lib.settings import PromotionSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient

VERSION_FILE = "version.json"
REFERENCE = re.compile(r"^(?P<name>[a-z0-9][a-z0-9_-]{0,62})@(?P<version>[A-Za-z0-9_.-]+)$")
CHAMPION, CANDIDATE = "champion", "candidate"
NOT_FOUND = (
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_PARAMETER_VALUE",
)  # MLflow's codes for an unknown name, alias


@dataclass(frozen=True)
class Condition:
    """One measured condition of the gate."""

    what: str
    value: float
    threshold: float
    metric: str = ""
    at_most: bool = False
    """The value must not be above the threshold, whichever way the metric counts; otherwise it must be better."""

    @property
    def holds(self) -> bool:
        if self.at_most:
            return self.value <= self.threshold
        return gain(self.metric, self.value, than=self.threshold) > 0


def gate(report: EvalReport, champion: EvalReport | None, promotion: PromotionSettings) -> list[Condition]:
    """What a candidate must meet: better than each baseline, and than the present champion if there is one, and
    no behaviour failing more often than it may.

    A baseline that cannot have the metric, such as one without probabilities, is no rival in it. Both reports
    must be of the same dataset. Raises RegistryError when they are not, or when a report lacks the metric or a
    behaviour, or all baselines lack the metric.
    """
    if champion is not None and champion.dataset != report.dataset:
        raise RegistryError(
            f"candidate and champion were measured on different datasets ({report.dataset}, {champion.dataset})"
        )
    rivals = {f"baseline {name}": figures for name, figures in report.baselines.items()}
    if not rivals:
        raise RegistryError(
            f"the report of run {report.run} has no baselines; run python -m jobs.evaluate again"
        )
    metric = promotion.metric or report.deciding
    rivals = {name: figures for name, figures in rivals.items() if metric in figures} or rivals
    if champion is not None:
        rivals["present champion"] = champion.metrics
    for figures in (report.metrics, *rivals.values()):
        if metric not in figures:
            raise RegistryError(f"no metric {metric!r} was measured{nearest(metric, figures)}")
    side, step = ("below", -1) if lower_is_better(metric) else ("above", 1)
    conditions = [
        Condition(
            f"{metric} {side} {name}",
            report.metrics[metric],
            figures[metric] + step * promotion.min_gain,
            metric,
        )
        for name, figures in rivals.items()
    ]
    measured = {behaviour["name"]: behaviour for behaviour in report.behaviours}
    for name, most in promotion.behaviours.items():
        if name not in measured:
            raise RegistryError(
                f"behaviour {name!r} was not measured of run {report.run}; run python -m jobs.evaluate again"
            )
        if not measured[name]["cases"]:
            raise RegistryError(
                f"behaviour {name!r} has no case in the test split, and so cannot be a condition;"
                " give more rows or leave it out of promotion.behaviours"
            )
        conditions.append(
            Condition(f"failures of {name}", measured[name]["failure_rate"], most, at_most=True)
        )
    return conditions


def register(run: tracking.Run, report: EvalReport) -> ModelRef:
    """Make the run's exported model a version; a run that is a version already gives that one.

    Raises RegistryError when the run has left no model, ModelError when its directory cannot be served.
    """
    name = run.ref.name
    if not storage.published(run.ref.model_uri):
        raise RegistryError(f"run {run.ref.id} has left no model; run python -m jobs.finetune again")
    if existing := _version_of(run.client, name, run.ref.id):
        return existing
    with storage.local_copy(run.ref.model_uri) as folder:
        check_safe(folder)
        lineage = _lineage(run, report, TaskFile.read(folder))
        ref = ModelRef(name, _take_number(run, lineage))
        try:
            with storage.publish(ref.uri) as scratch:
                shutil.copytree(
                    folder, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns(storage.COMPLETE)
                )
                if storage.published(run.ref.adapter_uri):
                    with storage.local_copy(run.ref.adapter_uri) as adapter:
                        check_safe(adapter, is_model=False)
                        shutil.copytree(
                            adapter, scratch / ADAPTER_FOLDER, ignore=shutil.ignore_patterns(storage.COMPLETE)
                        )
                version = {
                    "format": 1,
                    "name": name,
                    "version": ref.version,
                    **lineage,
                    "files": _files(scratch),
                }
                storage.write_json(str(scratch / VERSION_FILE), version)
        except BaseException:
            if not storage.published(ref.uri):
                run.client.delete_model_version(name, str(ref.version))
            raise
    note(ref, uri=ref.uri)
    return ref


def parse_reference(reference: str) -> tuple[str, str]:
    """Name and version or alias. Raises ConfigError."""
    match = REFERENCE.match(reference)
    if match is None:
        raise ConfigError(f"model {reference!r} must look like reviews@champion or reviews@3")
    return match["name"], match["version"]


def resolve(name: str, version: str = CHAMPION) -> ModelRef:
    """The version behind a number or an alias. Raises RegistryError, with the mend, when there is none."""
    if version.isdigit():
        ref = ModelRef(name, int(version))
    else:
        found = _alias(tracking.client(), name, version)
        if found is None:
            raise RegistryError(_no_alias(name, version))
        ref = found
    if not storage.published(ref.uri):
        have = ", ".join(str(v.version) for v in versions(name)) or "none"
        raise RegistryError(
            f"no model version {ref} in storage (there are: {have}); run python -m jobs.promote"
        )
    return ref


def champion(name: str) -> ModelRef | None:
    """The present champion, or None. Raises RegistryError when its files are gone."""
    if _alias(tracking.client(), name, CHAMPION) is None:
        return None
    return resolve(name, CHAMPION)


def versions(name: str) -> list[ModelRef]:
    """All versions of a model, oldest first."""
    folder = storage.join(storage.root(), "models", name)
    found = sorted(int(entry) for entry in storage.ls(folder) if entry.isdigit())
    return [ref for ref in (ModelRef(name, number) for number in found) if storage.published(ref.uri)]


def set_alias(ref: ModelRef, alias: str) -> None:
    """Point an alias at a version, away from whichever had it."""
    tracking.client().set_registered_model_alias(ref.name, alias, str(ref.version))


def crown(ref: ModelRef, instead_of: ModelRef | None, why: str = "promoted") -> bool:
    """Make a version champion instead of the one that it was compared with.

    False, and nothing done, when the champion is another by now: the comparison is out of date.
    """
    number = champions.latest(ref.name) + 1
    if champion(ref.name) != instead_of:
        return False
    if not champions.record(ref.name, number, ref.version, instead_of.version if instead_of else None, why):
        return False
    set_alias(ref, CHAMPION)
    return True


def roll_back(name: str, why: str) -> tuple[ModelRef, ModelRef]:
    """Make the version champion that was it before the present one: which went, and which came.

    Done again, it goes back one more. Raises RegistryError when there is no champion, none before it is known, or
    another change came in between.
    """
    present = resolve(name, CHAMPION)
    number = champions.before(name, present.version)
    if number is None:
        raise RegistryError(f"{present} has no champion before it; promote another version instead")
    ref = resolve(name, str(number))
    if not crown(ref, present, champions.ROLLBACK + why):
        raise RegistryError(f"the champion of {name} changed meanwhile; look at it, and roll back again")
    note(present, rolled_back=why)
    return present, ref


def describe(ref: ModelRef) -> dict[str, Any]:
    """version.json: lineage, metrics, checksums."""
    values: dict[str, Any] = storage.read_json(storage.join(ref.uri, VERSION_FILE))
    return values


def note(ref: ModelRef, **tags: str) -> None:
    """Write tags on a version's page in MLflow. The version itself does not change."""
    db = tracking.client()
    for key, value in tags.items():
        db.set_model_version_tag(ref.name, str(ref.version), key, value)


@contextmanager
def open_version(ref: ModelRef) -> Iterator[Path]:
    """A version as a local directory, its files verified. Raises ModelError when they are not as registered."""
    with open_directory(ref.uri) as folder:
        yield folder


@contextmanager
def open_directory(uri: str) -> Iterator[Path]:
    """The same by the version's place, where another process may keep its files elsewhere."""
    with storage.local_copy(uri) as folder:
        verify(folder)
        yield folder


def verify(folder: Path) -> None:
    """Compare every file of a version's directory with the checksum taken when it was registered.

    Raises ModelError for a file that is missing, changed or new.
    """
    if not (folder / VERSION_FILE).is_file():
        raise ModelError(f"{folder} holds no {VERSION_FILE}; it is not a registered model version")
    expected = storage.read_json(str(folder / VERSION_FILE)).get("files", {})
    found = _files(folder)
    for file in sorted(expected.keys() | found.keys()):
        if expected.get(file) != found.get(file):
            state = "is missing" if file not in found else "is new" if file not in expected else "has changed"
            raise ModelError(
                f"{folder / file} {state} since this version was registered; restore it, or promote another version"
            )


def check_safe(folder: Path, is_model: bool = True) -> None:
    """Refuse a directory that could not be served, or that holds anything which unpickles on loading.

    Raises ModelError for an absent directory, absent or broken safetensors weights, any pickled file. An adapter's
    directory is no model's, and checked for all but being one.
    """
    if is_model:
        check_model_directory(folder)
    from safetensors import SafetensorError, safe_open

    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix in PICKLES:
            raise ModelError(f"{path} unpickles on loading; remove it: models load from safetensors only")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="np") as weights:
                    weights.keys()
            except SafetensorError as error:
                raise ModelError(
                    f"{path} is not a safetensors file ({error}); export the model again"
                ) from error


def _lineage(run: tracking.Run, report: EvalReport, info: TaskFile) -> dict[str, Any]:
    """Where a model comes from: data, configuration, code, libraries, and how good it was."""
    artifacts = run.artifacts_uri()
    environment = storage.read_json(storage.join(artifacts, "environment.json"))
    return {
        "run": run.ref.id,
        "task": info.task,
        "base": info.base,
        "labels": info.labels,
        "dataset": info.dataset,
        "git_commit": environment["git_commit"],
        "versions": environment["versions"],
        "config": yaml.safe_load(storage.read_bytes(storage.join(artifacts, "config.yaml"))),
        "metrics": report.metrics,
        "deciding": report.deciding,
        "baselines": {
            name: figures[report.deciding]
            for name, figures in report.baselines.items()
            if report.deciding in figures
        },
        "registered": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _take_number(run: tracking.Run, lineage: dict[str, Any]) -> int:
    """A new version number, with the lineage as tags. The database gives each number once."""
    from mlflow.exceptions import MlflowException

    name, db = run.ref.name, run.client
    try:
        db.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {key: str(lineage[key]) for key in ("task", "base", "dataset", "git_commit")}
    tags["config"] = storage.join(run.artifacts_uri(), "config.yaml")
    tags["versions"] = ", ".join(f"{package} {number}" for package, number in lineage["versions"].items())
    tags |= {f"test/{metric}": f"{value:.4f}" for metric, value in lineage["metrics"].items()}
    while True:
        row = db.create_model_version(name, source=run.ref.model_uri, run_id=run.ref.id, tags=tags)
        ref = ModelRef(name, int(row.version))
        if not storage.exists(ref.uri):
            return ref.version
        # The database is younger than the storage: it was made anew, or the model was deleted there.
        db.delete_model_version(name, str(ref.version))


def _version_of(db: MlflowClient, name: str, run_id: str) -> ModelRef | None:
    rows = db.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    refs = sorted((ModelRef(name, int(row.version)) for row in rows), key=lambda ref: ref.version)
    return next((ref for ref in refs if storage.published(ref.uri)), None)


def _alias(db: MlflowClient, name: str, alias: str) -> ModelRef | None:
    from mlflow.exceptions import MlflowException

    try:
        return ModelRef(name, int(db.get_model_version_by_alias(name, alias).version))
    except MlflowException as error:
        if error.error_code in NOT_FOUND:
            return None
        raise


def _no_alias(name: str, alias: str) -> str:
    """The line for an alias that points nowhere."""
    models = {model.name: model.aliases for model in tracking.client().search_registered_models()}
    if name not in models:
        return f"no champion of {name!r} yet{nearest(name, models)}; run python -m jobs.promote first"
    if alias == CHAMPION:
        have = ", ".join(str(v.version) for v in versions(name))
        return (
            f"no champion of {name!r} yet (versions: {have or 'none'});"
            " run python -m jobs.promote with a candidate that meets the gate"
        )
    known = ", ".join(sorted(models[name])) or "none"
    return f"no alias {alias!r} of {name!r}{nearest(alias, models[name])} (there are: {known}); give one or a number"


def _files(folder: Path) -> dict[str, str]:
    """Path inside the folder → SHA-256, of all files but the registry's own."""
    own = {VERSION_FILE, storage.COMPLETE}
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in own)
    return {p.relative_to(folder).as_posix(): storage.checksum(str(p)) for p in paths}
