"""What a run shows while it trains: its curves in MLflow, its progress and its validations on the terminal."""

from __future__ import annotations

from lib import tracking
from lib.progress import Progress
from lib.training.checkpoints import State


class Logged:
    """The run's curves and the progress bar, on rank 0; on the others it does nothing.

    Steps that were logged before a worker or the driver was killed are trained again, and give the same
    figures: they are not logged again, so that a curve has one value for each step.
    """

    def __init__(self, run: tracking.Run | None, rows: int, state: State, terminal: bool) -> None:
        self.run = run
        if run is None:
            return
        self.until = {kind: run.last_step(f"{kind}/loss") for kind in ("train", "validation")}
        self.progress = Progress(rows, "training", "rows", terminal, done=int(state.seen))

    def training(self, record: dict[str, float], seen: float) -> None:
        if self.run is None:
            return
        if record["step"] > self.until["train"]:
            values = {f"train/{k}": v for k, v in record.items() if k != "step"}
            self.run.log_metrics(values, int(record["step"]))
        self.progress.to(int(seen), f"loss {record['loss']:.3f}")

    def validation(self, step: int, metrics: dict[str, float], better: bool) -> None:
        if self.run is None:
            return
        if step > self.until["validation"]:
            self.run.log_metrics({f"validation/{k}": v for k, v in metrics.items()}, step)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        print(f"validation after step {step}: {shown}{'  (best so far)' if better else ''}", flush=True)

    def close(self) -> None:
        if self.run is not None:
            self.progress.close()
