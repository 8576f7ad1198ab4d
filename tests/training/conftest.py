"""Groups of ranks, and a decoder so small that two cores train it in a moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.engines import save_llama
from tests.training.ranks import Ranks


# Of a module, not of the session: DeepSpeed gives buffers of engines back when the process ends, gigabytes of them.
@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """A group of one rank."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    """A group of two ranks."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a random Llama: 3 layers, 32 wide, an output matrix of its own; it has no tokenizer."""
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_key_value_heads": 2, "intermediate_size": 48}
    return save_llama(tmp_path_factory.mktemp("tiny-llama"), **size)
