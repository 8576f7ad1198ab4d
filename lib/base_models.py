"""Base models: from `sample://NAME`, a directory, a storage URI or a hub id to a local directory."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from lib import storage
from lib.artifacts import check_model_directory
from lib.errors import ModelError, StorageError
from lib.samples import is_sample, sample_path

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def base_directory(base: str) -> Path:
    """A local, checked directory with config.json, safetensors weights and a tokenizer.

    A remote URI is copied once into the storage root's `cache/`. Raises ModelError when the model is
    absent or not in safetensors, ConfigError for an unknown sample.
    """
    if is_sample(base):
        folder = _from_sample(base)
    elif "://" in base:
        folder = _download(base)
    elif Path(base).expanduser().is_dir():
        folder = Path(base).expanduser().absolute()
    elif HUB_ID.match(base) and not base.startswith((".", "/")):
        folder = _from_hub(base)
    else:
        raise ModelError(f"no model directory {base}; give sample://NAME, a directory, a URI or a hub id")
    check_model_directory(folder)
    return folder


def tokenizer_checksum(base: str) -> str:
    """A digest of the tokenizer's files: two datasets agree only if their tokens do."""
    folder = base_directory(base)
    digest = hashlib.sha256()
    for path in (
        sorted(folder.glob("*token*"))
        + sorted(folder.glob("vocab*"))
        + sorted(folder.glob("merges*"))
        + sorted(folder.glob("chat_template*"))
    ):
        if path.is_file():
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _from_sample(base: str) -> Path:
    """A sample's directory; one that is a GGUF file is converted once, into the storage root's `cache/`."""
    path = sample_path(base, "model")
    if path.is_dir():
        return path
    from lib.gguf import convert

    # Of another file, another directory: its size and time tell whether the package was changed.
    stat = path.stat()
    key = hashlib.sha256(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = cache_folder() / f"{path.stem.lower()}-{key}"
    if not storage.published(str(cache)):
        print(f"converting {base} to safetensors, once", flush=True)
        try:
            with storage.publish(str(cache)) as scratch:
                convert(path, scratch)
        except StorageError:
            if not storage.published(str(cache)):  # else another process was quicker
                raise
    return cache


def cache_folder() -> Path:
    """The storage root's `cache/`, or the project's own where the root is not on this machine."""
    fs, inside = storage.filesystem(storage.root())
    return Path(inside) / "cache" if storage.is_local(fs) else storage.PROJECT / ".whorl" / "cache"


def _download(uri: str) -> Path:
    fs, inside = storage.filesystem(uri)
    if storage.is_local(fs):
        return Path(inside)
    if not storage.exists(uri):
        raise ModelError(f"no model directory {uri}")
    cache = Path(storage.PROJECT / ".whorl" / "cache" / hashlib.sha256(uri.encode()).hexdigest()[:16])
    if not storage.published(str(cache)):
        with storage.publish(str(cache)) as scratch, storage.local_copy(uri) as copy:
            shutil.copytree(copy, scratch, dirs_exist_ok=True)
    return cache


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.h5", "*.msgpack", "*.onnx"]))
    except Exception as error:
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else type(error).__name__
        raise ModelError(
            f"{name} is neither a directory here nor a model that the hub gives ({why}); check the name"
        ) from error
