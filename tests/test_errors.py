"""One line, the right exit code, and found again inside what Ray wraps around it."""

from __future__ import annotations

import pytest

from lib import errors


def test_message_is_one_line() -> None:
    assert str(errors.DataError("first\n  second\tthird")) == "first second third"


@pytest.mark.parametrize(
    ("kind", "code"),
    [(errors.ConfigError, 2), (errors.DataError, 2), (errors.ModelError, 2), (errors.GateError, 3)],
)
def test_exit_codes(kind: type[errors.WhorlError], code: int) -> None:
    assert kind("x").exit_code == code


def test_unwrap_walks_causes_contexts_and_workers() -> None:
    ours = errors.DataError("row 3")
    outer = RuntimeError("ray")
    outer.__cause__ = ValueError("inner")
    outer.__cause__.__context__ = ours
    assert errors.unwrap(outer) is ours
    group = RuntimeError("workers died")
    group.worker_failures = {0: KeyError("x"), 1: outer}  # type: ignore[attr-defined]
    assert errors.unwrap(group) is ours
    assert errors.unwrap(RuntimeError("a bug")) is None


def test_unwrap_prefers_the_plain_error_over_rays_double() -> None:
    plain = errors.DataError("one line")

    class Double(errors.DataError):
        cause = plain

    assert errors.unwrap(Double("a whole traceback")) is plain


def test_nearest() -> None:
    assert errors.nearest("lerning_rate", ["learning_rate", "epochs"]) == "; did you mean 'learning_rate'?"
    assert errors.nearest("zzz", ["learning_rate"]) == ""
