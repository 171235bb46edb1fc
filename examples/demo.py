"""``make demo``: five losses on long-tailed digits, a table, and a gallery of the test images as the model sorts them.

Everything lands under ./demo/; what an earlier demo wrote there is replaced, anything else is left alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ltloss._files import write_file
from ltloss.errors import UserError
from ltloss.training.data.sources import load_data
from ltloss.training.measure.class_groups import Thresholds
from ltloss.training.measure.metrics import Metrics
from ltloss.training.pages.run_report import write_report
from ltloss.training.predict.predict import predict_folder
from ltloss.training.run.progress import progress_bar
from ltloss.training.run.trainer import train

# The digits have at most 146 training images a class, so the usual limits of 100 and 20 would leave few classes many.
GROUPS = Thresholds(many_threshold=50, few_threshold=10)
SCALE = 16.0
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("plain softmax", {}),
    "cosine": ("cosine softmax, same scale", {"scale": SCALE}),
    "long-tail": ("long-tail loss (source A)", {"scale": SCALE}),
    "long-tail-prior": ("long-tail margins, log prior", {"scale": SCALE}),
    "cosine-space": ("cosine-space loss (source B)", {"scale": SCALE}),
}
SHOWN = "long-tail"
COMMON = {"data": "digits", "imbalance": 50.0, "device": "cpu", **asdict(GROUPS)}
_WRITTEN = ("runs", "images", "classified", "table.txt")
_MANIFEST = "demo.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code, with mistakes reported as by the ``ltloss`` command."""
    from ltloss.cli.command import reported

    # So small a network keeps one core busy: more threads would wait for each other, for long on a busy machine.
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python examples/demo.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.add_argument("--fast", action="store_true", help="two epochs and two seeds, to see that everything works")
    options = parser.parse_args(arguments)
    return reported(lambda: run_demo(options.out, fast=options.fast))


def run_demo(out: Path, *, fast: bool = False) -> None:
    """Train, print the table, classify the test images, and say what to open."""
    start = time.perf_counter()
    _clear(out)
    seeds, epochs = (range(2), 2) if fast else (range(3), 40)
    found: dict[str, list[tuple[Metrics, float]]] = {name: [] for name in LOSSES}
    with progress_bar(len(LOSSES) * len(seeds), what="run") as progress:
        for seed in seeds:
            for name, (title, options) in LOSSES.items():
                progress.set_description(f"{title}, seed {seed}")
                began = time.perf_counter()
                given = {**COMMON, "loss": name, "epochs": epochs, "seed": seed, **options}
                result = train(_run_folder(out, name, seed), given, quiet=True)
                found[name].append((result.evaluation.metrics, time.perf_counter() - began))
                progress.update()
    table = _table(found, epochs)
    write_file(out / "table.txt", (table + "\n").encode())
    print(table)
    shown = _run_folder(out, SHOWN, 0)
    report = write_report(shown)
    _write_images(out / "images")
    print(f"\nClassifying the test images with {shown} ...")
    summary = predict_folder(shown, out / "images", out / "classified")
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Open these files in a browser:")
    print(f"  {summary.gallery}   every test image as the model sorted it")
    print(f"  {report}   how that model was trained")


def _run_folder(out: Path, loss: str, seed: int) -> Path:
    return out / "runs" / f"{loss}-seed{seed}"


def _clear(out: Path) -> None:
    """Remove what an earlier demo wrote; UserError where something else stands in its place."""
    manifest = out / _MANIFEST
    present = [name for name in _WRITTEN if (out / name).exists()]
    if present and not manifest.is_file():
        raise UserError(f"{out / present[0]} was not written by an earlier demo; move it away, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    # Written first, so that a demo which is interrupted can be run again.
    write_file(manifest, (json.dumps({"written": _WRITTEN}) + "\n").encode())
    for name in present:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_images(folder: Path) -> None:
    source = load_data("digits", split="test", seed=0)
    for index, label in enumerate(source.labels):
        path = folder / source.class_names[label] / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(index).save(path)


def _table(found: dict[str, list[tuple[Metrics, float]]], epochs: int) -> str:
    """Test accuracy in percent, mean ± standard deviation over the seeds, after the last epoch."""
    groups = GROUPS.describe()
    runs = len(next(iter(found.values())))
    lines = [
        f"Digits, imbalance {COMMON['imbalance']:g}: test accuracy in % after the last of {epochs} epochs, "
        f"mean ± standard deviation over {runs} seeds (scale {SCALE:g} for all but plain softmax)",
        "",
        f"{'loss':<30}{'overall':>14}" + "".join(f"{words:>16}" for words in groups.values()) + f"{'seconds':>10}",
    ]
    for name, results in found.items():
        cells = [f"{LOSSES[name][0]:<30}", f"{_spread([m.accuracy for m, _ in results]):>14}"]
        cells += [f"{_spread([getattr(m, group) for m, _ in results]):>16}" for group in groups]
        lines.append("".join(cells) + f"{sum(seconds for _, seconds in results):>10.1f}")
    return "\n".join(lines)


def _spread(fractions: list[float | None]) -> str:
    values = [100 * fraction for fraction in fractions if fraction is not None]
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


if __name__ == "__main__":
    sys.exit(main())
