"""What requests may call adapters, and which versions can be served so. The engine itself: test_chat.py."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from lib import registry, storage
from lib.artifacts import ADAPTER_FOLDER, ModelRef, TaskFile
from lib.errors import ConfigError, ModelError
from lib.registry import VERSION_FILE
from serve import adapters
from serve.adapters import Names, base_of


def publish(ref: ModelRef, base: str, config: dict[str, object] | None) -> ModelRef:
    with storage.publish(ref.uri) as folder:
        TaskFile("chat", [], 64, base, "x/0").write(folder)
        if config is not None:
            (folder / ADAPTER_FOLDER).mkdir()
            (folder / ADAPTER_FOLDER / "adapter_config.json").write_text(json.dumps(config))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): storage.checksum(str(path)) for path in paths}
        storage.write_json(str(folder / VERSION_FILE), {"files": files})
    return ref


def test_versions_of_one_base_share_it(storage: Path, tiny_base: Path) -> None:
    refs = [publish(ModelRef(name, 1), str(tiny_base), {"r": 8}) for name in ("goods", "tone")]
    assert base_of(refs) == tiny_base


def test_what_cannot_be_an_adapter_says_why(storage: Path, tiny_base: Path) -> None:
    good = publish(ModelRef("goods", 1), str(tiny_base), {"r": 8})
    other = publish(ModelRef("tone", 1), "sample://smollm2-135m-instruct", {"r": 8})
    whole = publish(ModelRef("whole", 1), str(tiny_base), None)
    dora = publish(ModelRef("dora", 1), str(tiny_base), {"r": 8, "use_dora": True})
    with pytest.raises(ConfigError, match=r"goods@1 from .*, tone@1 from sample://.*share one base"):
        base_of([good, other])
    with pytest.raises(ModelError, match=r"whole@1 holds no adapter; train it with training\.adapter"):
        base_of([good, whole])
    with pytest.raises(ModelError, match="dora@1 was trained with DoRA"):
        base_of([dora])


def test_names_follow_their_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    meant = {"goods@champion": ModelRef("goods", 1), "tone@2": ModelRef("tone", 2)}
    monkeypatch.setattr(registry, "resolve", lambda name, version: meant[f"{name}@{version}"])
    monkeypatch.setattr(adapters, "LOOK_S", 0.0)

    async def story() -> None:
        names = Names(list(meant), list(meant.values()))
        assert names.all() == ["goods", "goods@champion", "tone", "tone@2", "base"]
        meant["goods@champion"] = ModelRef("goods", 5)
        # Whoever asks first gets what was known, and nobody waits.
        assert names.find("goods") == ModelRef("goods", 1)
        async with asyncio.timeout(10):
            while names.find("goods") != ModelRef("goods", 5):
                await asyncio.sleep(0.01)
        assert names.find(None) == names.find("goods@champion") == ModelRef("goods", 5)
        assert names.find("tone") == ModelRef("tone", 2)
        # What answers bear may be asked for, the former too.
        assert names.find("goods@1") == ModelRef("goods", 1)
        assert names.find("goods@7") is None
        assert names.find("base") is None

    asyncio.run(story())
