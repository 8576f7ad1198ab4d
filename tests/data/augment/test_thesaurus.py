"""Words of like meaning, from files and from a model's embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lib.base_models import base_directory
from lib.data.augment import thesaurus
from lib.errors import DataError


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "words.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_file_is_json_or_lines(tmp_path: Path) -> None:
    expected = {"dress": ["gown", "evening gown"], "漂亮": ["好看", "美丽"]}
    lines = "Dress: gown, evening gown, dress\n\n漂亮：好看、美丽\ndress: gown\n"
    assert thesaurus.read(written(tmp_path, lines)).entries == expected
    as_json = json.dumps({"DRESS ": ["gown", " evening gown"], "漂亮": ["好看", "美丽"]}, indent=1)
    found = thesaurus.read(written(tmp_path, as_json))
    assert found.entries == expected
    assert found.longest == 2
    assert found.others("Dress") == ["gown", "evening gown"]
    assert found.others("shirt") == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("dress gown\n", "line 1 is no `word: word, word`: 'dress gown'"),
        ("ok: fine\n: gown\n", "line 2 is no"),
        ('{"dress": "gown"}', "has no list of words for 'dress'"),
        ('{"dress": [', "is not valid JSON"),
        ("\n", "holds no synonyms"),
        ("dress: dress", "holds no synonyms"),
        (b"dr\xe4ss: gown", "is not valid UTF-8"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(DataError) as caught:
        thesaurus.read(written(tmp_path, content))
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"data.augment.thesaurus: {tmp_path}")
    assert "\n" not in str(caught.value)


def test_embeddings_are_those_that_the_model_reads(tiny_base: Path, tiny_chat_base: Path) -> None:
    from transformers import AutoModel

    for base in (tiny_base, tiny_chat_base):
        table = AutoModel.from_pretrained(base).get_input_embeddings().weight.detach().float().numpy()
        assert np.array_equal(thesaurus.input_embeddings(base), table)


def test_whole_words_are_single_tokens_of_letters(tiny_base: Path) -> None:
    words, rows = thesaurus.whole_words(tiny_base)
    assert {"dress", "fabric", "great", "awful"} <= set(words)
    assert not {"the", "was", "a", "##b"} & set(words)  # of no meaning, or of a few letters
    from lib.encoders import UNCUT, load_tokenizer

    tokenizer = load_tokenizer(tiny_base, UNCUT)
    assert [tokenizer.token_to_id(word) for word in words] == rows


def test_neighbours_are_the_nearest_above_the_floor(tiny_base: Path) -> None:
    words, rows = thesaurus.whole_words(tiny_base)
    vectors = thesaurus.input_embeddings(tiny_base)
    vectors = vectors[rows] - vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = vectors @ vectors.T
    np.fill_diagonal(alike, -1)
    found = thesaurus.of_embeddings(tiny_base, 0.1, 3).entries
    for i, word in enumerate(words):
        expected = [words[j] for j in np.argsort(-alike[i], kind="stable")[:3] if alike[i, j] >= 0.1]
        assert found.get(word, []) == expected
    assert not thesaurus.of_embeddings(tiny_base, 0.999, 3).entries


@pytest.mark.slow
def test_a_sentence_encoder_knows_synonyms() -> None:
    found = thesaurus.of_embeddings(base_directory("sample://minilm-l6"), 0.5, 3)
    assert "dresses" in found.others("dress")
    assert "gorgeous" in found.others("beautiful")
    assert "excellent" in found.others("good")
