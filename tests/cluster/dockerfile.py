"""A Dockerfile as its stages, and its steps done in folders: no container engine runs where these tests do.

Of the language only what cluster/Dockerfile uses, which `parse` raises ValueError beyond.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

VERBS = {
    "ARG",
    "COPY",
    "WORKDIR",
    "RUN",
    "ENV",
    "LABEL",
    "USER",
    "EXPOSE",
    "HEALTHCHECK",
    "ENTRYPOINT",
    "CMD",
}


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, verb: str) -> list[str]:
        return [text for found, text in self.steps if found == verb]

    def pairs(self, verb: str) -> dict[str, str]:
        """Of ENV and LABEL."""
        return dict(word.split("=", 1) for text in self.all(verb) for word in shlex.split(text))

    def words(self, verb: str) -> list[str]:
        """Of ENTRYPOINT, CMD or HEALTHCHECK, as a process gets them: the form without a shell."""
        text = self.all(verb)[-1]
        found: list[str] = json.loads(text[text.index("[") :])
        return found

    def packages(self) -> list[str]:
        """That apt-get installs."""
        found = re.findall(
            r"apt-get install -y --no-install-recommends ([\w.+ -]+?)\s*(?:&&|$)", "\n".join(self.all("RUN"))
        )
        return [name for text in found for name in text.split()]


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The ARGs before the first stage, and the stages in order."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for step in re.split(r"(?<!\\)\n", "\n".join(lines)):
        verb, rest = re.sub(r"\\\n\s*", "", step).split(None, 1)
        if verb == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name, base))
        elif verb not in VERBS:
            raise ValueError(f"{verb} is not read here")
        elif stages:
            stages[-1].steps.append((verb, rest))
        else:
            arguments |= dict([rest.split("=", 1)])
    return arguments, stages


def line(stages: list[Stage], stage: Stage, arguments: dict[str, str]) -> list[Stage]:
    """The stages that `stage` stands on, the first one first, and itself."""
    base = re.sub(r"\$\{(\w+)\}", lambda at: arguments[at[1]], stage.base)
    under = [other for other in stages if other.name == base]
    return [*(line(stages, under[0], arguments) if under else []), stage]


def kept_out(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a file from the build: the last pattern that names it or a folder above it decides."""
    places = [str(place) for place in (Path(path), *Path(path).parents)][:-1]
    out = False
    for pattern in patterns:
        shape = pattern.removeprefix("!")
        anywhere = shape.startswith("**/")
        names = [Path(place).name for place in places] if anywhere else places
        if any(
            fnmatch.fnmatchcase(name, shape.removeprefix("**/"))
            and (anywhere or name.count("/") == shape.count("/"))
            for name in names
        ):
            out = not pattern.startswith("!")
    return out


@dataclass
class Replay:
    """Steps done in `root`: with `chroot` it is their `/`, else commands are told of it where they say /opt/whorl."""

    root: Path
    arguments: dict[str, str]
    folder: str = "/"
    user: str = "0:0"
    environment: dict[str, str] = field(default_factory=dict)
    chroot: bool = False

    def inside(self, path: str) -> Path:
        return self.root / os.path.normpath(Path(self.folder, path)).lstrip("/")

    def do(self, stage: Stage, others: dict[str, Path], run: re.Pattern[str] = re.compile("")) -> list[str]:
        """All steps of a stage; of RUN those that `run` finds. What was left out."""
        left: list[str] = []
        for verb, text in stage.steps:
            if verb == "ARG":
                name, given, value = text.partition("=")
                if given:
                    self.arguments.setdefault(name, value)
            elif verb == "WORKDIR":
                self.folder = text
                self.inside(text).mkdir(parents=True, exist_ok=True)
            elif verb == "USER":
                self.user = text
            elif verb == "ENV":
                self.environment |= dict(word.split("=", 1) for word in shlex.split(text))
            elif verb == "COPY":
                self.copy(text.split(), others)
            elif verb == "RUN" and run.search(text):
                done = self.run(["/bin/sh", "-c", text], user=self.user)
                assert done.returncode == 0, f"RUN {text}: {(done.stdout + done.stderr)[-3000:]}"
            elif verb == "RUN":
                left.append(text)
        return left

    def copy(self, words: list[str], others: dict[str, Path]) -> None:
        whence = others[words.pop(0).removeprefix("--from=")] if words[0].startswith("--from=") else None
        *sources, target = words
        for source in sources:
            place = self.inside(f"{target}/{source}" if target.endswith("/") else target)
            if whence:
                shutil.move(
                    whence / source.lstrip("/"), place
                )  # it is gigabytes, and is not needed there any more
                continue
            for file in context():
                if file == source or file.startswith(f"{source}/"):
                    name = place / file.removeprefix(source).lstrip("/") if file != source else place
                    name.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, name)

    def run(
        self, command: list[str], user: str | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": "/root"} | self.arguments | self.environment | more
        if self.chroot:
            number, group = (user or self.user).split(":")
            entered = f"--userspec={number}:{group}"
            words = [
                "chroot",
                entered,
                str(self.root),
                "/bin/sh",
                "-c",
                f'cd {self.folder} && exec "$@"',
                "sh",
                *command,
            ]
            words = ["unshare", "--mount", "sh", "-ec", MOUNTS, "sh", str(self.root), *words]
            return subprocess.run(
                words, env=environment, capture_output=True, text=True, timeout=3000, check=False
            )
        here = str(self.inside("/opt/whorl"))
        environment = {name: value.replace("/opt/whorl", here) for name, value in environment.items()}
        words = [word.replace("/opt/whorl", here) for word in command]
        return subprocess.run(
            words,
            cwd=self.inside("."),
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


# What a container has besides its files, and the folders that pip's configuration here names, in a mount namespace of
# this command's own: nothing is left mounted.
MOUNTS = """
root=$1; shift
mount --bind /proc "$root/proc"
mount --rbind /dev "$root/dev"
for one in $PIP_FOLDERS; do mkdir -p "$root$one"; mount --bind "$one" "$root$one"; done
exec "$@"
"""


def context() -> list[str]:
    """The files that a build is given: those that git tracks and .dockerignore lets in."""
    patterns = Path(".dockerignore").read_text().splitlines()
    patterns = [pattern for pattern in patterns if pattern and not pattern.startswith("#")]
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    return [file for file in listed if not kept_out(file, patterns) and Path(file).is_file()]
