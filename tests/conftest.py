"""Fixtures that every folder of tests shares. Fast tests need none of Ray's; `ray_cluster` is one for all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from cluster import ingress
from lib.command import ALONE
from tests.servers import Postgres
from tests.tiny import CHATML, WORDS, make_tiny_base

# Before anything imports them: no test may reach for the network, and none may see a user's own places.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("WHORL_STORAGE", "WHORL_DATABASE", "WHORL_PIPELINE", "RAY_ADDRESS"):
    os.environ.pop(name, None)
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# A run ends, and what it reported is seen, when Ray Train next looks at its workers: every 2 s by default.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ |= ALONE
# What the replicas of the shared Ray sign webhooks with: they have the environment that it was started in.
os.environ["WHORL_TEST_SECRET"] = "a secret of the tests"

# Ray Serve reads these when it is imported. Its fixed ports would meet those of a cluster that is up.
os.environ |= ingress.environment()
os.environ["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] = "10"
# How long a replica that ends waits for load balancers to notice.
os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
os.environ |= ingress.ports()
# Two processes run the tests side by side (`make test`), each with a Ray of its own, beside clusters that tests bring up:
# replicas of each have ports of their own, since two may listen on one. A cluster's are 30000 to 31000, by default.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
LOWEST = 31001 + 800 * int(WORKER.removeprefix("gw") or 0)
os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] = str(LOWEST)
os.environ["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(LOWEST + 799)
if WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core is all that either has


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first; then those that bring up a cluster of their own, before the shared Ray takes the
    ports that there is only one of; then those on the shared Ray, the slow ones last."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
    items.sort(key=lambda item: (bool(item.get_closest_marker("ray")), bool(item.get_closest_marker("slow"))))


class Files(LoadScopeScheduling):
    """Which process gets which tests: whole files, since what a file sets up is set up once, and all that bring up a
    cluster in one process, since one is up at a time; in the order of their first tests."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "clusters" if file.startswith(("tests/cluster/", "tests/rehearsal/")) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty storage root and database for one test."""
    folder = tmp_path / "whorl"
    monkeypatch.setenv("WHORL_STORAGE", str(folder))
    monkeypatch.setenv("WHORL_DATABASE", f"sqlite:///{folder / 'whorl.db'}")
    return folder


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def either_database(request: pytest.FixtureRequest, storage: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs on both: each time with a new database."""
    if request.param == "postgresql":
        monkeypatch.setenv("WHORL_DATABASE", request.getfixturevalue("postgres").fresh())
    return str(request.param)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with MLflow's tables and nothing in them: making them takes a second."""
    from lib import tracking

    file = tmp_path_factory.mktemp("database") / "whorl.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHORL_DATABASE", f"sqlite:///{file}")
        tracking.client()
    return file


@pytest.fixture
def database(storage: Path, empty_database: Path) -> Path:
    """The database of `storage`, with its tables made already."""
    storage.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(empty_database, storage / "whorl.db"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray for all integration tests, with more logical CPUs than the machine has cores."""
    import ray

    # Ray's socket paths must stay under 107 characters, so the folder is not pytest's own.
    folder = tempfile.mkdtemp(prefix="whorl-test-", dir="/tmp")
    ray.shutdown()  # a job that a test ran in this process may have started a Ray of its own
    ray.init(
        "local",  # not one that a test has up at that moment
        num_cpus=8,
        include_dashboard=False,
        logging_level="warning",
        _temp_dir=folder,
        runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model's directory: a random Llama, 2 layers, 32 wide, a byte-level BPE tokeniser, ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    folder = tmp_path_factory.mktemp("tiny-chat-base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "system user assistant"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    # At the usual scale a random model says nothing but even odds, whatever it attends to.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder
