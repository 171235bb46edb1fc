"""The progress that commands show on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ltloss.training.measure.metrics import number, percent


def progress_bar(total: int, done: int = 0, *, quiet: bool = False, what: str = "epoch", **more: Any) -> Any:
    """A tqdm bar on stderr; silent with ``quiet``, or if stderr is not a terminal. ``what`` is the unit."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit=what, disable=quiet or not sys.stderr.isatty(), **more)


class EpochProgress:
    """The progress of a training: on a terminal a bar over the steps of each epoch, elsewhere a line after each."""

    def __init__(self, epochs: int, *, quiet: bool = True) -> None:
        self._epochs, self._quiet = epochs, quiet
        self._bar: Any = None

    def begin(self, epoch: int, steps: int) -> None:
        """Begin epoch number ``epoch`` (from 1)."""
        title = f"epoch {epoch}/{self._epochs}"
        self._bar = progress_bar(steps, quiet=self._quiet, what="step", desc=title, dynamic_ncols=True)

    def step(self, loss: float | None = None) -> None:
        """Count a step; ``loss`` is shown if given."""
        self._bar.update()
        if loss is not None:
            self._bar.set_postfix(loss=number(loss))

    def end(self, row: Mapping[str, Any]) -> None:
        """End the epoch, and show its ``row`` of metrics.csv."""
        shown = {"loss": number(row["train_loss"]), "test": f"{percent(row['test_accuracy'])} %"}
        if (validation := row["validation_balanced_accuracy"]) is not None:
            shown["validation"] = f"{percent(validation)} %"
        self._bar.set_postfix(shown)
        self.close()
        if not (self._quiet or sys.stderr.isatty()):
            what = ", ".join(f"{name} {value}" for name, value in shown.items())
            lr, seconds = f"lr {row['lr']:.3g}", f"{row['seconds']:.1f} s"
            print(f"epoch {row['epoch']}/{self._epochs}: {what}, {lr}, {seconds}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar, also if its epoch did not end."""
        if self._bar is not None:
            self._bar.close()
