"""Chat templates: the words of the assistant are found as transformers' marks find them; long dialogues lose the oldest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import chat_templates
from lib.chat_templates import IGNORED
from lib.dialogues import MalformedError
from lib.errors import ConfigError
from lib.settings import ModelSettings
from tests.tiny import CHATML

# `{g}` and `{/g}` stand where a template marks what the assistant says.
HEADERS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}{% if m['role'] == 'assistant' %}{g}"
    "{{ m['content'] | trim + '<|im_end|>' }}{/g}{% else %}{{ m['content'] | trim + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
PLAIN_WORDS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Bot: ' }}{g}{{ m['content'] + '\n' }}{/g}"
    "{% else %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}"
)
MARKED_CHATML = chat_templates.CHATML.replace("{% generation %}", "{g}").replace(
    "{% endgeneration %}", "{/g}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)
# As templates of models that think before they answer: only the last turn keeps it all.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last else m['content'][:1]) + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
WORDS = st.text("abc <|>\n.é", min_size=1, max_size=12).map(str.strip).filter(bool)


def marked(template: str) -> str:
    return template.replace("{g}", "{% generation %}").replace("{/g}", "{% endgeneration %}")


def bare(template: str) -> str:
    return template.replace("{g}", "").replace("{/g}", "")


def turns(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_base: Path) -> Any:
    return chat_templates.load_chat_tokenizer(tiny_chat_base, "tiny", None)


@pytest.mark.parametrize(
    "template", [MARKED_CHATML, HEADERS, PLAIN_WORDS], ids=["chatml", "headers", "words"]
)
@settings(max_examples=30, deadline=None)
@given(said=st.lists(WORDS, min_size=2, max_size=6))
def test_spans_are_those_that_marks_give(tokenizer: Any, template: str, said: list[str]) -> None:
    talk = turns(*said)
    tokenizer.chat_template = marked(template)
    expected_ids, expected = chat_templates.tokens(tokenizer, talk)
    tokenizer.chat_template = bare(template)
    ids, spoken = chat_templates.tokens(tokenizer, talk)
    assert ids.tolist() == expected_ids.tolist()
    assert spoken.tolist() == expected.tolist()
    assert spoken.any()


def test_the_end_of_a_turn_is_learned_and_what_follows_it_is_not(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    ids, spoken = chat_templates.tokens(tokenizer, turns("the dress?", "great", "size?", "fine"))
    said = [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(np.diff(spoken)) + 1)][1::2]
    assert said == ["great<|im_end|>", "fine<|im_end|>"]
    assert chat_templates.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_what_a_template_refuses_is_told(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    twice = [*turns("a", "b"), {"role": "assistant", "content": "c"}]
    with pytest.raises(MalformedError, match="is refused by the chat template of tiny: roles must alternate"):
        chat_templates.tokens(tokenizer, twice, "tiny")
    assert chat_templates.tokens(tokenizer, turns("a", "b", "c", "d"))[1].any()


def test_a_template_that_rewrites_earlier_turns_cannot_be_split(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(
        MalformedError, match=r"cannot be told apart .* turn 2 changes when it is added; give model"
    ):
        chat_templates.tokens(tokenizer, turns("aa", "bb", "cc", "dd"), "tiny")


def encode(base: Path, talk: list[dict[str, str]], length: int) -> chat_templates.Encoded:
    return chat_templates.encode(talk, ModelSettings(base=str(base), max_length=length))


def test_the_oldest_exchanges_go_and_the_system_message_stays(tiny_chat_base: Path, tokenizer: Any) -> None:
    system = {"role": "system", "content": "soft"}
    talk = [system, *turns(*["the dress fits great"] * 5, "the size is fine")]
    tokenizer.chat_template = CHATML
    whole, _ = chat_templates.tokens(tokenizer, talk)
    last, _ = chat_templates.tokens(tokenizer, [system, *talk[-4:]])
    assert not encode(tiny_chat_base, talk, len(whole)).truncated
    for length in (len(whole) - 1, len(last)):
        cut = encode(tiny_chat_base, talk, length)
        assert cut.truncated
        assert cut.input_ids.tolist() == last.tolist()
        assert (cut.labels != IGNORED).sum() > 0


def test_a_last_exchange_that_is_too_long_is_cut(tiny_chat_base: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    talk = turns("the dress", "great fit " * 30)
    ids, _ = chat_templates.tokens(tokenizer, talk)
    cut = encode(tiny_chat_base, talk, 40)
    assert cut.truncated
    assert cut.input_ids.tolist() == ids[:40].tolist()
    # Where only the question were left, it is the question that is cut.
    talk = turns("great fit " * 30, "the dress")
    ids, _ = chat_templates.tokens(tokenizer, talk)
    cut = encode(tiny_chat_base, talk, 40)
    assert cut.truncated
    assert cut.input_ids.tolist() == ids[-40:].tolist()
    assert tokenizer.decode(cut.labels[cut.labels != IGNORED]) == "the dress<|im_end|>"


def test_a_base_without_a_template_needs_one_from_the_configuration(
    tiny_chat_base: Path, tmp_path: Path
) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_chat_base, base)
    (base / "chat_template.jinja").unlink()
    talk = turns("the dress", "great")
    with pytest.raises(
        ConfigError, match=r"has no chat template; give model\.chat_template: chatml, or the file"
    ):
        encode(base, talk, 64)
    by_name = chat_templates.encode(talk, ModelSettings(base=str(base), chat_template="chatml"))
    assert by_name.input_ids.tolist() == encode(tiny_chat_base, talk, 64).input_ids.tolist()
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    by_file = chat_templates.encode(talk, ModelSettings(base=str(base), chat_template=str(file)))
    assert by_file.labels.tolist() == by_name.labels.tolist()
    with pytest.raises(ConfigError, match="is neither chatml nor a file that can be read"):
        chat_templates.encode(talk, ModelSettings(base=str(base), chat_template=str(tmp_path / "no.jinja")))


def test_chatml_needs_its_tokens(tiny_chat_base: Path, tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no token <\|im_start\|>"):
        chat_templates.encode(turns("a", "b"), ModelSettings(base=str(tiny_base), chat_template="chatml"))
