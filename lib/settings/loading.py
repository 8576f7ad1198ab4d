"""From a YAML file and the command line to `Settings`, and mistakes as one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from lib.errors import ConfigError, nearest
from lib.settings.use import Settings


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file and apply overrides such as `["--training.epochs", "2"]`.

    Raises ConfigError, in one line, for a file that cannot be read, an unknown key (with the nearest
    known one), a wrong type or an impossible value.
    """
    values = _read_yaml(Path(path))
    for key, text in parse_overrides(overrides).items():
        _set(values, key, text)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`--a.b value` and `--a.b=value` as {"a.b": "value"}."""
    parsed: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; overrides look like --training.epochs 2")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value: --{key} VALUE")
            value = rest.pop(0)
        parsed[key.replace("-", "_")] = value
    return parsed


def override(settings: Settings, values: dict[str, Any], where: str) -> Settings:
    """The settings with dotted keys set to other values.

    Raises ConfigError, beginning with `where`, for an unknown key or a value that it cannot have.
    """
    changed = settings.model_dump(mode="json")
    for key, value in values.items():
        *parents, last = key.split(".")
        section = changed
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    try:
        return Settings.model_validate(changed)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """Pydantic's findings as one line: key, what is wrong, the mend."""
    lines: list[str] = []
    for finding in error.errors():
        line = _describe_one(finding)
        if line not in lines:
            lines.append(line)
    return "; ".join(lines)


def _describe_one(finding: Any) -> str:
    # Members of a union appear in the path (`labels.list[str].0`); a user knows only keys.
    path = [
        str(p)
        for p in finding["loc"]
        if not str(p).startswith(("dict[", "list[", "tuple[", "literal[", "constrained"))
    ]
    path = [p for p in path if p not in ("str", "int", "float")]
    key = ".".join(path)
    match finding["type"]:
        case "extra_forbidden":
            known = _known_keys(path[:-1])
            near = nearest(path[-1], known)
            return f"unknown key {key!r}{near or ' (known here: ' + ', '.join(known) + ')'}"
        case "missing":
            return f"{key} is missing; add it"
        case "value_error":
            message = str(finding["ctx"]["error"])
            return f"{key}: {message}" if key else message
        case _:
            return f"{key}: {finding['msg'][0].lower()}{finding['msg'][1:]}, got {finding['input']!r}"


def _known_keys(path: list[str]) -> list[str]:
    section: type[BaseModel] = Settings
    for part in path:
        if part.isdigit():  # in a list of sections
            continue
        field = section.model_fields.get(part)
        inner = _sections(field.annotation) if field else []
        if not inner:
            return []
        section = inner[0]
    return list(section.model_fields)


def _sections(kind: Any) -> list[type[BaseModel]]:
    """Those inside a type: `AdapterSettings | None` is one too, and so is what a list of them holds."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [section for inner in get_args(kind) for section in _sections(inner)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = nearest(
            path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        )
        raise ConfigError(f"no configuration file {path}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, such as `task: sentiment`")
    return values


def _set(values: dict[str, Any], key: str, text: str) -> None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    for part in parents:
        child = values.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--{key}: {part!r} is a value, not a section")
        values = child
    values[last] = value
