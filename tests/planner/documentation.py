"""The commands that lib/planner/README.md shows, and what they print now.

python -m tests.planner.documentation     writes what they print into the page
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from jobs import plan
from lib.command import run

PAGE = Path("lib/planner/README.md")
BLOCK = re.compile(r"(?<=```\n)\$ python -m jobs\.plan (.*?)\n\n(.*?)(?=```)", re.S)


def shown() -> list[tuple[str, str]]:
    """Each command's arguments, and its output as the page has it."""
    return BLOCK.findall(PAGE.read_text())


def printed(arguments: str) -> str:
    """What `python -m jobs.plan` prints; arguments as they stand on the page."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run(plan.plan, shlex.split(arguments.replace("\\\n", " ")))
    if code:
        raise SystemExit(f"jobs.plan ended with exit code {code}")
    return out.getvalue()


def main() -> None:
    def renewed(block: re.Match[str]) -> str:
        return f"$ python -m jobs.plan {block[1]}\n\n{printed(block[1])}"

    PAGE.write_text(BLOCK.sub(renewed, PAGE.read_text()))


if __name__ == "__main__":
    main()
