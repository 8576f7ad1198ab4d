"""Base models and samples: found, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.base_models import base_directory, tokenizer_checksum
from lib.errors import ConfigError, ModelError
from lib.samples import sample_path


def test_sample_model_is_a_directory_with_safetensors() -> None:
    folder = base_directory("sample://minilm-l6")
    assert (folder / "model.safetensors").is_file()


def test_sample_data_has_the_rows_it_says() -> None:
    import pyarrow.parquet as pq

    assert pq.ParquetFile(sample_path("sample://reviews", "data")).metadata.num_rows == 23_486


@pytest.mark.parametrize(
    ("base", "kind", "says"),
    [
        ("sample://minilm-l7", ConfigError, "did you mean 'minilm-l6'"),
        ("sample://reviews", ConfigError, "no sample model"),
        ("./no/such/folder", ModelError, "no model directory ./no/such/folder"),
        ("file:///no/such/folder", ModelError, "no model directory"),
        ("nobody/nothing", ModelError, "HF_HUB_OFFLINE"),
    ],
)
def test_absent_base(base: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        base_directory(base)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"holds pytorch_model\.bin, which unpickles on loading"):
        base_directory(str(tmp_path))


def test_directory_without_weights_or_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        base_directory(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no weights"):
        base_directory(str(tmp_path))


def test_tokenizer_checksum_follows_the_files(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    assert tokenizer_checksum(str(copy)) == tokenizer_checksum(str(tiny_base))
    (copy / "tokenizer_config.json").write_text("{}")
    assert tokenizer_checksum(str(copy)) != tokenizer_checksum(str(tiny_base))


@pytest.mark.slow
def test_a_gguf_sample_is_converted_once(capsys: pytest.CaptureFixture[str]) -> None:
    """In the project's own cache, where it stays: the conversion takes longer than all that is looked at here."""
    import json

    from lib.chat_templates import chat_tokenizer, end_of_turn

    base = "sample://smollm2-135m-instruct"
    folder = base_directory(base)
    capsys.readouterr()
    assert base_directory(base) == folder
    assert capsys.readouterr().out == ""
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["num_hidden_layers"]) == ("llama", "bfloat16", 30)
    assert "quantization_config" not in config
    tokenizer = chat_tokenizer(base, None)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == end_of_turn(tokenizer)
    assert tokenizer_checksum(base) == tokenizer_checksum(str(folder))
