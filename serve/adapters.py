"""LoRA adapters of several registered versions on one engine, which holds the base that they were trained from.

With `serving.chat.adapters` the engine's weights are the base's, and `serving.model` is an adapter like the others. A
request names one: `support` (which means its reference in the configuration), `support@champion`, or `base`. What an
alias points at is looked up again every few seconds, and a new version's adapter is loaded when somebody first asks for
it, beside those that are there: nothing is started anew.
"""

# Without `from __future__ import annotations`: Ray Serve reads the annotations of what uses this.

import asyncio
import logging
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lib import registry, storage
from lib.artifacts import ADAPTER_FOLDER, ModelRef, TaskFile
from lib.base_models import base_directory
from lib.errors import ConfigError, ModelError, WhorlError
from lib.registry import parse_reference
from lib.settings import ChatEngineSettings

logger = logging.getLogger("ray.serve")

BASE = "base"
"""What the engine's own weights are called, without an adapter."""
LOOK_S = 5.0
# Versions of one model that stay loaded: requests in flight, and other replicas' ingresses, may still mean the former.
KEPT = 2


def base_of(refs: list[ModelRef]) -> Path:
    """The directory of the base that all versions were trained from.

    Raises ConfigError when it is not the same one, ModelError for a version without an adapter.
    """
    found: dict[str, ModelRef] = {}
    for ref in refs:
        with registry.open_version(ref) as folder:
            checked(folder, ref)
            found.setdefault(TaskFile.read(folder, "chat").base, ref)
    if len(found) > 1:
        told = ", ".join(f"{ref} from {base}" for base, ref in found.items())
        raise ConfigError(f"serving.chat.adapters: {told}; adapters of one engine share one base")
    return base_directory(next(iter(found)))


def checked(folder: Path, ref: ModelRef) -> Path:
    """The adapter's directory in a version's. Raises ModelError when there is none that an engine adds."""
    adapter = folder / ADAPTER_FOLDER
    if not adapter.is_dir():
        raise ModelError(
            f"{ref} holds no adapter; train it with training.adapter {{kind: lora}}, or serve it alone"
        )
    given = storage.read_json(str(adapter / "adapter_config.json"))
    if given.get("use_dora"):
        raise ModelError(f"{ref} was trained with DoRA, which vLLM does not add to a base; serve it alone")
    return adapter


def adapter_arguments(chat: ChatEngineSettings, folder: Path | None) -> dict[str, Any]:
    """What vLLM is told of adapters, the first version's directory being `folder`; nothing when there are none."""
    if not chat.adapters:
        return {}
    return {
        "enable_lora": True,
        "max_loras": chat.max_adapters,
        "max_lora_rank": chat.max_adapter_rank,
        # What the version says of chats holds for the base too: template, end of a turn.
        "tokenizer": str(folder),
        "generation_config": str(folder),
    }


class Names:
    """What requests may call the adapters, and which versions that means now. Belongs to one event loop."""

    def __init__(self, references: list[str], served: list[ModelRef]) -> None:
        self._meant: dict[str, str] = {}
        """Name → reference."""
        for reference in references:
            for name in (parse_reference(reference)[0], reference):
                self._meant.setdefault(name, reference)
        self._refs = dict(zip(references, served, strict=True))
        self._versions = {str(ref): ref for ref in served}
        """All that were meant since the start: a request may name one that is not meant any more."""
        self._looked = time.monotonic()
        self._looking: asyncio.Task[None] | None = None

    def all(self) -> list[str]:
        return [*self._meant, BASE]

    def find(self, name: str | None) -> ModelRef | None:
        """The version that a name means; None for one that is no adapter's. Without a name the first is meant."""
        if time.monotonic() - self._looked > LOOK_S and (self._looking is None or self._looking.done()):
            # Nobody waits for the database: this request gets the version that was known. A thread that asks, such as
            # the one that sets gauges, has no loop to look in.
            with suppress(RuntimeError):
                self._looking = asyncio.get_running_loop().create_task(self._look())
        if name is None:
            return next(iter(self._refs.values()))
        reference = self._meant.get(name)
        return self._refs[reference] if reference else self._versions.get(name)

    async def _look(self) -> None:
        self._looked = time.monotonic()
        for reference in self._refs:
            try:
                found = await asyncio.to_thread(registry.resolve, *parse_reference(reference))
            except WhorlError as error:
                logger.warning("%s stays at %s: %s", reference, self._refs[reference], error)
                continue
            if found != self._refs[reference]:
                logger.info("%s is %s from now on", reference, found)
                self._refs[reference] = found
                self._versions[str(found)] = found


class Adapters:
    """The adapters that one engine has loaded."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._files = ExitStack()
        self._loaded: dict[ModelRef, int] = {}
        self._lock = asyncio.Lock()

    async def ensure(self, name: str | None) -> None:
        """Load the adapter of the version NAME@NUMBER, unless it is there; other names are none's.

        Raises ModelError when the version has none that the engine takes.
        """
        if name is None or "@" not in name:
            return
        model, version = parse_reference(name)
        ref = ModelRef(model, int(version))
        if ref in self._loaded:
            return
        async with self._lock:
            if ref not in self._loaded:
                await self._load(ref)

    async def _load(self, ref: ModelRef) -> None:
        from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig

        # vLLM reads the files again when it takes an adapter back from the disk.
        folder = await asyncio.to_thread(self._files.enter_context, registry.open_version(ref))
        number = max(self._loaded.values(), default=0) + 1
        wanted = DiskMultiplexConfig(
            model_id=str(ref),
            max_total_tokens=None,
            local_path=str(checked(folder, ref)),
            lora_assigned_int_id=number,
        )
        try:
            await self._engine.resolve_lora(wanted)
        except ValueError as error:
            raise ModelError(f"{ref}: its adapter does not load: {error}") from error
        self._loaded[ref] = number
        logger.info("serving %s", ref)
        await self._drop([other for other in self._loaded if other.name == ref.name][:-KEPT])

    async def _drop(self, refs: list[ModelRef]) -> None:
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        for ref in refs:
            del self._loaded[ref]
            await self._engine._oai_models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=str(ref)))
