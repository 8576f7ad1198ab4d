"""Keys of `data.augment`: new rows for the training split, made of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lib.settings.sections import Listed, PinnedModel, Positive, Section, Share

# What changes words of a text, and what a model writes, in the order in which they take turns.
EDITS = ("synonyms", "swap", "delete", "insert", "spelling")
WRITTEN = ("paraphrase", "back_translation")
METHODS = (*EDITS, *WRITTEN)
PARAPHRASE = (
    "Write the following text again in other words. Keep its meaning, its tone and its language. "
    "Answer with the new text alone.\n\n{text}"
)
TRANSLATE = "Translate the following text into {language}. Answer with the translation alone.\n\n{text}"


def _on(value: Any) -> Any:
    """`swap: true` and `swap: false` as the section and None."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def _prompt(value: str) -> str:
    if "{text}" not in value:
        raise ValueError("a prompt needs {text}, where the text is put in")
    return value


Prompt = Annotated[str, BeforeValidator(_prompt)]


class EditSettings(Section):
    """A method that changes words (Wei and Zou 2019 name both keys so)."""

    n_aug: Positive = 1
    """New rows a row; with `balance`, how often this method has its turn beside others."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of a text's words that is changed, at least one word."""


class ParaphraseSettings(Section):
    """The generator says the same in other words."""

    n_aug: Positive = 1
    prompt: Prompt = PARAPHRASE


class BackTranslationSettings(Section):
    """The generator translates, and then back."""

    n_aug: Positive = 1
    """The first is through the first of `languages`, the second through the second, and so on."""
    languages: Listed[str] = ["German", "French", "Spanish"]
    """Into which it is translated, by the names that the model knows them by."""
    language: str = "English"
    """Of the source."""
    prompt: Prompt = TRANSLATE
    """Of both ways: {language} is where to."""


class WriterSettings(Section):
    """The model that writes paraphrases and translations, and what of them stays."""

    model: PinnedModel
    """`NAME@VERSION` of a registered chat model, or a base as `model.base` names one, with a chat template."""
    max_tokens: Positive = 256
    """Of an answer; one that does not end there is left out."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    """Each row draws by its own id and the seed. 0: the likeliest token each time, so that n_aug above 1 repeats itself."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    length: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Least and most length of what is written, in parts of what was read."""
    least_similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Cosine of the vectors of both texts; what is below is left out. None: nobody looks."""
    encoder: str = "sample://minilm-l6"
    """Whose vectors these are."""
    workers: Positive = 1
    """Actors that write; each takes `cpus_per_worker` and `gpus_per_worker`."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _ordered(self) -> WriterSettings:
        if self.length[0] > self.length[1]:
            raise ValueError(f"length: {self.length[0]:g} is above {self.length[1]:g}; give the least first")
        return self


class BalanceSettings(Section):
    """Labels that are filled up with new rows."""

    to: Literal["largest"] | Positive | Annotated[float, Field(gt=0, le=1)] = "largest"
    """Up to how many training rows: as many as the largest label has, a number, or a share of the largest label's."""
    copies: bool = False
    """Bare copies where the methods make nothing new of a row."""


Edit = Annotated[EditSettings | None, BeforeValidator(_on)]


class AugmentSettings(Section):
    """New training rows. Validation and test stay as they are."""

    synonyms: Edit = None
    """Words become others of like meaning."""
    swap: Edit = None
    """Two words change places, as often as `alpha` says."""
    delete: Edit = None
    """Each word goes with the probability `alpha`."""
    insert: Edit = None
    """A synonym of some word comes to stand anywhere."""
    spelling: Edit = None
    """Typing errors: a key beside the right one, two letters the wrong way round, one missing, one twice."""
    paraphrase: Annotated[ParaphraseSettings | None, BeforeValidator(_on)] = None
    back_translation: Annotated[BackTranslationSettings | None, BeforeValidator(_on)] = None
    keep: list[str] = ["no", "not", "nor", "never", "cannot", "without"]
    """Words that no edit touches, in any case."""
    thesaurus: str | None = None
    """Synonyms: a URI of JSON {word: [word, …]}, or of lines `word: word, word`. None: the words whose vectors in the base
    model's own table of input embeddings are nearest."""
    least_similarity: Share = 0.55
    """Without a thesaurus: cosine of two words' vectors, after the mean of all is taken off."""
    neighbours: Positive = 5
    """Without a thesaurus: words that one is replaced by."""
    writer: WriterSettings | None = None
    """What writes paraphrases and translations."""
    balance: BalanceSettings | None = None

    @property
    def methods(self) -> dict[str, int]:
        """Method → its n_aug, of those that are asked for."""
        return {name: one.n_aug for name in METHODS if (one := getattr(self, name)) is not None}

    @property
    def written(self) -> bool:
        return any(name in self.methods for name in WRITTEN)

    @property
    def has_synonyms(self) -> bool:
        return bool(self.methods.keys() & {"synonyms", "insert"})

    @model_validator(mode="after")
    def _something(self) -> AugmentSettings:
        if not self.methods and not (self.balance and self.balance.copies):
            raise ValueError(f"no method is named; give some of {', '.join(METHODS)}, such as swap: true")
        return self

    @model_validator(mode="after")
    def _writer(self) -> AugmentSettings:
        if self.written and self.writer is None:
            name = next(name for name in WRITTEN if name in self.methods)
            raise ValueError(f"{name} needs writer.model, the model that writes; add it")
        if self.writer is not None and not self.written:
            raise ValueError(f"writer: nothing is written without {' or '.join(WRITTEN)}; leave it out")
        return self
