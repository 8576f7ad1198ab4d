"""Keys of an encoder that turns a source's rows into vectors, wherever one is needed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lib.settings.sections import Positive, Section


class EmbedderSettings(Section):
    """Which encoder of sentences, and on how many actors of Ray Data."""

    model: str = "sample://minilm-l6"
    """As `model.base` names one: `sample://NAME`, a directory, a URI or a hub id."""
    workers: Positive = 1
    """Actors that embed; each takes `cpus_per_worker` and `gpus_per_worker`."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
