"""``python -m benchmarks.evidence --data-dir DIR``: every table of docs/evidence.md that compares methods.

A study is a list of `ltloss compare` command lines, which the documentation shows as they are. The result of every
training is kept in --out, so an interrupted study continues. When it is done, its rows go to
``results/evidence_<study>.csv`` and ``..._tuning.csv``. `make pictures` makes the page, and
the advice in ``docs/choosing.md``, from them.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import timing
from benchmarks.evidence.pages import markdown_table, renewed
from benchmarks.timing import RESULTS, write_rows
from ltloss.cli.command import main as ltloss
from ltloss.training.comparison.methods import RENAMED, method
from ltloss.training.comparison.tables import by_method, percents, summary

_MAIN = "ce,balanced,post-hoc,tau-norm,logit-adjusted,ldam-drw,arcface,long-tail,long-tail-prior"
_BEST = "logit-adjusted,ldam-drw,long-tail-prior"
_EVERY = (
    "ce,class-balanced,balanced,post-hoc,tau-norm,crt,cosine,logit-adjusted,ldam,ldam-drw,arcface,cosface,"
    "long-tail,cosine-space,long-tail-prior"
)
# Each line changes one thing of the margins with log prior. If that has no effect because a term is off, a second
# --vary turns the term on.
_SLOW_CHANGES = (
    "margin=0,0.25,0.5,0.75",
    "margin_power=0,0.25",
    "tau=0,1,1.5",
    "scale=8,16,32",
    "min_angle_weight=0,0.1,1",
    "min_angle_power=0 --vary min_angle_weight=0.1",
    "feature_norm_weight=0,0.1",
    "feature_norm=hinge --vary feature_norm_weight=0.1",
    "normalize_features=false --vary scale=1.5 --vary feature_norm_weight=0,0.1",
    "normalize_features=false --vary scale=1.5 --vary feature_norm_weight=0.1 --vary feature_norm=inverse,hinge",
    "drw_start=0.8",
)
_TUNED_CHANGES = (
    "margin=0,0.25,0.5,0.75",
    "tau=0,1,1.5",
    "scale=8,15,30",
    "min_angle_weight=0.1",
    "feature_norm_weight=0.1",
    "drw_start=0.8",
    "lr=1.6",
    "weight_decay=0.002",
    "mixup=0.2",
)


class Study(NamedTuple):
    """Command lines of `ltloss compare` on one data file, without --data, --out and --jobs."""

    data: str  # a file in --data-dir, or digits
    name: str
    about: str
    commands: tuple[str, ...]


_VARIED = "--losses long-tail-prior --seeds 1 --vary"
_OMNIGLOT = "--imbalance 15 --many-threshold 7 --few-threshold 4 --recipe small --evaluate-every 5"
_TUNED = "--lr 0.8 --scale 16"  # the search chose these for long-tail-prior
_FASHION = "--imbalance 100 --recipe small --epochs 6 --evaluate-every 3"

STUDIES = {
    "omniglot": Study(
        "omniglot28.npz",
        "Omniglot-LT",
        "1623 classes, imbalance 15.",
        (f"{_OMNIGLOT} --losses {_EVERY} --seeds 3 --tune",),
    ),
    "decay": Study(
        "omniglot28.npz",
        "Omniglot-LT",
        "the three best methods tuned again at four times the weight decay, and at the learning rate that all three "
        "chose.",
        (f"{_OMNIGLOT} --lr 0.8 --weight-decay 0.002 --losses {_BEST} --seeds 3 --tune",),
    ),
    "fashion": Study(
        "fashion_mnist.npz",
        "Fashion-MNIST-LT",
        "10 classes, imbalance 100.",
        (f"{_FASHION} --losses {_MAIN} --seeds 3 --tune",),
    ),
    "ablation": Study(
        "omniglot28.npz",
        "Omniglot-LT",
        "the long-tail margins with log prior at their tuned learning rate and scale, one thing changed at a time.",
        tuple(f"{_OMNIGLOT} {_TUNED} {_VARIED} {changed}" for changed in _TUNED_CHANGES),
    ),
    "low-rate": Study(
        "omniglot28.npz",
        "Omniglot-LT",
        "the long-tail margins with log prior at the recipe's learning rate, an eighth of the tuned one, and twice the "
        "scale.",
        tuple(f"{_OMNIGLOT} --scale 30 {_VARIED} {changed}" for changed in _SLOW_CHANGES),
    ),
}


class Advice(NamedTuple):
    """A line of the table in docs/choosing.md: a situation, what to use, and two rows of a study that support it."""

    situation: str
    use: str
    study: str
    row: tuple[str, str]  # method and variant of what to use
    against: tuple[str, str]  # method and variant that it is compared with
    called: str  # the name of the latter


_PRIOR = 'tau=1, margin_normalize="max", min_angle_weight=0'
_KEPT = "normalize_features=False, scale=1.5, feature_norm_weight="
START_HERE = (
    Advice(
        "hundreds of classes or more, a handful of samples in most; learning rate and scale tuned",
        "`LogitAdjustedLoss.from_counts(counts, D, scale=8)`",
        "omniglot",
        ("logit-adjusted", ""),
        ("ce", ""),
        "cross-entropy",
    ),
    Advice(
        "few classes, the largest a hundred times the smallest",
        "balanced softmax (`ltloss train --loss softmax --tau 1`)",
        "fashion",
        ("balanced", ""),
        ("ce", ""),
        "cross-entropy",
    ),
    Advice(
        "counts unknown",
        "`ArcFaceLoss(C, D, margin=1.0)`",
        "omniglot",
        ("arcface", ""),
        ("cosine", ""),
        "cosine softmax",
    ),
    Advice(
        "a trained softmax classifier that must stay as it is",
        "its logits less τ·log π_c, τ tuned (`ltloss compare --losses post-hoc` trains a softmax, then does this)",
        "omniglot",
        ("post-hoc", ""),
        ("ce", ""),
        "cross-entropy",
    ),
    Advice(
        "hundreds of classes or more, nothing tuned",
        f"`LongTailLoss.from_counts(counts, D, scale=30, {_PRIOR}, feature_norm_weight=0)`",
        "low-rate",
        ("long-tail-prior", "margin=0.5"),
        ("long-tail-prior", "margin=0"),
        "without the margin",
    ),
    Advice(
        "features that must keep their length",
        f"`LongTailLoss.from_counts(counts, D, normalize_features=False, scale=1.5, {_PRIOR})`, with L3",
        "low-rate",
        ("long-tail-prior", f"{_KEPT}0.1"),
        ("long-tail-prior", f"{_KEPT}0"),
        "without L3",
    ),
)


def run(name: str, study: Study, data_dir: Path, out: Path, jobs: int) -> None:
    """Run the commands of a study and write its CSV files; trainings that have a result are not repeated."""
    data = study.data if study.data == "digits" else str(data_dir / study.data)
    rows: list[dict[str, str]] = []
    trials: list[dict[str, str]] = []
    for number, command in enumerate(study.commands):
        where = ["--data", data, "--out", str(out / name), "--jobs", str(jobs)]
        print(f"{name}: {command}", flush=True)
        if ltloss(["compare", *shlex.split(command), *where]):
            raise SystemExit(f"{name}: command {number + 1} of {len(study.commands)} failed; run it again")
        rows += [{"command": str(number), **row} for row in read_rows(out / name / "results.csv")]
        if "--tune" in command:
            trials += [{"command": str(number), **row} for row in read_rows(out / name / "tuning.csv")]
    write_rows(rows, RESULTS / f"evidence_{name}.csv")
    if trials:
        write_rows(trials, RESULTS / f"evidence_{name}_tuning.csv")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, with today's names of the methods."""
    return [{**row, "method": RENAMED.get(row["method"], row["method"])} for row in timing.read_rows(path)]


def section(study: Study, rows: Sequence[Mapping[str, str]], trials: Sequence[Mapping[str, str]]) -> str:
    """The page's section on a study: its commands, their cost, its table, and the chosen values."""
    commands = "\n".join(
        f"ltloss compare --data {study.data} {command} --out runs/{Path(study.data).stem}" for command in study.commands
    )
    measured = [_parsed(row) for row in rows]
    seconds = sum(float(row["seconds"]) for row in (*rows, *trials))
    facts = rows[0]
    about = (
        f"{study.name}: {study.about} "
        f"{int(facts['pictures_train']):,} training and {int(facts['pictures_test']):,} test images. "
        f"All trainings took {seconds / 3600:.1f} core hours on {facts['device']}, torch {facts['torch']}."
    )
    parts = [about, f"```sh\n{commands}\n```", markdown_table(summary(measured))]
    chosen = [[method(row["method"]).title, row["chosen"]] for row in measured if row["seed"] == 0 and row["chosen"]]
    if chosen:
        parts.append(markdown_table([["method", "chosen on the validation split"], *chosen]))
    scales = best_at_each_scale(trials)
    if len(scales) > 1:
        about_scales = "The best trial of each scale, whatever its other values, on the validation split:"
        parts += [about_scales, markdown_table(scales)]
    pairs = with_and_without_margin(trials)
    if len(pairs) > 1:
        parts += ["The trials that differ in the margin alone, on the validation split:", markdown_table(pairs)]
    return "\n\n".join(parts)


def best_at_each_scale(trials: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """A header, and a line for each method whose scale was tuned; "none" where no trial of a scale succeeded."""
    best: dict[str, dict[float, float]] = {}
    for row in trials:
        scale = json.loads(row["values"]).get("scale")
        if scale is not None and row["balanced_accuracy"]:
            known = best.setdefault(row["method"], {})
            known[scale] = max(float(row["balanced_accuracy"]), known.get(scale, 0.0))
    scales = sorted({scale for known in best.values() for scale in known})
    return [
        ["method", *(f"scale {scale:g}" for scale in scales)],
        *([method(name).title, *(percents([known.get(scale)]) for scale in scales)] for name, known in best.items()),
    ]


def with_and_without_margin(trials: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """A header, and a line for each learning rate and scale at which the log prior was tried with margins and alone.

    Alone it is cosine softmax with log prior. τ is 1 and the margin is 0.5. A trial that diverged is "none".
    """
    places = []
    for name, key, at in (("logit-adjusted", "tau", 1.0), ("long-tail-prior", "margin", 0.5)):
        found = [(json.loads(row["values"]), row["balanced_accuracy"]) for row in trials if row["method"] == name]
        same = [(values, share) for values, share in found if values[key] == at]
        places.append({(v.get("lr", 0.0), v["scale"]): float(share) if share else None for v, share in same})
    return [
        ["lr", "scale", "log prior alone", "log prior and margin"],
        *(
            [f"{lr:g}" if lr else "as given", f"{scale:g}", *(percents([place[lr, scale]]) for place in places)]
            for lr, scale in sorted(places[0].keys() & places[1].keys())
        ),
    ]


def _parsed(row: Mapping[str, str]) -> dict[str, Any]:
    """A row of results.csv as `summary` takes it: numbers parsed, and None for an empty cell."""
    return {name: text if name == "variant" else _value(text) for name, text in row.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text or None


def with_studies(page: str, results: Path = RESULTS) -> str:
    """The page with the section of each study; a study without results is "Not measured yet."."""
    for name, study in STUDIES.items():
        path = results / f"evidence_{name}.csv"
        text = "Not measured yet."
        if path.is_file():
            tuning = path.with_name(f"evidence_{name}_tuning.csv")
            text = section(study, read_rows(path), read_rows(tuning) if tuning.is_file() else [])
        page = renewed(page, name, text)
    return page


def start_here(page: str, results: Path = RESULTS) -> str:
    """The page with its table of situations, each with the results that support it."""
    lines = [["your data", "start with", "measured (test accuracy, %)", "with these values"]]
    tables = {advice.study: results / f"evidence_{advice.study}.csv" for advice in START_HERE}
    found = {
        study: by_method([_parsed(row) for row in read_rows(path)]) if path.is_file() else {}
        for study, path in tables.items()
    }
    for advice in START_HERE:
        rows = found[advice.study]
        measured, chosen = "not measured yet", ""
        if advice.row in rows and advice.against in rows:
            both = ([row["last_accuracy"] for row in rows[key]] for key in (advice.row, advice.against))
            ours, theirs = map(percents, both)
            measured = f"{STUDIES[advice.study].name}: **{ours}**; {advice.called} {theirs}"
            chosen = rows[advice.row][0]["chosen"] or advice.row[1]
        lines.append([advice.situation, advice.use, measured, chosen])
    return renewed(page, "start here", markdown_table(lines))


def main() -> None:
    """Run studies and write their CSV files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="where fashion_mnist.npz and omniglot28.npz lie")
    parser.add_argument(
        "--study", action="append", choices=tuple(STUDIES), help="which (default: all; may be repeated)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="kept results (default: runs/evidence)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side (default: 2)")
    options = parser.parse_args()
    for name in options.study or STUDIES:
        run(name, STUDIES[name], options.data_dir, options.out, options.jobs)


if __name__ == "__main__":
    main()
