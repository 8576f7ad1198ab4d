"""Runs, written down in MLflow: parameters, curves, plots, the resolved configuration, the environment.

`WHORL_DATABASE` is the URL of the database (SQLite under the storage root by default, PostgreSQL at
scale); artifacts lie under the storage root. No MLflow server is needed: jobs write to both directly,
and `make ui` shows them. mlflow takes seconds to import, so it is imported when a run starts.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import yaml

from lib import storage
from lib.artifacts import RunRef
from lib.errors import RegistryError, StorageError, WhorlError
from lib.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "deepspeed",
    "pyarrow",
    "tokenizers",
    "openvino",
    "scikit-learn",
    "mlflow",
)

WAIT_S = 10
POSTGRESQL = ("postgresql", "postgresql+psycopg")
"""The same: it is the driver that SQLAlchemy takes where none is named."""
TABLES_LOCK = 0x77686F726C
"""PostgreSQL's number for the lock under which tables are made."""


def database_url() -> str:
    """SQLAlchemy URL of the database that holds runs and the model registry."""
    url = os.environ.get("WHORL_DATABASE")
    if url:
        return url
    return f"sqlite:///{storage.PROJECT / '.whorl' / 'whorl.db'}"


def checked_url() -> str:
    """The same. Raises StorageError for what is neither SQLite nor PostgreSQL: MLflow would take it for a folder."""
    url = database_url()
    kind = url.partition("://")[0] if "://" in url else "no URL"
    if not url.startswith("sqlite:///") and kind not in POSTGRESQL:
        raise StorageError(
            f"WHORL_DATABASE is {kind}; it must be sqlite:///path or postgresql://user:password@host/name"
        )
    return url


def places() -> dict[str, str]:
    """The environment that makes another process keep its files and rows where this one does."""
    return {"WHORL_STORAGE": storage.root(), "WHORL_DATABASE": database_url()}


def client() -> MlflowClient:
    """An MLflow client on the database. Raises StorageError when it cannot be opened."""
    # The hub of plug-ins is not needed, and its telemetry must not leave a company's machines.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # read when mlflow is imported
    logging.getLogger("alembic").setLevel(logging.WARNING)
    url = checked_url()
    if url.startswith("sqlite:///"):
        try:
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"WHORL_DATABASE {url}: cannot make its folder: {error.strerror}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        try:
            with tables_made_once(url):
                db = MlflowClient(tracking_uri=url, registry_uri=url)
                db.search_registered_models(max_results=1)  # its tables are looked at on first use only
        except Exception as error:
            shown = database_url_shown()
            raise StorageError(f"WHORL_DATABASE {shown}: {type(error).__name__}: {error}") from error
        return db


@contextmanager
def tables_made_once(url: str) -> Iterator[None]:
    """Let one process at a time open a database.

    The first to open it makes MLflow's tables by some forty migrations; two processes that do so at the
    same moment both fail ("duplicate column name") and leave a database that neither can use.
    """
    if url.startswith("sqlite:///"):
        with open(url.removeprefix("sqlite:///") + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        return
    from sqlalchemy import NullPool, create_engine, func, select

    with create_engine(url, poolclass=NullPool, connect_args=patience(url)).connect() as connection:
        # Held by this connection, and let go with it, also where its process is killed.
        connection.execute(select(func.pg_advisory_lock(TABLES_LOCK)))
        yield


def patience(url: str) -> dict[str, Any]:
    """How long a database is waited for, as `connect_args` of SQLAlchemy's `create_engine`."""
    if url.startswith("sqlite:///"):
        return {"timeout": WAIT_S}
    # A host that is gone without a word is noticed as soon, also by a connection that is open.
    return {"connect_timeout": WAIT_S, "tcp_user_timeout": WAIT_S * 1000, "keepalives_idle": 30}


@dataclass(frozen=True)
class Run:
    """An open or finished run."""

    ref: RunRef
    client: MlflowClient

    def log_metrics(self, values: dict[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = [Metric(k, float(v), now, step) for k, v in values.items()]
        self.client.log_batch(self.ref.id, metrics=metrics)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(self.ref.id, str(path), folder)

    def log_dict(self, values: dict[str, Any], file: str) -> None:
        self.client.log_dict(self.ref.id, values, file)

    def tag(self, **tags: str) -> None:
        for key, value in tags.items():
            self.client.set_tag(self.ref.id, key, value)

    def tags(self) -> dict[str, str]:
        return dict(self.client.get_run(self.ref.id).data.tags)

    def last_step(self, metric: str) -> int:
        """The highest step at which a metric was logged; -1 when it never was."""
        return max((m.step for m in self.client.get_metric_history(self.ref.id, metric)), default=-1)

    def status(self) -> str:
        """`RUNNING`, `FINISHED`, `FAILED` or `KILLED`; a driver that was killed leaves it at `RUNNING`."""
        return str(self.client.get_run(self.ref.id).info.status)

    def settings(self) -> Settings:
        """The configuration that the run was started with.

        Raises StorageError when it is gone, ValueError when this version of Whorl does not know its keys.
        """
        text = storage.read_bytes(storage.join(self.artifacts_uri(), "config.yaml"))
        return Settings.model_validate(yaml.safe_load(text))

    def driver_is_alive(self) -> bool:
        """Whether the process that drives the run still runs. Only seen from the machine that it runs on."""
        host, pid, started = self.tags().get("driver", ":0:0").rsplit(":", 2)
        if host == socket.gethostname():
            with suppress(psutil.NoSuchProcess):
                # A start is told from the time of boot, which the clock's adjustments move a little.
                return abs(psutil.Process(int(pid)).create_time() - float(started)) < 2
        return False

    def artifacts_uri(self) -> str:
        """Where `log_file` and `log_dict` put things, config.yaml and environment.json among them."""
        return str(self.client.get_run(self.ref.id).info.artifact_uri)


@contextmanager
def start_run(kind: str, settings: Settings) -> Iterator[Run]:
    """Open a run of a job (`finetune`, `tune` …); it ends FINISHED, FAILED or KILLED.

    The resolved configuration and the environment are written first, so that a failed run can be
    understood too.
    """
    db = client()
    experiment = _experiment(db, settings.name)
    tags = {"kind": kind, "name": settings.name, "task": settings.task, "status": "running"}
    if pipeline := os.environ.get("WHORL_PIPELINE"):
        tags["pipeline"] = pipeline
    tags |= {"git_commit": git_commit(), "driver": _driver()}
    created = db.create_run(experiment, tags=tags, run_name=f"{kind}-{settings.name}")
    run = Run(RunRef(created.info.run_id, settings.name), db)
    params = {k: str(v)[:6000] for k, v in _flatten(settings.model_dump(mode="json")).items()}
    from mlflow.entities import Param

    db.log_batch(run.ref.id, params=[Param(k, v) for k, v in params.items()])
    db.log_text(run.ref.id, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), "config.yaml")
    db.log_text(run.ref.id, json.dumps(environment(), indent=2), "environment.json")
    with _ending(run):
        yield run


@contextmanager
def resume_run(run: Run, settings: Settings) -> Iterator[Run]:
    """Open a run again that did not finish; it ends as one of `start_run` does.

    Its parameters and curves stay; the configuration and the environment that it goes on with are written
    beside the first ones.
    """
    tags = run.tags()
    times = int(tags.get("resumed", 0)) + 1
    run.client.update_run(run.ref.id, status="RUNNING")
    run.tag(resumed=str(times), driver=_driver(), git_commit=git_commit())
    if pipeline := os.environ.get("WHORL_PIPELINE"):
        run.tag(pipeline=pipeline)
    if "error" in tags:
        run.client.delete_tag(run.ref.id, "error")
    values = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    run.client.log_text(run.ref.id, values, f"resumed-{times}/config.yaml")
    run.client.log_text(run.ref.id, json.dumps(environment(), indent=2), f"resumed-{times}/environment.json")
    with _ending(run):
        yield run


@contextmanager
def _ending(run: Run) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        if isinstance(error, WhorlError):
            run.tag(error=str(error)[:4000])
        run.client.set_terminated(run.ref.id, status=status)
        raise
    run.client.set_terminated(run.ref.id, status="FINISHED")


def _driver() -> str:
    """This process by a name that no later one has."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def attach(ref: RunRef) -> Run:
    """The same run, from another process."""
    return Run(ref, client())


def find_run(settings: Settings, kind: str, run_id: str | None = None, tag: str | None = None) -> Run:
    """The run with this id, or else the latest finished run of this kind and name that carries `tag`.

    Inside a pipeline (`WHORL_PIPELINE` is set) only the pipeline's own runs count, so that two
    pipelines side by side do not take each other's. Raises RegistryError when there is none.
    """
    db = client()
    if run_id:
        try:
            found = db.get_run(run_id)
        except Exception:
            raise RegistryError(f"no run {run_id!r} in {database_url_shown()}; make ui lists them") from None
        return Run(RunRef(found.info.run_id, found.data.tags.get("name", settings.name)), db)
    experiment = db.get_experiment_by_name(settings.name)
    where = f"tags.kind = '{kind}' and attributes.status = 'FINISHED'"
    if pipeline := os.environ.get("WHORL_PIPELINE"):
        where += f" and tags.pipeline = '{pipeline}'"
    if tag:
        where += f" and tags.{tag} != ''"
    runs = (
        db.search_runs(
            [experiment.experiment_id], where, order_by=["attributes.start_time DESC"], max_results=1
        )
        if experiment
        else []
    )
    if not runs:
        raise RegistryError(
            f"no finished {kind} run of {settings.name!r}{f' that is {tag}' if tag else ''};"
            f" run python -m jobs.{'evaluate' if tag == 'evaluated' else kind} first"
        )
    return Run(RunRef(runs[0].info.run_id, settings.name), db)


def child(parent: str, trial: str, settings: Settings) -> Run | None:
    """The run of a search's trial, when an interrupted search has begun it."""
    return next((run for run in children(parent, settings.name) if run.tags().get("trial") == trial), None)


def children(parent: str, name: str) -> list[Run]:
    """The runs of a search's trials, in the experiment `name`."""
    db = client()
    experiment = db.get_experiment_by_name(name)
    if experiment is None:
        return []
    found = db.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    return [Run(RunRef(run.info.run_id, name), db) for run in found]


def unfinished_runs(settings: Settings, kind: str) -> list[Run]:
    """Runs of this kind and name that failed, were killed, or still run; the latest first."""
    db = client()
    experiment = db.get_experiment_by_name(settings.name)
    if experiment is None:
        return []
    where = f"tags.kind = '{kind}' and attributes.status != 'FINISHED'"
    found = db.search_runs([experiment.experiment_id], where, order_by=["attributes.start_time DESC"])
    return [Run(RunRef(run.info.run_id, settings.name), db) for run in found]


def database_url_shown() -> str:
    """The database URL without its password, for messages."""
    from sqlalchemy.engine import make_url

    try:
        return make_url(database_url()).render_as_string(hide_password=True)
    except ValueError:  # what it cannot read may have a password anywhere in it
        return database_url().partition("://")[0] + "://…"


def git_commit() -> str:
    """The commit of the working tree (`-dirty` when it differs), `WHORL_COMMIT`, or `unknown`."""
    if given := os.environ.get("WHORL_COMMIT"):
        return given
    try:
        call = [
            "git",
            "-C",
            str(storage.PROJECT),
            "describe",
            "--always",
            "--abbrev=40",
            "--dirty",
            "--exclude",
            "*",
        ]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment() -> dict[str, Any]:
    """Versions, commit and hardware: what a result depends on besides its configuration."""
    return {"versions": versions(), "git_commit": git_commit(), "machine": machine()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, operating system."""
    name, flags = platform.processor(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        name = next(
            (li.split(":")[1].strip() for li in text.splitlines() if li.startswith("model name")), name
        )
        flags = next((li.split(":")[1] for li in text.splitlines() if li.startswith("flags")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    bf16 = sorted({"avx512_bf16", "amx_bf16"} & set(flags.split()))
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "bf16": bf16,
        "os": platform.platform(),
    }


def cpu_precision() -> Literal["bf16", "fp32"]:
    """What this machine's processor computes in: bf16 is up to a hundred times slower where it lacks it."""
    return "bf16" if machine()["bf16"] else "fp32"


def _experiment(db: MlflowClient, name: str) -> str:
    found = db.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    try:
        return str(db.create_experiment(name, artifact_location=storage.join(storage.root(), "mlflow", name)))
    except Exception:
        # Another job made it between the two calls.
        found = db.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
