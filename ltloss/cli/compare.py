"""``ltloss compare``: its options, and the call that they make."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from ltloss.cli.values import named_values, names, path, picked, settings_given
from ltloss.errors import UserError

_DESCRIPTION = (
    "Train several methods with several seeds into a folder. Run the same command again to continue. With a recipe, a "
    "CPU with bfloat16 instructions trains in bfloat16, unless --no-amp."
)

_LIST = "show the methods and what is tuned of each, and stop; needs no other option"
# Defaults that are others than those of ``train``, where --seed and the device decide.
DEFAULTS = {
    "data_seed": "0",
    "amp": "on a GPU, and with --recipe on a CPU with bfloat16 instructions",
}


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add --recipe, which ``train`` and ``compare`` have."""
    from ltloss.training.comparison.recipes import RECIPES

    about = f"start from a recipe: {', '.join(RECIPES)}; every setting can be overridden"
    parser.add_argument("--recipe", metavar="NAME", help=about)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``compare`` besides the settings of a training."""
    from ltloss.training.comparison.methods import METHODS

    parser.description = _DESCRIPTION
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="the folder of results to write")
    listed = f"methods, separated by commas, or all: {', '.join(METHODS)}"
    parser.add_argument("--losses", type=names, required=True, metavar="NAMES", help=listed)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each method (default: 3)")
    add_recipe(parser)
    varied = "a setting or an option of the losses to vary; may be repeated"
    parser.add_argument("--vary", action="append", type=named_values, default=[], metavar="NAME=V,V", help=varied)
    parser.add_argument("--tune", action="store_true", help="choose each method's values on held-out images first")
    parser.add_argument("--tune-seeds", type=int, default=1, metavar="N", help="trainings of each trial (default: 1)")
    held = "images of each class to tune on (default: a fifth of the smallest class)"
    parser.add_argument("--validation-per-class", type=int, metavar="N", help=held)
    parser.add_argument("--jobs", type=int, metavar="N", help="trainings side by side (default: the cores; 1 on a GPU)")
    parser.add_argument("--list", action=_ListMethods, help=_LIST)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")


class _ListMethods(argparse.Action):
    """Print the methods and stop, as --help does, whatever else is missing."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from ltloss.training.comparison.methods import listing

        print(listing())
        parser.exit()


def run_compare(options: argparse.Namespace) -> int:
    """Run the comparison and print its table."""
    import matplotlib.figure  # noqa: F401  needed after hours of training; if missing, fail now

    from ltloss.training.comparison.grid import compare
    from ltloss.training.comparison.methods import METHODS
    from ltloss.training.comparison.workers import usable_cores
    from ltloss.training.model.classifier import choose_device

    given, vary = settings_given(options), dict(options.vary)
    if len(vary) < len(options.vary):
        times = Counter(name for name, _ in options.vary)
        raise UserError(f"--vary {max(times, key=times.__getitem__)} is given twice; give all its values in one --vary")
    jobs = options.jobs
    if jobs is None:
        jobs = usable_cores() if choose_device(given.get("device")).type == "cpu" else 1
    found = compare(
        options.out,
        given,
        list(METHODS) if options.losses == ["all"] else options.losses,
        vary=vary,
        jobs=jobs,
        **picked(options, "recipe", "seeds", "tune", "tune_seeds", "validation_per_class", "quiet"),
    )
    if not options.quiet:
        print(found.to_text())
        print(f"\nopen {found.page}; the rows are in {found.out / 'results.csv'}")
    return 0
