"""What k8s/ has from other files of the project, written there: environment, applications, alert rules.

    python -m cluster.kubernetes [--check]     (make k8s)

Kubernetes reads none of our Python and takes a Serve configuration as a text inside another file, so that some of its
manifests say again what is said elsewhere. They are written here and never by hand; `--check` writes nothing and ends with
exit code 2 where one is not what would be written now.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from cluster import local
from lib import storage
from lib.command import ALONE
from lib.errors import ConfigError, WhorlError
from lib.manifests import dump

FOLDER = storage.PROJECT / "k8s"
# Where the image has the code and its packages (cluster/Dockerfile).
IMAGE = PurePosixPath("/opt/whorl")
PACKAGES = IMAGE / ".venv/lib/python3.11/site-packages"
# Of an image, of each overlay, or of the token's Secret; and what holds for a cluster of one machine alone.
NOT_OURS = {"PATH", "WHORL_STORAGE", "WHORL_DATABASE", *ALONE}
WRITTEN = "# Written by make k8s from {}: change it there.\n"
# On a GPU, what serves with it: arguments of an application.
ON_GPU = {"shop": {"gpus_per_replica": 1}}


def environment() -> dict[str, str]:
    """`cluster.local.environment()` as it is in a pod: the same names, with the paths of the image."""
    here = {
        str(Path(sysconfig.get_path("purelib"))): str(PACKAGES),
        str(storage.PROJECT): str(IMAGE),
    }
    found = {}
    for name, value in local.environment().items():
        if name in NOT_OURS:
            continue
        if name == "PYTHONPATH":  # what else is on this machine's path is not in the image
            value = str(IMAGE)
        for place, there in here.items():
            value = value.replace(place, there)
        found[name] = value
    return dict(sorted(found.items()))


def serve_config(
    only: tuple[str, ...] = (), arguments: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """serve/config.yaml as a pod needs it: it listens on all addresses, or nobody would reach it.

    `only` names the applications that are taken, all by default; `arguments` has for an application what its `args` say
    besides. Raises ConfigError for an application that is not there.
    """
    config: dict[str, Any] = yaml.safe_load((storage.PROJECT / "serve/config.yaml").read_text())
    names = [application["name"] for application in config["applications"]]
    for name in (*only, *(arguments or {})):
        if name not in names:
            raise ConfigError(f"serve/config.yaml has no application {name!r} (it has {', '.join(names)})")
    config["http_options"]["host"] = "0.0.0.0"
    config["applications"] = [a for a in config["applications"] if not only or a["name"] in only]
    for application in config["applications"]:
        if more := (arguments or {}).get(application["name"]):
            application["args"] = {**application.get("args", {}), **more}
    return config


def service(config: dict[str, Any]) -> str:
    """A patch that gives the RayService its applications."""
    patch = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "whorl-service"},
        "spec": {"serveConfigV2": dump(config)},
    }
    return WRITTEN.format("serve/config.yaml") + dump(patch)


def digest() -> str:
    """A patch that starts the service's cluster anew when its environment is another: pods read it when they start."""
    value = {"whorl/environment": storage.fingerprint(environment())}
    path = "/spec/rayClusterConfig/headGroupSpec/template/metadata/annotations"
    return WRITTEN.format("cluster/local.py") + dump([{"op": "add", "path": path, "value": value}])


def rules() -> str:
    """cluster/observability/rules.yaml as the Prometheus operator takes it."""
    found = yaml.safe_load((storage.PROJECT / "cluster/observability/rules.yaml").read_text())
    return WRITTEN.format("cluster/observability/rules.yaml") + dump(
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": "whorl", "labels": {"app.kubernetes.io/component": "alerts"}},
            "spec": found,
        }
    )


def files() -> dict[str, str]:
    """Path below k8s/ → what is written there."""
    lines = "".join(f"{name}={value}\n" for name, value in environment().items())
    return {
        "base/generated/environment.env": WRITTEN.format("cluster/local.py and cluster/ingress.py") + lines,
        "base/generated/serve.yaml": service(serve_config()),
        "components/differ/environment.yaml": digest(),
        "components/gpus/serve.yaml": service(serve_config(arguments=ON_GPU)),
        "components/monitoring/rules.yaml": rules(),
        # On a laptop one application, which `make demo` trains first, is enough to see that all works.
        "overlays/kind/serve.yaml": service(serve_config(only=("reviews",))),
    }


def write(check: bool) -> list[str]:
    """Write what has changed, or with `check` only tell; the paths of those files."""
    changed = []
    for name, text in files().items():
        path = FOLDER / name
        if not path.is_file() or path.read_text() != text:
            changed.append(str(path.relative_to(storage.PROJECT)))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.write_bytes(storage.uri(path), text.encode())
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.kubernetes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, and tell what would be")
    arguments = parser.parse_args()
    # A binary of another place than the package's is this machine's alone.
    for name in ("WHORL_HAPROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"):
        os.environ.pop(name, None)
    try:
        changed = write(arguments.check)
        if arguments.check and changed:
            raise ConfigError(f"not what is written now: {', '.join(changed)}; make k8s writes them")
        print("\n".join(f"written to   {path}" for path in changed) or "all is as it would be written")
    except WhorlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
