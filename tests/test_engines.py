"""Encoders: both engines agree with transformers, whatever the mix of lengths and the token budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib import storage, tracking
from lib.engines import like_lengths, load_cross_encoder, load_encoder, load_sentence_encoder, rounded
from lib.errors import ModelError, ResourceError
from lib.settings import ServingSettings


@pytest.fixture(scope="module")
def classifier(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a random 3-class head."""
    from transformers import AutoModelForSequenceClassification, set_seed

    folder = tmp_path_factory.mktemp("classifier")
    set_seed(1)
    AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3).save_pretrained(folder)
    return folder


def rows_of(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 50, n).astype(np.int32) for n in lengths]


def expected(folder: Path, rows: list[np.ndarray]) -> np.ndarray:
    """One row at a time through transformers in fp32: no padding, no engine."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        found = [model(torch.from_numpy(row.astype(np.int64))[None]).logits[0].numpy() for row in rows]
    return np.stack(found)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_logits_match_transformers_row_by_row(classifier: Path, engine: str, budget: int) -> None:
    rows = rows_of([3, 90, 4, 17, 1, 33, 90, 2, 128])
    serving = ServingSettings(engine=engine, precision="fp32", tokens_per_batch=budget)  # type: ignore[arg-type]
    encoder = load_encoder(classifier, serving)
    assert encoder.classes == 3
    np.testing.assert_allclose(encoder.logits(rows), expected(classifier, rows), atol=2e-4)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_bf16_stays_near_fp32(classifier: Path, engine: str) -> None:
    rows = rows_of([5, 60, 30])
    encoder = load_encoder(classifier, ServingSettings(engine=engine, precision="bf16"))  # type: ignore[arg-type]
    np.testing.assert_allclose(encoder.logits(rows), expected(classifier, rows), atol=0.05)


def test_auto_takes_openvino_in_bf16_where_the_processor_has_it(classifier: Path) -> None:
    precision = tracking.cpu_precision()
    assert load_encoder(classifier, ServingSettings()).name == f"openvino {precision}"


def test_results_do_not_change_under_later_calls(classifier: Path) -> None:
    encoder = load_encoder(classifier, ServingSettings(precision="fp32"))
    first = encoder.logits(rows_of([7]))
    kept = first.copy()
    encoder.logits(rows_of([9, 7]))
    np.testing.assert_array_equal(first, kept)


def test_like_lengths_covers_all_rows_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 130, 500)
    batches = list(like_lengths(lengths, 1024))
    assert sorted(np.concatenate(batches)) == list(range(500))
    for batch in batches:
        assert len(batch) * rounded(int(lengths[batch].max())) <= 1024
    # In random batches of 8 the padding would be about as much as the tokens.
    padded = sum(len(b) * rounded(int(lengths[b].max())) for b in batches)
    assert padded < 1.15 * lengths.sum()


def test_like_lengths_of_nothing_is_nothing() -> None:
    assert list(like_lengths(np.zeros(0, np.int64), 64)) == []


def test_a_row_above_the_budget_is_a_batch_of_its_own() -> None:
    assert [list(b) for b in like_lengths(np.array([100, 8, 100]), 64)] == [[1], [0], [2]]


def test_a_gpu_that_is_not_there_is_one_line(classifier: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ResourceError, match="gpus_per_replica"):
        load_encoder(classifier, ServingSettings(gpus_per_replica=1))


def test_openvino_on_a_gpu_is_refused(classifier: Path) -> None:
    with pytest.raises(ResourceError, match="engine openvino runs on CPUs"):
        load_encoder(classifier, ServingSettings(engine="openvino", gpus_per_replica=1))


def test_broken_weights_are_one_line(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((classifier / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="does not load"):
        load_encoder(tmp_path, ServingSettings())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_sentence_vectors_are_pooled_as_sentence_transformers_does(
    tiny_base: Path, tmp_path: Path, engine: str, pooling: str
) -> None:
    import shutil

    import torch
    from transformers import AutoModel

    folder = tmp_path / "encoder"
    shutil.copytree(tiny_base, folder)
    (folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    storage.write_json(str(folder / "1_Pooling" / "config.json"), {"word_embedding_dimension": 32, **modes})
    rows = rows_of([3, 40, 7, 1])
    encoder = load_sentence_encoder(folder, ServingSettings(engine=engine, precision="fp32"))  # type: ignore[arg-type]
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = [model(torch.from_numpy(row.astype(np.int64))[None]).last_hidden_state[0] for row in rows]
    wanted = torch.stack([h.mean(0) if pooling == "mean" else h[0] for h in hidden])
    wanted = torch.nn.functional.normalize(wanted, dim=1)
    np.testing.assert_allclose(encoder.vectors(rows), wanted.numpy(), atol=2e-4)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_pair_of_texts_is_read_as_transformers_reads_it(
    classifier: Path, tiny_base: Path, engine: str
) -> None:
    """With the second text's tokens told apart from the first's, in a batch of several lengths."""
    import shutil

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for file in tiny_base.glob("tokenizer*"):
        shutil.copy(file, classifier)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    pairs = [("is it soft", "the fabric is soft"), ("a dress", "fits"), ("great", "the size is okay " * 9)]
    encoded = [tokenizer(*pair, return_tensors="pt", return_token_type_ids=True) for pair in pairs]
    assert {tuple(each["token_type_ids"][0].unique().tolist()) for each in encoded} == {(0, 1)}
    with torch.inference_mode():
        wanted = np.stack([model(**each).logits[0].numpy() for each in encoded])
        blind = np.stack([model(input_ids=each["input_ids"]).logits[0].numpy() for each in encoded])
    encoder = load_cross_encoder(classifier, ServingSettings(engine=engine, precision="fp32"))  # type: ignore[arg-type]
    found = encoder.logits([each["input_ids"][0].numpy().astype(np.int32) for each in encoded])
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert np.abs(found - wanted).max() < np.abs(blind - wanted).max() / 10  # the types count


def test_a_pooling_that_is_not_known_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "encoder"
    shutil.copytree(tiny_base, folder)
    storage.write_json(str(folder / "1_Pooling" / "config.json"), {"pooling_mode_max_tokens": True})
    with pytest.raises(ModelError, match="asks for pooling_mode_max_tokens; known are"):
        load_sentence_encoder(folder, ServingSettings())


def test_openvino_reports_to_nobody(classifier: Path) -> None:
    load_encoder(classifier, ServingSettings(engine="openvino"))
    from openvino.tools.ovc import convert_impl, telemetry_utils

    for module in (convert_impl, telemetry_utils):
        assert module.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
