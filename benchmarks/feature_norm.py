"""``python -m benchmarks.feature_norm``: which g(‖x‖) helps the long-tail loss? Measured on long-tailed digits.

Trains ``LongTailLoss`` with every g and with none, on scikit-learn's digits made long-tailed (imbalance 50), with the
feature normalised and with its length kept, and writes the last epoch's test accuracies to
``results/feature_norm.csv``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, get_args

from benchmarks.timing import RESULTS, stamp, write_rows
from ltloss.regularizers import FeatureNormKind
from ltloss.training.run.trainer import train

EPOCHS = 60
WEIGHTS = (0.01, 0.1)
# A normalised feature meets the scale 16 of the demo; one that keeps its length (about 8 after batch normalisation of
# 64 numbers) meets 2, so that both start with the same logits.
SCALES = {True: 16.0, False: 2.0}


def accuracies(options: dict[str, Any], seed: int) -> dict[str, float]:
    """Test accuracy overall and of the groups, in percent, after the last epoch of one training."""
    settings = {"data": "digits", "imbalance": 50.0, "loss": "long-tail", "epochs": EPOCHS, "device": "cpu"}
    settings |= {"many_above": 50, "few_below": 10, "seed": seed, "loss_options": options}
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(Path(folder) / "run", settings, quiet=True).evaluation.metrics
    groups = {"overall": metrics.accuracy, "many": metrics.many, "medium": metrics.medium, "few": metrics.few}
    return {name: 100 * value for name, value in groups.items() if value is not None}


def main() -> None:
    """Run the grid, print a line per setting and write the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "feature_norm.csv")
    arguments = parser.parse_args()
    kinds = [("none", 0.0), *((kind, weight) for weight in WEIGHTS for kind in get_args(FeatureNormKind))]
    rows = []
    for normalize, scale in SCALES.items():
        for kind, weight in kinds:
            options: dict[str, Any] = {"normalize_features": normalize, "scale": scale, "feature_norm_weight": weight}
            if weight:
                options["feature_norm"] = kind
            runs = [accuracies(options, seed) for seed in range(arguments.seeds)]
            row = {"normalize_features": normalize, "scale": scale, "g": kind, "weight": weight, "seeds": len(runs)}
            for group in runs[0]:
                values = [run[group] for run in runs]
                row[group] = f"{statistics.mean(values):.2f}"
                row[f"{group}_deviation"] = f"{statistics.stdev(values) if len(values) > 1 else 0.0:.2f}"
            print(row, flush=True)
            rows.append({**stamp(), "epochs": EPOCHS, **row})
    write_rows(rows, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
