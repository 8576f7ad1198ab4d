"""Deploying, following and swapping model versions on a real Ray Serve."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.ingress import free_port
from lib import keys, storage
from lib.artifacts import ModelRef
from lib.errors import ConfigError, ModelError, RegistryError, ResourceError
from lib.registry import parse_reference
from lib.settings import CanarySettings, ServingSettings, load_settings
from serve.deploy import application_config, deploy
from tests.serve.conftest import Endpoint, key, make_settings, publish_version

pytestmark = pytest.mark.ray


@contextmanager
def load(endpoint: Endpoint, clients: int = 8) -> Iterator[list[tuple[int, int]]]:
    """Clients that ask without a pause; the status and version of every answer. A lost one has status 0."""
    answers: list[tuple[int, int]] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                answer = endpoint.post({"inputs": ["great fabric", "bad"]})
                answers.append((answer.status, answer.body.get("version", 0)))
            except OSError:
                answers.append((0, 0))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def move_to(endpoint: Endpoint, version: int) -> None:
    serving = endpoint.settings.serving.model_copy(update={"model": f"reviews@{version}"})
    deploy(endpoint.settings.model_copy(update={"serving": serving}))


def replica_processes() -> list[int]:
    from ray import serve as ray_serve

    replicas = ray_serve.context._get_global_client().get_serve_details()["applications"]["reviews"]
    found = replicas["deployments"]["Sentiment"]["replicas"]
    return [replica["pid"] for replica in found if replica["state"] == "RUNNING"]


def test_a_new_version_takes_over_under_load_without_a_lost_request(endpoint: Endpoint) -> None:
    before = replica_processes()
    with load(endpoint) as answers:
        while len(answers) < 50:
            time.sleep(0.05)
        for version in (2, 1, 2):
            move_to(endpoint, version)
            # The deploy has returned: nobody who asks now may get the old one.
            assert endpoint.post({"inputs": ["great"]}).body["version"] == version
        after = len(answers)
        while len(answers) < after + 50:
            time.sleep(0.05)
    assert {status for status, _ in answers} == {200}
    assert {version for _, version in answers} == {1, 2}
    assert {version for _, version in answers[-8:]} == {2}
    assert replica_processes() == before  # swapped in place
    move_to(endpoint, 1)


def test_a_version_that_does_not_load_leaves_the_old_one_serving(endpoint: Endpoint) -> None:
    with load(endpoint) as answers, pytest.raises(ModelError, match=r"reviews@1 goes on serving: .*2 labels"):
        move_to(endpoint, 9)
    assert set(answers) == {(200, 1)}
    ready = endpoint.get("/readyz")
    assert ready.status == 200
    assert "task.json names 2 labels" in ready.body["failed"]
    move_to(endpoint, 1)
    assert endpoint.get("/readyz").body["failed"] is None


def test_a_version_on_trial_takes_over_after_enough_requests(endpoint: Endpoint) -> None:
    limits = {"max_disagreement": 1, "max_drift": 1, "max_latency_ratio": 1000}
    canary = CanarySettings.model_validate({"share": 1, "requests": 20} | limits)

    def on_trial(version: int) -> None:
        chosen = {"model": f"reviews@{version}", "canary": canary}
        deploy(
            endpoint.settings.model_copy(
                update={"serving": endpoint.settings.serving.model_copy(update=chosen)}
            )
        )

    on_trial(1)  # nothing else answers yet that it could be compared with
    on_trial(2)
    ready = endpoint.get("/readyz").body
    assert ready["version"] == 1
    assert ready["trial"].startswith("reviews@2: 0 of 20")
    with load(endpoint, 2) as answers:
        deadline = time.monotonic() + 60
        while (not answers or answers[-1][1] == 1) and time.monotonic() < deadline:
            time.sleep(0.1)
    versions = [version for status, version in answers if status == 200]
    assert len(versions) == len(answers)
    assert set(versions) == {1, 2}
    assert versions[:19] == [1] * 19
    with pytest.raises(ModelError, match=r"reviews@2 goes on serving: reviews@9 did not pass its trial: "):
        on_trial(9)
    with pytest.raises(ModelError, match=r"reviews@9 did not pass its trial: .*--serving\.canary null"):
        on_trial(9)
    move_to(endpoint, 1)


def test_replicas_rise_and_fall_with_the_load_without_a_lost_request(endpoint: Endpoint) -> None:
    chosen = {
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2,
        "look_back_s": 2,
        "cpus_per_replica": 0.5,
    }
    serving = endpoint.settings.serving.model_copy(update={"model": "reviews@1", **chosen})
    deploy(endpoint.settings.model_copy(update={"serving": serving}))

    def reaches(count: int) -> bool:
        deadline = time.monotonic() + 90
        while len(replica_processes()) != count and time.monotonic() < deadline:
            time.sleep(0.2)
        return len(replica_processes()) == count

    with load(endpoint, 12) as many:
        assert reaches(2)
    with load(endpoint, 1) as few:
        assert reaches(1)
        after = len(few)
        while len(few) < after + 20:
            time.sleep(0.05)
    assert {status for status, _ in [*many, *few]} == {200}
    move_to(endpoint, 1)


def test_a_version_whose_files_changed_is_not_served(
    endpoint: Endpoint, store: Path, tiny_base: Path
) -> None:
    publish_version(tiny_base, 4)
    weights = store / "models" / "reviews" / "4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=r"goes on serving: .*model\.safetensors has changed"):
        move_to(endpoint, 4)
    move_to(endpoint, 1)


def test_another_port_than_the_running_one_is_refused(endpoint: Endpoint) -> None:
    port = endpoint.settings.serving.port
    settings = make_settings(model="reviews@1", port=port + 1)
    with pytest.raises(ResourceError, match=f"already listens on port {port}"):
        deploy(settings)


def test_more_cpus_than_the_cluster_has_are_refused(endpoint: Endpoint) -> None:
    serving = endpoint.settings.serving.model_copy(update={"cpus_per_replica": 99})
    with pytest.raises(
        ResourceError, match=r"want 99 CPU, and the cluster has 8; lower serving\.min_replicas"
    ):
        deploy(endpoint.settings.model_copy(update={"serving": serving}))


def test_a_version_that_is_not_there_is_refused(endpoint: Endpoint) -> None:
    with pytest.raises(RegistryError, match=r"no model version reviews@7 .*there are: 1, 2.*jobs\.promote"):
        move_to(endpoint, 7)


def test_the_model_of_another_task_is_refused(endpoint: Endpoint) -> None:
    storage.write_json(storage.join(ModelRef("reviews", 8).uri, "task.json"), {"task": "tagging"})
    storage.write_bytes(storage.join(ModelRef("reviews", 8).uri, storage.COMPLETE), b"")
    with pytest.raises(ModelError, match="reviews@8 is a tagging model"):
        move_to(endpoint, 8)


def test_only_chat_is_grounded(store: Path) -> None:
    with pytest.raises(ConfigError, match=r"serving\.knowledge: only chat is grounded, not sentiment"):
        deploy(make_settings(model="reviews@1", knowledge="shop"))


def test_two_applications_share_the_port_by_their_prefixes(endpoint: Endpoint) -> None:
    from ray import serve as ray_serve

    serving = endpoint.settings.serving.model_copy(update={"model": "reviews@2"})
    other = endpoint.settings.model_copy(update={"name": "complaints", "serving": serving})
    with pytest.raises(ResourceError, match=r"set serving\.route_prefix, such as /complaints"):
        deploy(other)
    serving = serving.model_copy(update={"route_prefix": "/complaints"})
    url = deploy(other.model_copy(update={"serving": serving}))
    assert url.endswith("/complaints")
    second = Endpoint(url, other, endpoint.key)
    assert second.post({"inputs": ["great"]}).body["version"] == 2
    assert "/complaints/" in second.get("/docs").body
    # A key's limit is one for all replicas of the cluster.
    _, few = keys.create("few", ["*"], requests_per_minute=4)
    limited = [replace(one, key=few).post({"inputs": ["great"]}) for one in (endpoint, second) * 3]
    assert [answer.status for answer in limited] == [200] * 4 + [429] * 2
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in limited[:4]] == list("3210")
    # The first was neither touched nor removed.
    assert endpoint.post({"inputs": ["great"]}).body["version"] == 1
    ray_serve.delete("complaints")
    move_to(endpoint, 1)


def test_a_port_that_is_taken_is_one_line(store: Path, ray_cluster: None) -> None:
    import socket

    from ray import serve as ray_serve

    ray_serve.shutdown()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"port {port} on 127\.0\.0\.1 is in use .*--serving\.port"):
            deploy(make_settings(model="reviews@1", port=port))


def test_without_a_champion_the_command_ends_in_one_line(tmp_path: Path) -> None:
    import os

    config = tmp_path / "reviews.yaml"
    config.write_text(yaml.safe_dump(make_settings().model_dump(mode="json", exclude_defaults=True)))
    places = {"WHORL_STORAGE": str(tmp_path / "s"), "WHORL_DATABASE": f"sqlite:///{tmp_path / 'w.db'}"}
    done = subprocess.run(
        [sys.executable, "-m", "serve.deploy", "--config", str(config)],
        capture_output=True,
        text=True,
        cwd=storage.PROJECT,
        env=os.environ | places,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "champion" in done.stderr


@pytest.mark.parametrize("reference", ["reviews", "reviews@", "@3", "Re views@3", "reviews@3@4", "../x@1"])
def test_a_reference_of_another_form_is_refused(reference: str) -> None:
    with pytest.raises(ConfigError, match="must look like reviews@champion or reviews@3"):
        parse_reference(reference)


def test_only_the_version_changes_in_place(ray_cluster: None) -> None:
    """What restarts replicas (`args`, `runtime_env`) is the same for two versions of one configuration."""
    one, two = (application_config(make_settings(), ModelRef("reviews", v)) for v in (1, 2))
    assert one.pop("deployments") != two.pop("deployments")
    assert one == two


def test_the_shipped_file_is_what_serve_deploy_reads() -> None:
    from ray.serve.schema import ServeDeploySchema

    values = yaml.safe_load((storage.PROJECT / "serve" / "config.yaml").read_text())
    config = ServeDeploySchema.model_validate(values)
    for app in config.applications:
        ServingSettings.model_validate(app.args)
        module, _, builder = app.import_path.partition(":")
        assert hasattr(__import__(module, fromlist=[builder]), builder)
        parse_reference(app.args.get("model") or app.deployments[0].user_config["model"])
    assert [(app.name, app.route_prefix) for app in config.applications] == [
        ("reviews", "/"),
        ("shop", "/shop"),
        ("movies", "/movies"),
    ]
    shop = load_settings("jobs/configs/shop_chat.yaml").serving
    assert ServingSettings.model_validate(config.applications[1].args).knowledge == shop.knowledge
    assert config.http_options.port == ServingSettings().port


def test_the_builder_makes_the_size_from_the_settings() -> None:
    from serve.sentiment import application

    fixed = application(ServingSettings(max_replicas=1))._bound_deployment
    assert fixed.num_replicas == 1
    scaled = application(ServingSettings(max_replicas=3, target_ongoing_requests=5))._bound_deployment
    scaling = scaled._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 5)


def test_a_replica_without_a_model_says_so_and_takes_it_when_it_comes(
    store: Path, ray_cluster: None, tiny_base: Path
) -> None:
    """What `serve deploy` with an alias does before the first promotion: up, unready, then ready by itself."""
    from ray import serve as ray_serve

    from lib import tracking
    from serve.sentiment import Arguments, Sentiment

    port = free_port()
    ray_serve.shutdown()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = Sentiment.options(
        user_config={"model": "reviews@5"}, ray_actor_options={"runtime_env": {"env_vars": tracking.places()}}
    ).bind(Arguments())
    ray_serve.run(app, name="reviews", route_prefix="/")
    endpoint = Endpoint(f"http://127.0.0.1:{port}", make_settings(), key())
    for answer in (endpoint.get("/readyz"), endpoint.post({"inputs": ["great"]})):
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.body["error"]["code"] == "not_ready"
        assert "no model version reviews@5" in answer.body["error"]["message"]
    assert endpoint.get("/healthz").status == 200
    publish_version(tiny_base, 5)
    deadline = time.monotonic() + 30
    while endpoint.get("/readyz").status != 200 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert endpoint.post({"inputs": ["great"]}).body["version"] == 5
    ray_serve.shutdown()
