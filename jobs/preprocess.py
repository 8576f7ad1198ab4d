"""From raw rows to a dataset: read, clean, normalise, drop empty and duplicate rows, map labels, split, tokenise.

    python -m jobs.preprocess --config jobs/configs/reviews.yaml [--data.limit 2000 ...]

Writes Parquet shards and a manifest under datasets/NAME/FINGERPRINT in storage. The fingerprint stands for
the source's content and the configuration: when a dataset of that name is there, nothing is done. `report.html` beside the
manifest shows what is in it. With --explain the plan is printed and nothing is started.
"""

from __future__ import annotations

import sys
from typing import Any

from lib import storage
from lib.artifacts import SPLITS
from lib.command import connect, main
from lib.data import noise
from lib.data.explain import explain
from lib.data.plan import Plan, plan
from lib.data.reading.quarantine import FILE as QUARANTINE
from lib.data.reading.quarantine import REASONS
from lib.data.redact import told
from lib.data.report import FILE as REPORT
from lib.settings import Settings


def preprocess(settings: Settings) -> None:
    planned = plan(settings)
    try:
        report(planned, made(planned))
    finally:
        planned.forget()


def made(planned: Plan) -> dict[str, Any]:
    """The manifest of the dataset, made if it is not there."""
    if planned.ref.exists():
        print(
            f"dataset {planned.ref.fingerprint} is there already, made from the same input and config: skipped"
        )
        return planned.ref.manifest()
    connect()
    from lib.data.build import build  # imports ray

    return build(planned)


def show(settings: Settings) -> None:
    """The plan alone."""
    print("\n".join(explain(plan(settings, fresh=False))))


def report(planned: Plan, manifest: dict[str, Any]) -> None:
    labels = manifest["labels"]
    print(f"fingerprint  {manifest['fingerprint']}")
    dropped = ", ".join(f"{rows:,} {reason}" for reason, rows in manifest["dropped"].items() if rows)
    print(f"rows read    {manifest['rows_read']:,}; dropped: {dropped or 'none'}")
    if (left_out := manifest.get("quarantine")) and left_out["reasons"]:
        reasons = ", ".join(f"{n:,} {REASONS[reason]}" for reason, n in left_out["reasons"].items())
        print(f"quarantine   {reasons}; see {storage.display(storage.join(planned.ref.uri, QUARANTINE))}")
    for line in [*_cleaned(manifest), *_split(manifest)]:
        print(line)
    width = max([10, *(len(label) for label in labels)])
    print(
        f"{'':12} {'rows':>10} "
        + "".join(f"{label:>{width}} " for label in labels)
        + " mean tokens  truncated"
    )
    for split in SPLITS:
        count = manifest["splits"][split]
        by_label = "".join(f"{count['labels'][label]:>{width},} " for label in labels)
        mean = count["tokens"] / max(count["rows"], 1)
        print(f"{split:12} {count['rows']:>10,} {by_label} {mean:>11.1f}  {count['truncated']:>9,}")
    for line in [*_by_source(manifest), *_wrong_labels(manifest, storage.display(planned.ref.uri))]:
        print(line)
    if (redacted := manifest.get("redacted")) is not None:
        print(f"redacted     {told(redacted)}")
    if "augmented" in manifest:
        made = dict(manifest["augmented"])
        none = {"unchanged": made.pop("unchanged", 0), "known": made.pop("known", 0)}
        rows = ", ".join(f"{n:,} by {method}" for method, n in made.items()) or "no new rows"
        print(f"augmented    {rows}" + "".join(f"; {n:,} {why}" for why, n in none.items() if n))
    if "knowledge" in manifest:
        print(f"grounded in  {manifest['knowledge']}")
    print(f"written to   {storage.display(planned.ref.uri)}")
    print(f"to look at   {storage.display(storage.join(planned.ref.uri, REPORT))}")
    print(f"next         python -m jobs.finetune {' '.join(sys.argv[1:])}")


def _wrong_labels(manifest: dict[str, Any], folder: str) -> list[str]:
    """What the label noise report came to, and its first rows."""
    lines = []
    for name, found in manifest.get("label_noise", {}).items():
        share = "-" if found["share"] is None else f"{found['share']:.1%}"
        lines.append(
            f"label noise  {name}: of {found['rows']:,} training rows an estimated {share} have a wrong label or one that the "
            f"text does not tell; {found['suspects']:,} suspects, {len(found['listed']):,} in the manifest"
        )
        lines += [
            f"  {s['row']}: {s['given']} {s['probability']:.2f}, rather {s['suggested']} "
            f"{s['suggested_probability']:.2f}: {s['text'][:60]!r}"
            for s in found["listed"][:3]
        ]
    if lines and manifest["settings"]["label_noise"]["tasks"]:
        lines.append(
            f"  for people: {folder}/{noise.FOLDER}, tasks and labelling configuration of Label Studio"
        )
    return lines


def _by_source(manifest: dict[str, Any]) -> list[str]:
    """Where the rows of the splits come from, where there are several sources."""
    files: dict[int, list[dict[str, Any]]] = {}
    for file in manifest.get("sources", []):
        if "kept" in file:  # a recommender's are no rows any more
            files.setdefault(file["source"], []).append(file)
    lines = []
    for several in files.values() if len(files) > 1 else ():
        name = several[0]["uri"] + (f" and {len(several) - 1} more files" if len(several) > 1 else "")
        rows = {split: sum(file["kept"][split] for file in several) for split in SPLITS}
        weight = f", weight {several[0]['weight']:g}" if "weight" in several[0] else ""
        lines.append(
            f"  {', '.join(f'{n:,} {split}' for split, n in rows.items() if n) or 'none'} of {name}{weight}"
        )
    return ["by source", *lines] if lines else []


def _cleaned(manifest: dict[str, Any]) -> list[str]:
    """What cleaning and the leakage check came to; a recommender's dataset has neither."""
    lines = []
    cleaned = manifest.get("cleaned", {"changed": {}, "rejected": {}})
    if cleaned["changed"]:
        lines.append(
            f"cleaned      {', '.join(f'{rows:,} {step}' for step, rows in cleaned['changed'].items())}"
        )
    for reason, samples in cleaned["rejected"].items():
        lines += [f"  {reason}, {s['row']}: {s['measured']}: {s['text'][:60]!r}" for s in samples]
    leakage = manifest.get("leakage", {"moved": 0, "leaking": 0})
    if leakage["moved"] or leakage["leaking"]:
        done = ("went", "were left out") if leakage["mode"] == "check" else ("would go", "would be left out")
        lines.append(
            f"leakage      {leakage['moved']:,} rows {done[0]} where their near duplicates are; "
            f"{leakage['leaking']:,} {done[1]}, since they say the same as a row of a split behind their own"
        )
    return lines


def _split(manifest: dict[str, Any]) -> list[str]:
    """What rows were split by, where it was not by chance; a recommender's dataset does not say."""
    split = manifest.get("split", {"by": "random"})
    if split["by"] == "random":
        return []
    begins = [f"{n} from {split[f'{n}_from']}" for n in SPLITS if f"{n}_from" in split]
    told = ", ".join([f"{split['by']} ({split['column']})" if "column" in split else split["by"], *begins])
    return [f"split by     {told}"]


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if word != "--explain"]
    main(show if len(given) < len(sys.argv) - 1 else preprocess, given)
