"""Answers of a causal model: what each dialogue's own seed decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.artifacts import TaskFile
from lib.generation import Generator, open_generator
from lib.settings import ServingSettings


@pytest.fixture(scope="module")
def generator(tiny_chat_base: Path) -> Generator:
    info = TaskFile("chat", [], 256, str(tiny_chat_base), "")
    return open_generator(tiny_chat_base, info, ServingSettings(threads=1, precision="fp32"))


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_a_seed_of_its_own_makes_a_dialogue_independent_of_others(generator: Generator) -> None:
    texts = ["fits", "the dress is soft and good", "love", "a shirt"]
    whole = generator.answers(asked(*texts), 12, 1.0, 0.9, seeds=[1, 2, 3, 4])
    alone = [
        generator.answers(asked(text), 12, 1.0, 0.9, seeds=[i + 1])[0].text for i, text in enumerate(texts)
    ]
    assert [answer.text for answer in whole] == alone
    other = generator.answers(asked(*texts), 12, 1.0, 0.9, seeds=[5, 6, 7, 8])
    assert all(a.text != b.text for a, b in zip(whole, other, strict=True))


def test_draws_follow_the_models_odds(generator: Generator) -> None:
    import torch

    prompt = generator.prompt(asked("fits")[0])
    with torch.inference_mode():
        logits = generator.model(input_ids=torch.tensor([prompt])).logits[0, -1].float()
    count = 400
    for top_p in (1.0, 0.5):
        odds = (logits / 0.7).softmax(-1)
        ordered, places = odds.sort(descending=True)
        nucleus = int((ordered.cumsum(-1) < top_p).sum()) + 1
        likeliest = int(places[0])
        said = generator._generate([prompt] * count, 1, 0.7, top_p, None, list(range(count)))
        expected = float(ordered[0] / ordered[:nucleus].sum())
        text = generator.tokenizer.decode([likeliest], skip_special_tokens=True).strip()
        share = sum(answer.text == text for answer in said) / count
        # Other tokens may read the same; four standard deviations of a share.
        assert share >= expected - 4 * (expected * (1 - expected) / count) ** 0.5
        if top_p < 1:
            allowed = {
                generator.tokenizer.decode([int(i)], skip_special_tokens=True).strip()
                for i in places[:nucleus]
            }
            assert {answer.text for answer in said} <= allowed
