"""More training rows, made of those that there are: other words, typing errors, what a model writes, labels filled up.

    words       a text as words and what stands between them
    methods     ways to change some of them
    thesaurus   words of like meaning
    rows        new rows of a block
    counting    what is known of all rows together: labels, and what the source says already
    writing     what a model writes: paraphrases and translations there and back

New rows come in the write pass, of rows that train and no others. Validation and test hold none, and none says what a
row of the source says, whichever split it lies in.
"""

from __future__ import annotations

from lib import storage
from lib.base_models import base_directory
from lib.data.augment.thesaurus import read
from lib.errors import ConfigError
from lib.settings import DataSettings, Settings
from lib.tasks import Task

# Part of the fingerprint of every dataset that is augmented. Raise it when other rows would be made.
VERSION = 1


def check(data: DataSettings, task: Task, name: str) -> None:
    """Raises ConfigError where rows of the task `name` cannot be augmented as `data.augment` says."""
    settings = data.augment
    if settings is None:
        return
    takes: frozenset[str] = getattr(task, "AUGMENTED", frozenset())
    if not takes:
        raise ConfigError(f"data.augment: no method suits the rows of {name}; leave it out")
    for method in settings.methods:
        if method not in takes:
            raise ConfigError(
                f"data.augment.{method}: a row of {name} would not keep its labels ({name} takes "
                f"{', '.join(sorted(takes))}); leave it out"
            )
    if settings.balance and not (data.class_names and task.classes(data) == data.class_names):
        raise ConfigError(f"data.augment.balance: a row of {name} has no label of its own; leave it out")


def identity(settings: Settings) -> dict[str, object]:
    """What a dataset's fingerprint says of what new rows are made by, beside the settings. Raises ConfigError, DataError,
    StorageError or ModelError for a thesaurus or a model that cannot be used."""
    given = settings.data.augment
    assert given is not None
    found: dict[str, object] = {"version": VERSION}
    if given.has_synonyms and given.thesaurus is None:
        found["base"] = _weights(settings.model.base)
    elif given.has_synonyms:
        found["thesaurus"] = sorted(read(str(given.thesaurus)).entries.items())
    if given.writer is not None:
        from lib.data.augment import writing

        found["writer"] = writing.identity(given.writer)
        if given.writer.least_similarity is not None:
            found["encoder"] = _weights(given.writer.encoder)
    return found


def _weights(base: str) -> dict[str, str]:
    folder = base_directory(base)
    return {p.name: storage.checksum(str(p)) for p in sorted(folder.glob("*.safetensors"))}
