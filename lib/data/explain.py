"""What `jobs.preprocess` would do, told without reading rows and without Ray."""

from __future__ import annotations

from collections.abc import Iterator

from lib import storage
from lib.artifacts import SPLITS
from lib.data.blocks import BLOCK_BYTES, Reading
from lib.data.plan import Plan
from lib.data.reading.sources import COMPRESSION_NAMES
from lib.settings import DataSettings, Settings
from lib.tasks import load_task

# Files that are named of each source.
SHOWN_FILES = 5


def explain(plan: Plan) -> list[str]:
    """Lines for the screen: what is read, what becomes of it, in which order, and what is written."""
    return [f"{name:<14}{said}" for name, said in _told(plan)]


def _told(plan: Plan) -> Iterator[tuple[str, str]]:
    settings, data = plan.settings, plan.settings.data
    there = "is there already: nothing would be done" if plan.ref.exists() else "would be made"
    yield "dataset", f"{plan.ref.name}/{plan.ref.fingerprint}, which {there}"
    yield (
        "task",
        f"{settings.task}; tokeniser of {settings.model.base}, at most {settings.model.max_length:,} tokens",
    )
    for name, part in plan.parts.items():
        yield "", ""
        yield f"part {name}", "made first, by itself:"
        yield from _told(part)
    if plan.parts:
        yield "", ""
        yield "mix", f"training rows of the parts by their sizes to the power of 1/{data.temperature:g}"
        return
    yield from _read("read", plan.reading)
    for name, table in plan.tables.items():
        yield from _read(f"data.{name}", table)
    yield "columns", ", ".join(f"{here} ← {column!r}" for here, column in plan.reading.columns.items())
    for name, template in data.templates.items():
        yield "", f"{name!r} is made of {template!r}"
    steps = _recommend(plan, data) if plan.tables else _rows(plan, settings)
    for number, (name, said) in enumerate(steps, 1):
        yield f"{number} {name}", said
    yield "written to", storage.display(plan.ref.uri)


def _read(name: str, reading: Reading) -> Iterator[tuple[str, str]]:
    for place, file in enumerate(reading.files[:SHOWN_FILES]):
        kind = "what a query gives" if file.columns is not None else file.format
        whole = f"{file.name}, {kind}{f' in {COMPRESSION_NAMES[file.compression]}' if file.compression else ''}, {_size(file.size)}"
        weight = reading.weights[file.source] if reading.weights else 1
        whole += f", in training {weight:g} times" if weight != 1 else ""
        yield name if not place else "", whole + (f", all of it {file.split}" if file.split else "")
    if rest := reading.files[SHOWN_FILES:]:
        yield "", f"and {len(rest):,} more files, {_size(sum(file.size for file in rest))}"
    if reading.limit is not None:
        yield "", f"the first {reading.limit:,} rows of each"


def _rows(plan: Plan, settings: Settings) -> Iterator[tuple[str, str]]:
    data = settings.data
    if share := data.quarantine.share:
        yield (
            "quarantine",
            f"at most {share:.2%} of the rows, and of the bytes by damaged files, that cannot be used",
        )
    yield "redact", _redaction(plan)
    if not data.clean.does_nothing:
        yield "clean", _cleaning(data)
    yield (
        "normalise",
        f"Unicode NFC, encoding mended; {len(load_task(settings.task).classes(data)) or 'no'} classes",
    )
    near = data.near
    units = f"runs of {near.size} {near.unit}, Jaccard similarity from {near.threshold:g} on"
    yield "duplicates", {"drop": "the first of equal texts stays", "keep": "kept"}[data.duplicates]
    if near.duplicates == "drop":
        yield "near", f"one of each cluster stays, the {near.keep}; {units}"
    if data.checks_leakage:
        done = {"check": "kept out of one another's splits", "report": "counted"}[data.leakage]
        yield "leakage", f"near duplicates are {done}; {units}"
    yield "split", _splits(data)
    for label, share in data.undersample.items():
        yield "undersample", f"{share:.0%} of the training rows labelled {label}"
    if data.augment:
        methods = ", ".join(f"{name} ({n} a row)" for name, n in data.augment.methods.items())
        filled = f"; labels filled up to {data.augment.balance.to}" if data.augment.balance else ""
        yield "augment", f"training rows alone: {methods or 'copies'}{filled}"
    if plan.knowledge:
        yield "ground", f"dialogues get passages of {plan.knowledge}"
    yield (
        "tokenise",
        (
            f"and write, in blocks of at most {data.rows_per_shard:,} rows or {_size(BLOCK_BYTES)}, "
            f"{len(plan.reading.fragments()):,} files or groups of files at a time"
        ),
    )


def _recommend(plan: Plan, data: DataSettings) -> Iterator[tuple[str, str]]:
    yield "redact", _redaction(plan)
    rules = data.interactions
    yield (
        "count",
        (
            f"users with {rules.least_per_user} interactions or more and items with {rules.least_per_item}, until none is left out"
        ),
    )
    yield (
        "split",
        {
            "last": "each user's last interaction is for the test, the one before it for validation",
            "time": "what was done after one moment is for validation, and after a later one for the test",
        }[rules.split],
    )
    yield "tokenise", "the items' texts, and write the users' sequences in the order of time"


def _redaction(plan: Plan) -> str:
    given = plan.settings.data.redact
    if plan.rules is None or not given:
        return "nothing: personal data stays"
    names = f"; names by {given.names.model}" if given.names else ""
    keyed = f"pseudonyms by the key in {given.key_env}" if given.key_env else "numbered placeholders"
    return f"{', '.join(given.kinds)}: {keyed}{names}"


def _cleaning(data: DataSettings) -> str:
    given = data.clean.model_dump(exclude_defaults=True, exclude={"samples"})
    return ", ".join(name if value is True else f"{name} {value}" for name, value in given.items())


def _splits(data: DataSettings) -> str:
    given = [name for name in SPLITS if name in data.sources]
    shared = ", ".join(f"{name} {data.shares[name]:.0%}" for name in SPLITS if name not in given)
    files = f"; {', '.join(given)} given by files" if given else ""
    split = data.split
    if split.dates:
        shared = ", ".join(f"{name} from {begins}" for name, begins in split.dates.items())
    how = {
        "random": f"by a hash of the text and the seed {split.seed}",
        "group": f"rows with one {split.group!r} together, by its hash and the seed {split.seed}",
        "time": f"the latest by {split.time!r} test, those before them validate",
        "stratified": f"each label in its share, by a hash of the text and the seed {split.seed}",
    }[split.by]
    return f"{shared}, {how}{files}"


def _size(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}"
