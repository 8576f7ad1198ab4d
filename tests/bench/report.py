"""The one form of every measurement: a table on the screen, `.whorl/bench/NAME.json` beside it.

A bench never fails because a target was missed: it reports. Ratios are always "how many times better
than the rival", whichever way the unit counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lib import storage, tracking


@dataclass(frozen=True)
class Row:
    case: str
    rival: str
    ours: float
    theirs: float | None
    unit: str
    ratio: float | None
    target: float | None
    holds: bool | None


class Report:
    """Collects rows; `finish` prints them and writes the JSON."""

    def __init__(self, name: str) -> None:
        # Where results lie now: a bench may turn to a store of its own.
        self.path = storage.join(storage.root(), "bench", f"{name}.json")
        self.rows: list[Row] = []

    def row(
        self,
        case: str,
        ours: float,
        *,
        unit: str,
        rival: str = "",
        theirs: float | None = None,
        target: float | None = None,
        higher_is_better: bool = True,
    ) -> Row:
        """One comparison. Without `theirs` the target is on `ours` itself."""
        ratio = None
        if theirs is not None:
            above, below = (ours, theirs) if higher_is_better else (theirs, ours)
            ratio = above / below if below else float("inf")
        measured = ratio if ratio is not None else ours
        if target is None:
            holds = None
        elif ratio is None and not higher_is_better:
            holds = measured <= target
        else:
            holds = measured >= target
        row = Row(case, rival, ours, theirs, unit, ratio, target, holds)
        self.rows.append(row)
        return row

    def finish(self) -> None:
        print(self.table())
        storage.write_json(
            self.path,
            {
                "machine": tracking.machine(),
                "versions": tracking.versions(),
                "git_commit": tracking.git_commit(),
                "rows": [asdict(r) for r in self.rows],
            },
        )
        print(f"written: {self.path}")

    def table(self) -> str:
        head = ["case", "rival", "ours", "theirs", "unit", "ratio", "target", "holds"]
        body = [
            [
                r.case,
                r.rival,
                _figure(r.ours),
                _figure(r.theirs),
                r.unit,
                _figure(r.ratio),
                _figure(r.target),
                _yes(r.holds),
            ]
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in [head, *body]
        ]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join(lines)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _yes(value: bool | None) -> str:
    return "" if value is None else ("yes" if value else "no")
