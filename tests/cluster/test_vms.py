"""Cluster files for `ray up`: taken by Ray's own schema, and a dry run of what it would do.

Amazon's EC2 and IAM are moto's here, which answer like Amazon's and check what they are asked; SSH and rsync are written
down instead of run. Google has no such stand-in: requests go to a function of this file, after Google's own client has
checked them against the description of the API that it carries.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
import yaml
from botocore.exceptions import ClientError
from googleapiclient import discovery
from googleapiclient.discovery_cache import get_static_doc
from googleapiclient.http import HttpMockSequence
from jsonschema import ValidationError
from ray.autoscaler._private import commands
from ray.autoscaler._private.gcp import config as google_config
from ray.autoscaler._private.providers import _get_node_provider, _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.scripts.scripts import start

from cluster import spot

FILES = [Path("cluster/aws.yaml"), Path("cluster/gcp.yaml")]
REGION = "eu-central-1"


def read(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    return config


def prepared(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(read(file))
    return config


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def file(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return furnished(tmp_path, monkeypatch)


def furnished(home: Path, patch: pytest.MonkeyPatch) -> Path:
    """A home with what the files ask for."""
    patch.setenv("HOME", str(home))
    for name in (".ray/auth_token", ".whorl/aws.env", ".whorl/gcp.env"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("x")
    return home


def test_ray_takes_it(file: Path, mine: Path) -> None:
    config = prepared(file)
    validate_config(config)
    workers = AutoscalingConfig(config).get_node_type_configs()
    assert {name: kind.resources for name, kind in workers.items()} == {
        "head": {"CPU": 0},
        "cpu_worker": {"CPU": 8},
        "gpu_worker": {"CPU": 8, "GPU": 1},
    }
    assert config["available_node_types"]["head"]["max_workers"] == 0
    assert config["idle_timeout_minutes"] <= 15


@pytest.mark.parametrize("place", ["", "available_node_types.gpu_worker", "auth"])
def test_an_unknown_key_is_an_error(file: Path, place: str) -> None:
    config = prepared(file)
    inside = config
    for key in filter(None, place.split(".")):
        inside = inside[key]
    inside["idle_minutes"] = 5
    with pytest.raises(ValidationError, match="idle_minutes"):
        validate_config(config)


def test_every_ray_start_is_one_that_ray_knows(file: Path) -> None:
    config = read(file)
    for kind in ("head", "worker"):
        commands_of_kind = config[f"{kind}_start_ray_commands"]
        assert commands_of_kind[0].endswith("/ray stop")
        words = shlex.split(commands_of_kind[1].replace("$RAY_HEAD_IP", "10.0.0.1"))
        call = words[len(words) - words[::-1].index("ray") :]
        assert call[0] == "start"
        given = start.make_context("start", call[1:]).params
        assert given["head"] is (kind == "head")
        assert given["metrics_export_port"] == 9464
        assert given["disable_usage_stats"]
        if kind == "head":
            assert given["dashboard_host"] == "127.0.0.1"
            assert given["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
        else:
            assert given["address"] == "10.0.0.1:6379"


def test_every_shell_command_is_one(file: Path) -> None:
    config = read(file)
    kinds = [key for key in config if key.endswith("commands")]
    found = [command for kind in kinds for command in config[kind]]
    found += config["available_node_types"]["gpu_worker"]["worker_setup_commands"]
    for command in found:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    for target, options in re.findall(r"make (\w+) ((?:\w+=\S* ?)*)", "\n".join(found)):
        planned = subprocess.run(
            ["make", "-n", target, "VENV=nowhere", *shlex.split(options)], capture_output=True, text=True
        )
        assert planned.returncode == 0, planned.stderr
        assert "requirements.lock" in planned.stdout
        assert ("vllm==" in planned.stdout) is ("DEVICE=cuda" in options)


def test_what_is_sent_is_the_code_the_lock_and_two_secrets(file: Path) -> None:
    mounts = read(file)["file_mounts"]
    ours = {there: here for there, here in mounts.items() if there.startswith("~/whorl/")}
    for there, here in ours.items():
        assert Path(here).exists(), here
        assert there == f"~/whorl/{here}"
    folders = {here for here in ours.values() if Path(here).is_dir()}
    assert folders == {"cluster", "jobs", "lib", "serve"}, "a checkout's data and history stay where they are"
    assert set(mounts) - set(ours) == {"~/whorl.env", "~/.ray/auth_token"}
    assert not re.search(
        r"(?i)(password|secret|aws_access)\w*[:=] *[\w/+]", re.sub("#.*", "", file.read_text())
    )


def test_workers_are_spot_and_the_head_is_not(file: Path) -> None:
    kinds = read(file)["available_node_types"]
    spare = {
        name
        for name, kind in kinds.items()
        if kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or kind["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
    }
    assert spare == {"cpu_worker", "gpu_worker"}


class Written:
    """In the place of `subprocess`, which runs ssh and rsync: what was to be run."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def check_call(self, words: list[str], *_: Any, **__: Any) -> int:
        self.commands.append(words)
        return 0

    def check_output(self, words: list[str], *_: Any, **__: Any) -> bytes:
        self.commands.append(words)
        return b""

    def run(self, words: list[str], *_: Any, **__: Any) -> subprocess.CompletedProcess[bytes]:
        self.commands.append(words)
        return subprocess.CompletedProcess(words, 0, b"", b"")


@pytest.fixture(scope="module")
def amazon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The bootstrapped configuration, with the two profiles in moto's account."""
    with pytest.MonkeyPatch.context() as patch:
        furnished(tmp_path_factory.mktemp("home"), patch)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"):
            patch.setenv(name, "testing")
        patch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")  # hundreds, which take seconds
        yield from bootstrapped()


def bootstrapped() -> Iterator[dict[str, Any]]:
    with moto.mock_aws():
        iam = boto3.client("iam", REGION)
        for name in ("whorl-head", "whorl-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        config = prepared(FILES[0])
        # moto has no Systems Manager behind EC2, so it is given an image by its number.
        image = boto3.client("ec2", REGION).register_image(Name="ubuntu", RootDeviceName="/dev/sda1")[
            "ImageId"
        ]
        for kind in config["available_node_types"].values():
            assert kind["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/")
            kind["node_config"]["ImageId"] = image
        provider = _get_node_provider_cls(config["provider"])
        assert provider is spot.Amazon
        yield provider.bootstrap_config(config)


def test_amazon_is_asked_for_a_head_of_its_role_behind_ssh(amazon: dict[str, Any]) -> None:
    written = Written()
    commands.get_or_create_head_node(amazon, "cluster/aws.yaml", False, False, True, None, _runner=written)
    client = boto3.client("ec2", REGION)
    (head,) = [one for r in client.describe_instances()["Reservations"] for one in r["Instances"]]
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/whorl-head")
    assert head["InstanceType"] == "m7i.xlarge"
    assert head.get("InstanceLifecycle") != "spot"
    assert head["MetadataOptions"]["HttpTokens"] == "required"
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert tags["ray-node-type"] == "head"
    assert tags["ray-node-status"] == "up-to-date"
    (group,) = client.describe_security_groups(GroupIds=[one["GroupId"] for one in head["SecurityGroups"]])[
        "SecurityGroups"
    ]
    assert group["GroupName"] == "whorl"
    world = [rule for rule in group["IpPermissions"] if rule.get("IpRanges") or rule.get("Ipv6Ranges")]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in world] == [("tcp", 22, 22)]
    within = [rule for rule in group["IpPermissions"] if rule not in world]
    assert [pair["GroupId"] for rule in within for pair in rule["UserIdGroupPairs"]] == [group["GroupId"]]
    assert {one["IamInstanceProfile"]["Name"] for one in worker_configs(amazon)} == {"whorl-worker"}

    # Files first, then the tools, the packages by the lock, and Ray.
    lines = [" ".join(words) for words in written.commands]
    order = [next(i for i, line in enumerate(lines) if what in line) for what in STEPS]
    assert order == sorted(order)
    begun = next(line for line in lines if "ray start" in line)
    assert "RAY_enable_autoscaler_v2=1" in begun
    sent = [words[-1].partition(":")[2] for words in written.commands if words[0] == "rsync"]
    assert {there.rstrip("/") for there in sent} >= set(read(FILES[0])["file_mounts"])


STEPS = (
    "uptime",
    "rsync --rsh",
    "apt-get install",
    "make setup PYTHON=python3.11",
    "/ray stop",
    "ray start --head",
)


def worker_configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    kinds: dict[str, Any] = config["available_node_types"]
    return [kind["node_config"] for name, kind in kinds.items() if name != "head"]


def worker_tags(kind: str) -> dict[str, str]:
    return {
        "ray-node-type": "worker",
        "ray-user-node-type": kind,
        "ray-node-name": "one",
        "ray-launch-config": "x",
    }


def refuse(code: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """EC2 refuses spot machines by `code`; which kinds it was asked for."""
    import botocore.client

    asked: list[str] = []
    real = botocore.client.BaseClient._make_api_call

    def call(self: Any, name: str, values: dict[str, Any]) -> Any:
        if name == "RunInstances":
            asked.append("spot" if "InstanceMarketOptions" in values else "on demand")
            if asked[-1] == "spot":
                raise ClientError({"Error": {"Code": code, "Message": "no"}}, name)
        return real(self, name, values)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", call)
    return asked


def test_amazon_without_spare_capacity_gives_machines_on_demand(
    amazon: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = _get_node_provider(amazon["provider"], "whorl-spot")
    asked = refuse("InsufficientInstanceCapacity", monkeypatch)
    config = amazon["available_node_types"]["gpu_worker"]["node_config"]
    made = provider.create_node_with_resources_and_labels(config, worker_tags("gpu_worker"), 1, {}, {})
    assert len(made) == 1
    assert asked[-1] == "on demand"
    zones = len(
        {one["AvailabilityZone"] for one in boto3.client("ec2", REGION).describe_subnets()["Subnets"]}
    )
    assert asked.count("spot") >= zones, "every zone was asked for spare capacity first"
    assert "InstanceMarketOptions" in config, "the next one is asked for as spot again"


def test_amazon_gives_spot_where_it_has_some(amazon: dict[str, Any]) -> None:
    provider = _get_node_provider(amazon["provider"], "whorl-spot")
    config = amazon["available_node_types"]["cpu_worker"]["node_config"]
    made = provider.create_node(config, worker_tags("cpu_worker"), 1)
    assert [one.instance_lifecycle for one in made.values()] == ["spot"]


def test_what_is_wrong_with_the_configuration_is_not_asked_for_again(
    amazon: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = _get_node_provider(amazon["provider"], "whorl-spot")
    asked = refuse("UnauthorizedOperation", monkeypatch)
    config = amazon["available_node_types"]["cpu_worker"]["node_config"]
    with pytest.raises(Exception, match="UnauthorizedOperation"):
        provider.create_node(config, worker_tags("cpu_worker"), 1)
    assert set(asked) == {"spot"}


SCHEMAS = json.loads(get_static_doc("compute", "v1"))["schemas"]


def unknown(value: Any, schema: dict[str, Any], place: str) -> list[str]:
    """Keys, and words out of a list of allowed ones, that Google's description of an API does not have."""
    if "$ref" in schema:
        schema = SCHEMAS[schema["$ref"]]
    if isinstance(value, list):
        return [found for one in value for found in unknown(one, schema["items"], place)]
    if not isinstance(value, dict):
        return [f"{place}: {value}"] if "enum" in schema and value not in schema["enum"] else []
    if "additionalProperties" in schema:  # labels, whose keys are anybody's
        return [
            found
            for inner in value.values()
            for found in unknown(inner, schema["additionalProperties"], place)
        ]
    keys = schema.get("properties", {})
    return [
        found
        for key, inner in value.items()
        for found in (unknown(inner, keys[key], f"{place}.{key}") if key in keys else [f"{place}.{key}"])
    ]


def test_google_knows_every_key_of_a_machine() -> None:
    for name, kind in read(FILES[1])["available_node_types"].items():
        assert unknown(kind["node_config"], {"$ref": "Instance"}, name) == []
    assert unknown({"disks": [{"bootable": 1}]}, {"$ref": "Instance"}, "x") == ["x.disks.bootable"]


class Cloud:
    """What Google's three APIs answer, as far as Ray asks; `requests` are what it asked for."""

    def __init__(self, refused: str | None = None) -> None:
        self.refused, self.requests = refused, list[tuple[str, str, dict[str, Any]]]()

    def request(self, uri: str, method: str = "GET", body: str | None = None, **_: Any) -> tuple[Any, bytes]:
        asked = json.loads(body) if body else {}
        path = uri.partition("?")[0]
        self.requests.append((method, path, asked))
        return HttpMockSequence([({"status": "200"}, json.dumps(self._answer(method, path, asked)))]).request(
            uri
        )

    def _answer(self, method: str, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/instances") and method == "POST":
            spare = asked.get("scheduling", {}).get("provisioningModel") == "SPOT"
            return {"name": "refused" if spare and self.refused else "done"}
        if path.endswith("/operations/refused"):
            return {"name": "refused", "status": "DONE", "error": {"errors": [{"code": self.refused}]}}
        if "/serviceAccounts/" in path:
            return {"email": path.rpartition("/")[2], "projectId": "my-project"}
        if path.endswith("/subnetworks"):
            return {"items": [{"selfLink": "regions/europe-west4/subnetworks/default"}]}
        if path.endswith(":getIamPolicy"):
            return {"bindings": []}
        if path.endswith("/projects/my-project"):
            return {
                "name": "my-project",
                "projectId": "my-project",
                "lifecycleState": "ACTIVE",
                "commonInstanceMetadata": {},
            }
        return {"name": "done", "status": "DONE"}


@pytest.fixture
def google(mine: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    cloud = Cloud()
    from ray.autoscaler._private.gcp.node import GCPCompute

    def build(name: str, version: str, **_: Any) -> Any:
        return discovery.build_from_document(get_static_doc(name, version), http=cloud)

    monkeypatch.setattr(google_config.discovery, "build", build)
    monkeypatch.setattr(GCPCompute, "get_new_authorized_http", lambda *_: cloud)
    return cloud


def test_google_is_asked_for_machines_of_their_accounts(google: Cloud, mine: Path) -> None:
    """Ray's preparations and the request for a machine, checked by Google's client; no machine, and so no SSH."""
    config = prepared(FILES[1])
    provider_class = _get_node_provider_cls(config["provider"])
    assert provider_class is spot.Google
    config = provider_class.bootstrap_config(config)
    key = Path(config["auth"]["ssh_private_key"])
    assert key.stat().st_mode & 0o777 == 0o600
    provider = _get_node_provider(config["provider"], "whorl")
    head = {**config["head_node"], **config["available_node_types"]["head"]["node_config"]}
    provider.create_node(head, {**worker_tags("head"), "ray-node-type": "head"}, 1)
    for kind in ("cpu_worker", "gpu_worker"):
        node = config["available_node_types"][kind]["node_config"]
        provider.create_node(node, worker_tags(kind), 1)
    made = [
        asked for method, path, asked in google.requests if method == "POST" and path.endswith("/instances")
    ]
    emails = [[one["email"].partition("@")[0] for one in asked["serviceAccounts"]] for asked in made]
    assert emails == [["whorl-head"], ["whorl-worker"], ["whorl-worker"]]
    assert [asked.get("scheduling", {}).get("provisioningModel") for asked in made] == [None, "SPOT", "SPOT"]
    for asked in made:
        assert unknown(asked, {"$ref": "Instance"}, "instance") == []
        assert asked["networkInterfaces"][0]["subnetwork"].endswith("subnetworks/default")


@pytest.mark.parametrize(
    ("code", "falls_back"), [("ZONE_RESOURCE_POOL_EXHAUSTED", True), ("RESOURCE_NOT_FOUND", False)]
)
def test_google_without_spare_capacity(google: Cloud, code: str, falls_back: bool) -> None:
    config = prepared(FILES[1])
    google.refused = code
    provider = _get_node_provider(config["provider"], "whorl")
    node = config["available_node_types"]["gpu_worker"]["node_config"]
    if not falls_back:
        with pytest.raises(Exception, match=code):
            provider.create_node(node, worker_tags("gpu_worker"), 2)
        return
    assert len(provider.create_node(node, worker_tags("gpu_worker"), 2)) == 2
    made = [
        asked for method, path, asked in google.requests if method == "POST" and path.endswith("/instances")
    ]
    assert [asked["scheduling"].get("provisioningModel") for asked in made] == ["SPOT", None, "SPOT", None]


def test_ray_itself_does_not_fall_back() -> None:
    """Why cluster/spot.py is there: a launch that was refused is no reason for Ray's scheduler to take another type."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    for status, known in ((Instance.ALLOCATION_FAILED, {}), (Instance.ALLOCATION_TIMEOUT, {"spot": 0.0})):
        monitor.notify([InstanceUpdateEvent(instance_type="spot", new_instance_status=status)])
        assert monitor.get_recoverable_resource_availabilities() == known
