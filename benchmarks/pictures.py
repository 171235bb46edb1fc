"""``python -m benchmarks.pictures``: renew the tables and the figure of README.md and docs from the rows in results/.

It measures nothing: benchmarks and studies wrote the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import contrastive
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import classifiers, hard_negatives, scales, toponyms
from benchmarks.evidence.pages import renewed
from benchmarks.kernel_report import __main__ as kernel_report
from benchmarks.loss_gpu import goals
from benchmarks.step import picture, tables
from benchmarks.timing import RESULTS, read_rows
from ltloss._files import write_file

ROOT = Path(__file__).parents[1]


def _rows(name: str) -> list[dict[str, str]]:
    return read_rows(RESULTS / f"{name}.csv")


def _performance(page: str) -> str:
    page = tables.with_tables(page, _rows("step-cpu"))
    return renewed(page, "contrastive", contrastive.table(_rows("contrastive-cpu")))


def _embeddings(page: str) -> str:
    page = scales.rendered(page, read_rows(scales.TABLE))
    page = classifiers.rendered(page, read_rows(classifiers.TABLE), read_rows(classifiers.ESTIMATOR))
    return renewed(page, "toponyms", toponyms.table(read_rows(toponyms.TABLE)))


# File -> function from its former content to its new content.
MADE: Mapping[str, Callable[[str], str]] = {
    "README.md": lambda page: renewed(page, "whole step", tables.headline_table(_rows("step-cpu"))),
    "docs/step.svg": lambda _: picture.draw(_rows("step-cpu")),
    "docs/performance.md": _performance,
    "docs/kernels.md": lambda page: kernel_report.with_table(page, _rows("kernel_report")),
    "docs/performance-kernels.md": lambda page: renewed(page, "goals", goals.table()),
    "docs/choosing.md": evidence.start_here,
    "docs/evidence.md": evidence.with_studies,
    "docs/evidence-embeddings.md": _embeddings,
    "docs/evidence-more.md": lambda page: hard_negatives.rendered(page, read_rows(hard_negatives.TABLE)),
}


def main() -> None:
    """Write the files whose content changes, and print which."""
    for name, made in MADE.items():
        before = (ROOT / name).read_text(encoding="utf-8")
        after = made(before)
        if after != before:
            write_file(ROOT / name, after.encode())
        print("unchanged" if after == before else "renewed  ", name)


if __name__ == "__main__":
    main()
