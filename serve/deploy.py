"""Deploy a model version to the running cluster, or move what is deployed on to another one.

    python -m serve.deploy --config jobs/configs/reviews.yaml [--serving.model reviews@3] [--serving.port 8001]

The alias (`champion` by default) is resolved here, once, so that every replica serves the same version.
When only the version differs from what runs, replicas swap it without a restart and without losing a
request, after a trial beside the one that answers where `serving.canary` asks for it; other changes of `serving`
replace replicas one by one. Chat's versions are engines that start anew: when one does not start, what ran before is
deployed again, and is champion again. Other applications are left alone.
"""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, NoReturn

from lib import canary, command, registry, storage, tracking
from lib.artifacts import TASK_FILE, ModelRef
from lib.errors import ConfigError, ModelError, RegistryError, ResourceError, WhorlError
from lib.registry import parse_reference
from lib.retrieval.index import current
from lib.settings import ServingSettings, Settings
from lib.tasks import load_task, served_as
from serve.http import STARTING

if TYPE_CHECKING:
    from ray.serve._private.client import ServeControllerClient

# Another version of these tasks is another engine, not something that a replica swaps.
STARTED_ANEW = ("chat",)
EVERYWHERE = ("0.0.0.0", "::")


def deploy(settings: Settings) -> str:
    """Deploy what `serving` describes, wait until it answers, and return its URL.

    Raises RegistryError for an alias or version that does not exist, ModelError for one that cannot be
    served, ResourceError for a port in use, missing CPUs or an absent cluster.
    """
    ref = registry.resolve(*parse_reference(_reference(settings)))
    _check_task(ref, settings)
    _check_knowledge(settings)
    if not (os.environ.get("RAY_ADDRESS") or command.running_cluster() or _connected()):
        raise ResourceError("no cluster is up to deploy to; python -m cluster.local up starts one")
    command.connect()
    _check_resources(settings)
    client = _start_serve(settings.serving)
    before = client.get_serve_details()["applications"].get(settings.name)
    _apply(client, settings, ref)
    url = address(settings.serving)
    try:
        _wait(client, settings, ref, url)
    except (ModelError, ResourceError) as error:
        if served_as(settings) not in STARTED_ANEW or not before or before["status"] != "RUNNING":
            raise
        _go_back(client, settings, ref, before["deployed_app_config"], error)
    return url


def application_config(settings: Settings, ref: ModelRef, instead_of: str | None = None) -> dict[str, Any]:
    """The application as `serve deploy` would read it from a file; `instead_of` answers while `ref` is on trial.

    The version is in `user_config` alone, what Ray Serve changes without restarting replicas; or, for a task
    that starts its engine anew, in the arguments.
    """
    # Where it listens is Ray Serve's matter, not the replica's: a change of these restarts nothing.
    elsewhere = {"model", "host", "port", "route_prefix", "start_timeout_s"}
    arguments = settings.serving.model_dump(mode="json", exclude=elsewhere)
    if settings.monitoring is not None:  # what only a back-test reads restarts nothing
        arguments["monitoring"] = settings.monitoring.model_dump(mode="json", exclude={"replay"})
    application: dict[str, Any] = {
        "name": settings.name,
        "route_prefix": settings.serving.route_prefix,
        "import_path": f"serve.{served_as(settings)}:application",
        "runtime_env": _runtime_env(),
        "args": arguments,
    }
    if served_as(settings) in STARTED_ANEW:
        arguments["model"] = _reference(settings)
        # An engine of adapters follows their aliases itself; another version would start it anew.
        arguments["version"] = None if settings.serving.chat.adapters else ref.version
    else:
        follows = {"model": str(ref)} | ({"instead_of": instead_of} if instead_of else {})
        application["deployments"] = [{"name": served_as(settings).capitalize(), "user_config": follows}]
    return application


def _reference(settings: Settings) -> str:
    return settings.serving.model or f"{settings.name}@champion"


def address(serving: ServingSettings) -> str:
    """The application's URL, as this machine reaches it."""
    host = "127.0.0.1" if serving.host in EVERYWHERE else serving.host
    return f"http://{host}:{serving.port}{serving.route_prefix.rstrip('/')}"


def _check_task(ref: ModelRef, settings: Settings) -> None:
    task = storage.read_json(storage.join(ref.uri, TASK_FILE)).get("task")
    if task != served_as(settings):
        raise ModelError(
            f"{ref} is a {task} model, but task is {settings.task}; choose another serving.model"
        )


def _check_knowledge(settings: Settings) -> None:
    knowledge = settings.serving.knowledge
    if knowledge is None:
        return
    if served_as(settings) != "chat":
        raise ConfigError(f"serving.knowledge: only chat is grounded, not {settings.task}; leave it out")
    current(knowledge.index)


def _connected() -> bool:
    import ray

    return bool(ray.is_initialized())


def _check_resources(settings: Settings) -> None:
    """Ray Serve would wait for ever for a replica that no node can hold."""
    import ray

    from serve.scaling import ingresses

    serving, has = settings.serving, ray.cluster_resources()
    for kind, each in (("CPU", serving.cpus_per_replica), ("GPU", serving.gpus_per_replica)):
        wanted = each * max(serving.min_replicas, 1)
        if kind == "CPU" and served_as(settings) in STARTED_ANEW:
            wanted += ingresses(serving)  # before the engines
        if wanted > has.get(kind, 0):
            raise ResourceError(
                f"{serving.min_replicas} replica(s) want {wanted:g} {kind}, and the cluster has "
                f"{has.get(kind, 0):g}; lower serving.min_replicas or serving.{kind.lower()}s_per_replica"
            )


def _start_serve(serving: ServingSettings) -> ServeControllerClient:
    """Connect to Ray Serve, after starting it where it does not run."""
    from ray import serve as ray_serve

    # `ray.serve` deploys an application in place only through a file and the dashboard's REST API. Its
    # client is what that API itself calls; it uses the connection (and the token) that we already have.
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        _require_free(serving)
        listening = {
            "host": serving.host,
            "port": serving.port,
        }
        try:
            ray_serve.start(http_options=listening)
        except Exception:
            # Its controller stays otherwise, bound to this port for as long as the cluster is up.
            ray_serve.shutdown()
            raise
        client = _get_global_client()
    listens = client.get_serve_details()["http_options"]["port"]
    if listens != serving.port:
        raise ResourceError(
            f"Ray Serve already listens on port {listens}, one for all applications; "
            f"use --serving.port {listens}, or stop it first (make stop)"
        )
    return client


def _require_free(serving: ServingSettings) -> None:
    with socket.socket(socket.AF_INET6 if ":" in serving.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise ResourceError(
                f"port {serving.port} on {serving.host} is in use or not ours ({error.strerror}); "
                "end what uses it or take another with --serving.port N"
            ) from error


def _apply(client: ServeControllerClient, settings: Settings, ref: ModelRef) -> None:
    running = client.get_serve_details()["applications"]
    ours = application_config(settings, ref, _instead_of(running.get(settings.name), settings, ref))
    for name, found in running.items():
        if name != settings.name and found["route_prefix"] == ours["route_prefix"]:
            raise ResourceError(
                f"application {name!r} already answers under {ours['route_prefix']}; "
                f"set serving.route_prefix, such as /{settings.name}"
            )
    _deploy_beside_others(client, ours)


def _deploy_beside_others(client: ServeControllerClient, application: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    # A configuration names all applications: what it does not name is deleted.
    others = [
        found["deployed_app_config"]
        for name, found in client.get_serve_details()["applications"].items()
        if name != application["name"] and found["deployed_app_config"]
    ]
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [*others, application]}))


def _go_back(
    client: ServeControllerClient,
    settings: Settings,
    ref: ModelRef,
    before: dict[str, Any],
    error: WhorlError,
) -> NoReturn:
    """Deploy what ran before `ref`, and make it champion again where `ref` is. Raises ModelError, which says so."""
    name, version = parse_reference(before["args"]["model"])
    said = str(error)
    if registry.champion(ref.name) == ref and before["args"].get("version") not in (None, ref.version):
        try:
            registry.roll_back(ref.name, f"did not start: {said}")
        except RegistryError as other:
            said += f"; {other}"
    _deploy_beside_others(client, before)
    earlier = ModelRef(name, before["args"].get("version") or registry.resolve(name, version).version)
    try:
        _wait(
            client,
            settings,
            earlier,
            address(settings.serving.model_copy(update={"route_prefix": before["route_prefix"]})),
        )
    except (ModelError, ResourceError) as other:
        raise ModelError(f"{said}; and what ran before did not come back: {other}") from error
    raise ModelError(f"{said}; {earlier} answers again, as before") from error


def _instead_of(app: dict[str, Any] | None, settings: Settings, ref: ModelRef) -> str | None:
    """The version that answers now, where `ref` is to stand trial beside it.

    Raises ModelError when that trial was lost already.
    """
    deployments = app and app["deployed_app_config"] and app["deployed_app_config"].get("deployments")
    if settings.serving.canary is None or not deployments:
        return None
    follows = deployments[0].get("user_config") or {}
    try:
        asked, before = (
            registry.resolve(*parse_reference(follows[key])) if key in follows else None
            for key in ("model", "instead_of")
        )
    except RegistryError:  # what answers now is in the registry no more, and no replica could load it again
        return None
    earlier = asked and canary.find(settings.name, asked.version)
    answering = asked if before is None or (earlier and earlier.passed) else before
    trial = canary.find(settings.name, ref.version)
    if answering in (None, ref) or (trial and trial.passed):
        return None
    if trial and trial.passed is False:
        raise ModelError(
            f"{ref} did not pass its trial: {trial.why}; promote another version, or deploy it without a trial by "
            "--serving.canary null"
        )
    return str(answering)


def _runtime_env() -> dict[str, Any]:
    import ray

    runtime_env: dict[str, Any] = {"env_vars": tracking.places()}
    # A submitted job's code lies in the cluster under a URI, and its replicas need the same code.
    code = ray.get_runtime_context().runtime_env.get("working_dir")
    if code and "://" in code:
        runtime_env["working_dir"] = code
    return runtime_env


def _wait(client: ServeControllerClient, settings: Settings, ref: ModelRef, url: str) -> None:
    """Until the replicas serve `ref`. Raises ModelError with the reason when they do not."""
    name, seconds = settings.name, settings.serving.start_timeout_s
    deadline = time.monotonic() + seconds
    state = "DEPLOYING"
    while time.monotonic() < deadline:
        app = client.get_serve_details()["applications"].get(name)
        state = str(app["status"].value if app else state)
        if app and state in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ModelError(f"{name} did not deploy: {_reason(app)}")
        if state == "RUNNING":
            status, answer = _ask(f"{url}/readyz")
            if status == 200 and f"{answer['model']}@{answer['version']}" == str(ref):
                return
            if status == 200 and (answer["trial"] or "").startswith(f"{ref}:"):
                return
            if status == 200 and answer["failed"]:
                raise ModelError(f"{answer['model']}@{answer['version']} goes on serving: {answer['failed']}")
            if status == 503 and answer["error"]["code"] != STARTING:
                raise ModelError(f"{name} is deployed, but not ready: {answer['error']['message']}")
        time.sleep(0.2)
    raise ResourceError(
        f"{name} was not ready within {seconds:g} s (state {state}); see ray status, or raise serving.start_timeout_s"
    )


def _reason(app: dict[str, Any]) -> str:
    """The last line of what Ray Serve says: above it is a traceback."""
    said = [app["message"], *(d["message"] for d in app["deployments"].values())]
    lines = [line.strip() for message in said for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray Serve gives no reason"


def _ask(url: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        try:
            return error.code, json.load(error)
        except ValueError:  # the ingress itself, whose routes come a moment after the replicas
            return 0, {}
    except OSError:
        return 0, {}


def job(settings: Settings) -> None:
    url = deploy(settings)
    _, answer = _ask(f"{url}/readyz")
    print(f"serving {answer['model']}@{answer['version']} ({answer['engine']}) at {url}")
    if answer["trial"]:
        print(f"  on trial  {answer['trial']}")
    print(f"  API docs  {url}/docs")
    task = served_as(settings)
    example = load_task(task).Request.model_json_schema()["examples"][0]
    path = getattr(load_task(task), "ROUTE", f"/v1/{task}")
    print(f"  try it    curl -s {url}{path} -H 'content-type: application/json' -d '{json.dumps(example)}'")


if __name__ == "__main__":
    command.main(job)
