"""What a model writes of rows that train: paraphrases, and translations there and back, by a stage of Ray Data.

The stage comes before the write pass. Its actors hold the model; each gets packed blocks, finds the rows that train as the
write pass will, asks, and hands the block on with what was written, as JSON under `written`. What stays differs from
what was read, is about as long, has the same placeholders and no personal data of its own, and means about the same, where
somebody looks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from lib import storage
from lib.artifacts import ModelRef, TaskFile
from lib.base_models import base_directory
from lib.data import blocks
from lib.data.alike import dedup
from lib.data.augment.making import WRITTEN, Making
from lib.data.augment.rows import Slot, form_of
from lib.data.blocks import Reading
from lib.data.places import Found, places
from lib.data.ready import prepare
from lib.data.redact import PLACEHOLDER, Rules, find_in
from lib.errors import ConfigError, ModelError, RequestError
from lib.settings import ServingSettings, Settings, WriterSettings
from lib.settings.augmentation import WRITTEN as METHODS

if TYPE_CHECKING:
    from lib.generation import Generator

# Texts that the model is asked at a time: enough that batches of like lengths can be formed.
ASKED_AT_ONCE = 256


def placed(writer: WriterSettings) -> WriterSettings:
    """The same by the model's place: the actors may have another storage in their environment. Raises ModelError for a
    version that is not there."""
    name, at, version = writer.model.rpartition("@")
    if not at or "/" in writer.model:
        return writer
    ref = ModelRef(name, int(version))
    if not storage.published(ref.uri):
        raise ModelError(f"no model version {ref} in storage; python -m jobs.promote registers one")
    return writer.model_copy(update={"model": ref.uri})


def identity(writer: WriterSettings) -> str:
    """A digest of the model. Raises ConfigError for one that does not write, ModelError for what is no model."""
    where = base_directory(placed(writer).model)
    kinds = storage.read_json(str(where / "config.json")).get("architectures") or [""]
    if not any("CausalLM" in kind or "LMHead" in kind for kind in kinds):
        raise ConfigError(
            f"data.augment.writer.model: {writer.model} is {', '.join(kinds)}, which writes nothing; name a chat model"
        )
    return storage.fingerprint({p.name: storage.checksum(str(p)) for p in sorted(where.glob("*.*"))})


def with_written(
    packed: ray.data.Dataset,
    reading: Reading,
    settings: Settings,
    found: Found,
    making: Making | None,
    rules: Rules | None,
) -> ray.data.Dataset:
    """Packed blocks with what was written for their rows; as they are where nothing is asked for."""
    if making is None or not making.by.settings.written:
        return packed
    writer = making.by.settings.writer
    assert writer is not None
    return packed.map_batches(
        Writer,
        fn_constructor_args=(reading, settings, found, making, rules, placed(writer)),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=writer.workers),
        num_cpus=writer.cpus_per_worker,
        num_gpus=writer.gpus_per_worker,
    )


class Writer:
    """An actor of Ray Data: writes for the rows of packed blocks."""

    def __init__(
        self,
        reading: Reading,
        settings: Settings,
        found: Found,
        making: Making,
        rules: Rules | None,
        writer: WriterSettings,
    ) -> None:
        self.reading, self.settings, self.found = reading, settings, found
        self.making, self.rules, self.writer = making, rules, writer
        self._generator: Generator | None = None
        self._embedder: Any = None

    def __call__(self, row: pa.Table) -> pa.Table:
        block = blocks.from_row(row, list(self.reading.columns))
        ready = prepare(block.rows, self.settings, ray.get(list(self.found.rejected)))
        positions = block.rows[blocks.POSITION].to_numpy()[ready.usable]
        labels, data = ready.prepared.labels[ready.usable], self.settings.data
        trains = places(
            self.found, self.reading, data, positions, labels, ready.group, ready.high, ready.seconds
        ).trains
        ids = dedup.row_ids(ready.high, positions if data.duplicates == "keep" else None)
        rows = ready.prepared.rows.filter(pa.array(ready.usable)).filter(pa.array(trains))
        said = self._said(rows, ids.filter(pa.array(trains)).to_pylist(), labels[trains])
        return row.append_column(WRITTEN, pa.array([json.dumps(said, ensure_ascii=False)]))

    def _said(self, rows: pa.Table, ids: list[str], labels: np.ndarray) -> dict[str, dict[str, list[str]]]:
        """Id of a row → `METHOD:NUMBER` → its texts in other words; none that is not to stay."""
        form = form_of(rows.column_names)
        texts = [form.texts(value) for value in rows.select(form.columns).to_pylist()]
        wanted = [
            (i, slot)
            for i, name in enumerate(ids)
            for slot in self.making.by.slots(name, int(labels[i]))
            if slot[0] in METHODS
        ]
        found: dict[str, dict[str, list[str]]] = {}
        for start in range(0, len(wanted), ASKED_AT_ONCE):
            some = wanted[start : start + ASKED_AT_ONCE]
            asked = [(ids[i], slot, place, text) for i, slot in some for place, text in enumerate(texts[i])]
            new = iter(self._written(asked))
            for i, slot in some:
                said = [next(new) for _ in texts[i]]
                if any(text is not None for text in said):
                    # Where one turn of several has nothing new, it stays as it was.
                    kept = [old if text is None else text for old, text in zip(texts[i], said, strict=True)]
                    found.setdefault(ids[i], {})[f"{slot[0]}:{slot[1]}"] = kept
        return found

    def _written(self, asked: Sequence[tuple[str, Slot, int, str]]) -> list[str | None]:
        """Texts (of a row's id, a slot and a place in the row) in other words, None where that is not to stay."""
        settings = self.making.by.settings
        prompts: list[str | None] = []
        for _, (method, number), _, text in asked:
            if method == "paraphrase" and settings.paraphrase is not None:
                prompts.append(filled(settings.paraphrase.prompt, text))
            elif settings.back_translation is not None:
                told = settings.back_translation
                prompts.append(filled(told.prompt, text, told.languages[number % len(told.languages)]))
        there = self._answers(prompts, asked, "there")
        back = [
            filled(settings.back_translation.prompt, text, settings.back_translation.language)
            if settings.back_translation is not None and method == "back_translation" and text is not None
            else None
            for (_, (method, _), _, _), text in zip(asked, there, strict=True)
        ]
        returned = self._answers(back, asked, "back")
        said = [
            again if method == "back_translation" else once
            for (_, (method, _), _, _), once, again in zip(asked, there, returned, strict=True)
        ]
        old = [text for _, _, _, text in asked]
        stays = [
            new if new is not None and stay(text, new, self.writer.length, self.rules) else None
            for text, new in zip(old, said, strict=True)
        ]
        return self._alike(old, stays)

    def _answers(
        self, prompts: Sequence[str | None], asked: Sequence[tuple[str, Slot, int, str]], way: str
    ) -> list[str | None]:
        """What the model says to each prompt; None to none, where it has no room, and where it does not come to an end."""
        generator = self._loaded()
        places: list[int] = []
        for place, prompt in enumerate(prompts):
            if prompt is None:
                continue
            try:
                tokens = generator.prompt(_turns(prompt))
                if len(tokens) + self.writer.max_tokens <= generator.context:
                    places.append(place)
            except RequestError:
                continue
        seeds = [self._seed(*asked[place][:3], way) for place in places]
        answers = generator.answers(
            [_turns(str(prompts[place])) for place in places],
            self.writer.max_tokens,
            self.writer.temperature,
            self.writer.top_p,
            seeds=seeds,
        )
        found: list[str | None] = [None] * len(prompts)
        for place, answer in zip(places, answers, strict=True):
            if answer.complete and answer.text:
                found[place] = answer.text
        return found

    def _seed(self, name: str, slot: Slot, place: int, way: str) -> int:
        said = "\0".join(map(str, (self.making.by.seed, name, *slot, place, way)))
        return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big")

    def _alike(self, old: Sequence[str], new: Sequence[str | None]) -> list[str | None]:
        """What means about the same, where `writer.least_similarity` is given."""
        places = [place for place, text in enumerate(new) if text is not None]
        if self.writer.least_similarity is None or not places:
            return list(new)
        if self._embedder is None:
            from lib.retrieval.embedding import Embedder

            self._embedder = Embedder(self.writer.encoder, ServingSettings(threads=1))
        vectors = self._embedder.vectors([*(old[i] for i in places), *(str(new[i]) for i in places)])
        cosines = (vectors[: len(places)] * vectors[len(places) :]).sum(1)
        found = list(new)
        for place, cosine in zip(places, cosines.tolist(), strict=True):
            if cosine < self.writer.least_similarity:
                found[place] = None
        return found

    def _loaded(self) -> Generator:
        # Loaded here, not above: an error in a call reaches the job as itself, with its one line.
        if self._generator is None:
            from lib.generation import open_generator

            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            folder = base_directory(self.writer.model)
            serving = ServingSettings(threads=max(1, int(self.writer.cpus_per_worker)))
            self._generator = open_generator(folder, _info(folder), serving)
        return self._generator


def _info(folder: Path) -> TaskFile:
    """Of a model of ours, or of any base."""
    if (folder / "task.json").is_file():
        return TaskFile.read(folder, "chat")
    config = storage.read_json(str(folder / "config.json"))
    return TaskFile("chat", [], int(config.get("max_position_embeddings") or 2048), str(folder), "")


def filled(prompt: str, text: str, language: str = "") -> str:
    """A prompt with what it names; braces in the text say nothing."""
    return prompt.replace("{language}", language).replace("{text}", text)


def _turns(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def stay(old: str, new: str, length: tuple[float, float], rules: Rules | None) -> bool:
    """Whether what was written is to stay: it differs from what was read, by more than case and blanks, is about as long,
    and has the same placeholders. What looks like personal data would be made up, and nobody's."""
    if list(_folded(old)) == list(_folded(new)):
        return False
    if not length[0] * len(old) <= len(new) <= length[1] * len(old):
        return False
    if Counter(PLACEHOLDER.findall(old)) != Counter(PLACEHOLDER.findall(new)):
        return False
    return rules is None or len(find_in(new, rules)) <= len(find_in(old, rules))


def _folded(text: str) -> Iterator[str]:
    return (word.casefold() for word in text.split())
