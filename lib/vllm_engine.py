"""vLLM's arguments and environment by `serving`: the same engine behind the chat endpoint and in batch scoring."""

from __future__ import annotations

from typing import Any

from lib import tracking
from lib.errors import ConfigError
from lib.settings import ServingSettings

CPU_KV_CACHE_GIB = 1.0


def on_gpu(serving: ServingSettings) -> bool:
    return serving.gpus_per_replica > 0


def engine_name(serving: ServingSettings) -> str:
    return f"vllm {serving.chat.dtype} on {'GPU' if on_gpu(serving) else 'CPU'}"


def engine_arguments(serving: ServingSettings) -> dict[str, Any]:
    """Keyword arguments of vLLM's `EngineArgs`, without the model."""
    chat, gpu = serving.chat, on_gpu(serving)
    found: dict[str, Any] = {
        "dtype": chat.dtype,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "max_num_seqs": chat.max_num_seqs,
        "tensor_parallel_size": chat.tensor_parallel,
        "enforce_eager": not gpu if chat.enforce_eager is None else chat.enforce_eager,
    }
    if chat.max_model_len is not None:
        found["max_model_len"] = chat.max_model_len
    kv_cache_gib = chat.kv_cache_gib or (None if gpu else CPU_KV_CACHE_GIB)
    if kv_cache_gib is not None:
        found["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    if gpu:
        found["gpu_memory_utilization"] = chat.gpu_memory
    return found | chat.options


def worker_bundle(serving: ServingSettings) -> dict[str, float]:
    """What each of an engine's workers takes of the cluster. Raises ConfigError for GPUs that cannot be divided."""
    workers = serving.chat.tensor_parallel
    bundle: dict[str, float] = {"CPU": serving.cpus_per_replica / workers}
    if on_gpu(serving):
        bundle["GPU"] = serving.gpus_per_replica / workers
        if bundle["GPU"] > 1:
            raise ConfigError(
                f"serving.gpus_per_replica {serving.gpus_per_replica:g} for {workers} worker(s): "
                f"each can use one GPU at most; set serving.chat.tensor_parallel {serving.gpus_per_replica:g}"
            )
    return bundle


def environment(serving: ServingSettings) -> dict[str, str]:
    """Environment variables of an engine's processes."""
    import ray

    given = ray.get_runtime_context().runtime_env.get("env_vars", {}) if ray.is_initialized() else {}
    found = {
        **tracking.places(),
        **given,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if serving.threads is not None and not on_gpu(serving):
        # Else vLLM binds threads to all cores but one, which it leaves to its scheduler.
        found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(serving.threads)}
    return found | serving.chat.environment
