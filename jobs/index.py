"""Make a knowledge base: documents → passages → an index that `serving.knowledge` grounds a chat model's answers in.

    python -m jobs.index --config jobs/configs/shop_chat.yaml [--knowledge.source DIR ...]

Reads Markdown, HTML, text and PDF, embeds their passages on Ray Data, and publishes a Lance index (vectors and full
text) under indexes/NAME/FINGERPRINT in storage. The fingerprint stands for the documents and the configuration: a
version that is there is not made again. Applications that serve the index take a new version up by themselves.
"""

from __future__ import annotations

import shlex
import sys
from functools import partial
from typing import Any

from lib import storage
from lib.command import connect, main
from lib.data.redact import Rules, together, told
from lib.retrieval.documents import Redact
from lib.retrieval.index import make_current
from lib.retrieval.plan import Plan, plan
from lib.settings import Settings


def index(settings: Settings) -> None:
    planned = plan(settings, *redaction(settings))
    if planned.ref.exists():
        print(
            f"index {planned.ref.fingerprint} is there already, made of the same documents and config: skipped"
        )
        manifest = planned.ref.manifest()
    else:
        connect()
        from lib.retrieval.build import build  # imports ray

        manifest = build(planned)
    moved = make_current(planned.ref, settings.knowledge.keep)
    report(planned, manifest, moved)


def redaction(settings: Settings) -> tuple[Redact | None, dict[str, object]]:
    """What takes personal data out of documents, where `knowledge.redact` says so, and what stands for it."""
    wanted = settings.knowledge.redact
    if wanted is None:
        return None, {}
    rules = Rules.of(wanted, "knowledge.redact")
    return partial(together, rules=rules), wanted.model_dump(mode="json") | rules.identity()


def report(planned: Plan, manifest: dict[str, Any], moved: bool) -> None:
    print(f"fingerprint  {manifest['fingerprint']}{'' if moved else ' (the current one)'}")
    left_out = ", ".join(f"{files:,} {ending}" for ending, files in sorted(planned.others.items()))
    print(
        f"documents    {len(manifest['documents']) - len(manifest['unreadable']):,}"
        f"{f'; files of other kinds left out: {left_out}' if left_out else ''}"
    )
    for why in manifest["unreadable"]:
        print(f"unreadable   {why}")
    if (redacted := manifest.get("redacted")) is not None:
        print(f"redacted     {told(redacted)}")
    print(f"passages     {manifest['passages']:,}, vectors of {manifest['width']} by {manifest['base']}")
    print(f"written to   {storage.display(planned.ref.uri)}")
    print(
        f"next         python -m serve.deploy {shlex.join(sys.argv[1:])} --serving.knowledge {planned.ref.name}"
    )


if __name__ == "__main__":
    main(index)
