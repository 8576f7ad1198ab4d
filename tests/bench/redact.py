"""Redaction: how much personal data is found, and how much else is left alone, beside Presidio's recognisers.

    make bench-redact        (python -m tests.bench.redact [--count 500] [--seed 2] [--presidio PYTHON])

The labelled set is `tests/data/personal.py`'s: rules were tuned on its seed 1, and what is measured is another one. A
value counts as found when no letter or digit of it is left readable, whatever type it was taken for. Precision is the
share of what a type replaced that has a value in it, over all texts, those without personal data included. `held out`
are forms and subjects that were put together after the rules; what a first look at them showed has been mended since.
`two forms` hides what is written in any form in a second way at once, and nothing was tuned on it.

Presidio's pattern recognisers are asked directly, as they are, without the language model that its analyzer loads for
context words: with the countries' phone numbers that ours look for, and no threshold but its own of 0.4. It is no part
of the project; --presidio names a Python that has `presidio-analyzer` (PRESIDIO).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from lib.data.redact import Rules, find_in
from tests.bench.report import Report
from tests.data.personal import TYPES, Text, hard_negatives, negatives, positives

PRESIDIO = "presidio-analyzer==2.2.366"
# The issue's: types with a check digit, and e-mail.
CHECKED = ("EMAIL", "CARD", "IBAN", "ID CN")
# What each side calls them.
OURS = {kind: kind.split()[0] for kind in TYPES}
THEIRS = {
    "EMAIL": "EMAIL_ADDRESS",
    "PHONE": "PHONE_NUMBER",
    "CARD": "CREDIT_CARD",
    "IBAN": "IBAN_CODE",
    "ID US": "US_SSN",
    "IP": "IP_ADDRESS",
    "MAC": "MAC_ADDRESS",
}
RIVAL_PROGRAM = """
import json, sys, time
from presidio_analyzer import predefined_recognizers as made

recognizers = [made.EmailRecognizer(), made.PhoneRecognizer(supported_regions=json.loads(sys.argv[1])),
               made.CreditCardRecognizer(), made.IbanRecognizer(), made.UsSsnRecognizer(), made.IpRecognizer(),
               made.MacAddressRecognizer()]
texts = json.load(sys.stdin)
start = time.perf_counter()
found = [[(r.start, r.end, r.entity_type) for one in recognizers
          for r in one.analyze(text, one.supported_entities, None) if r.score >= 0.4] for text in texts]
print(json.dumps({"found": found, "seconds": time.perf_counter() - start}))
"""

Found = list[tuple[int, int, str]]


@dataclass
class Tally:
    """What one side found in some texts."""

    values: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    replaced: Counter[str] = field(default_factory=Counter)
    """By the side's own kinds, as are those of them that have a value in them."""
    right: Counter[str] = field(default_factory=Counter)

    def add(self, text: Text, spans: Found) -> None:
        hidden = {place for start, end, _ in spans for place in range(start, end)}
        for start, end, kind in text.values:
            self.values[kind] += 1
            self.found[kind] += all(i in hidden or not text.text[i].isalnum() for i in range(start, end))
        for start, end, kind in spans:
            self.replaced[kind] += 1
            self.right[kind] += any(start < last and end > first for first, last, _ in text.values)

    def recall(self, kind: str) -> float:
        return self.found[kind] / self.values[kind]

    def precision(self, kind: str) -> float:
        return self.right[kind] / self.replaced[kind] if self.replaced[kind] else 0.0


def tallied(texts: Iterable[Text], spans: Iterable[Found]) -> Tally:
    tally = Tally()
    for text, found in zip(texts, spans, strict=True):
        tally.add(text, found)
    return tally


def untouched(spans: list[Found]) -> float:
    return sum(not found for found in spans) / len(spans)


def ours(texts: list[Text]) -> tuple[list[Found], float]:
    rules = Rules()
    start = time.perf_counter()
    found = [[(first, last, kind) for first, last, kind, _ in find_in(text.text, rules)] for text in texts]
    return found, time.perf_counter() - start


def theirs(texts: list[Text], python: str) -> tuple[list[Found], float] | None:
    """None, with the reason printed, where Presidio is not installed."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [python, "-c", RIVAL_PROGRAM, json.dumps(Rules().regions)]
        done = subprocess.run(
            words,
            input=json.dumps([text.text for text in texts]),
            capture_output=True,
            text=True,
            cwd=scratch,
        )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["it failed"]
        print(f"without the rival: {said[0]}; give --presidio PYTHON, one that has {PRESIDIO}")
        return None
    answer = json.loads(done.stdout.splitlines()[-1])
    return [[(first, last, kind) for first, last, kind in found] for found in answer["found"]], answer[
        "seconds"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="texts of each type")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--presidio", default=sys.executable, help="a Python that has Presidio")
    given = parser.parse_args()
    plain = 12 * given.count
    sets = {
        "": [*positives(given.seed, given.count), *negatives(given.seed, plain)],
        "held out: ": [
            *positives(given.seed, given.count, held_out=True),
            *negatives(given.seed, plain, held_out=True),
        ],
        "two forms: ": [*positives(given.seed, given.count, twice=True)],
    }
    hard = list(hard_negatives(given.seed, given.count))
    everything = [text for texts in (*sets.values(), hard) for text in texts]
    found, seconds = ours(everything)
    rival = theirs(everything, given.presidio)
    report, place = Report("redact"), 0
    for name, texts in sets.items():
        part = slice(place, place + len(texts))
        place = part.stop
        tally = tallied(texts, found[part])
        other = tallied(texts, rival[0][part]) if rival else None
        for kind in TYPES:
            checked = kind in CHECKED and not name
            _row(report, f"{name}{kind} recall", tally.recall(kind), 0.98 if checked else None,
                 other and kind in THEIRS and other.recall(kind))  # fmt: skip
            precision = tally.precision(OURS[kind])
            _row(report, f"{name}{kind} precision", precision, 0.95 if checked else None,
                 other and kind in THEIRS and other.precision(THEIRS[kind]))  # fmt: skip
            both = precision + tally.recall(kind)
            _row(report, f"{name}{kind} F1", 2 * precision * tally.recall(kind) / both if both else 0.0)
        if not name:
            plainly = [i for i, text in enumerate(texts) if text.form == "plain"]
            tally, other = (
                spans and tallied([texts[i] for i in plainly], [spans[i] for i in plainly])
                for spans in (found[part], rival and rival[0][part])
            )
            for kind in THEIRS:
                _row(
                    report,
                    f"{kind}, written plainly: recall",
                    tally.recall(kind),
                    None,
                    other and other.recall(kind),
                )
        if texts[-1].values:
            continue
        without = slice(part.stop - plain, part.stop)
        _row(report, f"{name}{plain:,} texts without: untouched", untouched(found[without]), 0.995 if not name else None,
             rival and untouched(rival[0][without]))  # fmt: skip
    _row(report, f"{len(hard)} order numbers that pass Luhn: untouched", untouched(found[place:]), None,
         rival and untouched(rival[0][place:]))  # fmt: skip
    report.row(
        f"{len(everything):,} texts",
        len(everything) / seconds,
        unit="rows/s",
        rival="Presidio" if rival else "",
        theirs=len(everything) / rival[1] if rival else None,
    )
    report.finish()


def _row(report: Report, case: str, share: float, target: float | None = None, rival: object = None) -> None:
    """The target is on our own share, so a rival's stands in a row of its own."""
    report.row(case, share, unit="of 1", target=target)
    if isinstance(rival, float):
        report.row(case, share, unit="of 1", rival="Presidio", theirs=rival)


if __name__ == "__main__":
    main()
