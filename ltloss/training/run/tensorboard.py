"""The scalars of metrics.csv for TensorBoard, in RUN/tensorboard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ltloss.errors import UserError


def check_tensorboard() -> None:
    """Raise UserError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tensorboard needs TensorBoard, which cannot be imported ({error}); run: pip install "
            "'ltloss[tensorboard]', or leave it out"
        ) from error


class Scalars:
    """Writes the rows of metrics.csv: each value under the name of its column, with the epoch as step.

    It begins with ``history``, which replaces what an earlier process wrote, so a resumed run has every epoch once.
    """

    def __init__(self, run: Path, history: Iterable[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        for former in folder.glob("events.out.tfevents.*"):
            former.unlink()
        self._writer: Any = SummaryWriter(str(folder))
        for row in history:
            self.end(row)

    def end(self, row: Mapping[str, Any]) -> None:
        """Write the values of an epoch that were measured."""
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
