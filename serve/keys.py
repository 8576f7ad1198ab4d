"""API keys of the applications: make one, see them, end one.

    python -m serve.keys create --name shop --scopes support,reviews [--requests-per-minute 600]
                                [--tokens-per-minute 60000] [--days 90]
    python -m serve.keys list
    python -m serve.keys revoke ID

A scope is an application's name, the `name` of its configuration; `*` holds all. A key is shown once, when it is
made. One that was revoked is refused everywhere within `serving.access.keys_for_s` seconds.
"""

from __future__ import annotations

import argparse
import sys
import time

from lib import keys
from lib.errors import WhorlError
from lib.keys import Key


def main(words: list[str] | None = None) -> int:
    """Run the command; its exit code: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("create", help="make a key and show it")
    made.add_argument("--name", required=True, help="whose it is")
    made.add_argument("--scopes", required=True, help="applications, with commas between; * for all")
    made.add_argument("--requests-per-minute", type=int)
    made.add_argument("--tokens-per-minute", type=int)
    made.add_argument("--days", type=float, help="how long it is valid; for ever without")
    commands.add_parser("list", help="all keys, without their secrets")
    commands.add_parser("revoke", help="end a key").add_argument("id")
    given = parser.parse_args(words)
    try:
        if given.command == "create":
            created(given)
        elif given.command == "list":
            print(table(keys.listed()))
        else:
            key = keys.revoke(given.id)
            print(f"revoked {key.id} ({key.name})")
    except WhorlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def created(given: argparse.Namespace) -> None:
    key, secret = keys.create(
        given.name,
        given.scopes.split(","),
        requests_per_minute=given.requests_per_minute,
        tokens_per_minute=given.tokens_per_minute,
        days=given.days,
    )
    print(secret)
    print(
        f"key {key.id} of {key.name} for {' '.join(sorted(key.scopes))}; it is not shown again",
        file=sys.stderr,
    )


def table(found: list[Key]) -> str:
    """Keys as columns for people."""
    now = time.time()
    rows = [("id", "name", "scopes", "requests/min", "tokens/min", "made", "state")]
    for key in found:
        state = "revoked" if key.revoked else "valid" if key.is_valid(now) else "expired"
        limits = (str(key.requests_per_minute or "-"), str(key.tokens_per_minute or "-"))
        day = time.strftime("%Y-%m-%d", time.gmtime(key.created))
        rows.append((key.id, key.name, " ".join(sorted(key.scopes)), *limits, day, state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
