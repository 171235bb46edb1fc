"""The ``ltloss`` command: train, compare, evaluate, predict, embed, export, report, tune, plan, doctor.

Third-party packages are imported inside ``reported``. A missing package, an invalid environment variable and an early
Ctrl-C are thus reported like any other mistake: one line on stderr and exit code 2, or 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from re import findall, sub
from types import MappingProxyType
from typing import Any, NoReturn, TextIO

import ltloss
from ltloss.cli.compare import DEFAULTS, add_compare, add_recipe, run_compare
from ltloss.cli.embed import EMBED, add_embed, run_embed
from ltloss.cli.export import EXPORT, add_export, run_export
from ltloss.cli.predict import PREDICT, add_predict, run_predict
from ltloss.cli.values import (
    add_renamed,
    add_run,
    count,
    named_value,
    need,
    path,
    picked,
    setting_help,
    settings_given,
)
from ltloss.errors import LtlossError, UserError, explain_os_error, in_one_line, printable

__all__ = ["build_parser", "main", "reported"]

_LESS_MEMORY = {
    "train": "use a smaller --batch-size, --embedding-size or --image-size",
    "compare": "use fewer --jobs, or a smaller --batch-size, --embedding-size or --image-size",
    "predict": "use a smaller --batch-size",
    "embed": "use a smaller --batch-size",
    "tune": "use smaller --samples, --classes or --embedding-size",
}
# On a CPU torch raises a plain RuntimeError, which can be recognised by these words only.
_NO_MEMORY = ("allocate memory", "not enough memory", "storage size calculation overflow")
# Of other settings by their type.
_METAVARS = {"loss": "NAME", "image_root": "FOLDER", "backbone": "NAME", "init_from": "RUN|FILE"}
_EVALUATE = (
    "Measure the checkpoint of a run on labelled images or embeddings, and print accuracy, by class and by the number "
    "of training samples, calibration and confusions. Nothing is written."
)
_PIPE_CLOSED = 141  # what a shell shows for a program that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    options = argparse.Namespace()

    def command() -> int:
        build_parser().parse_args(arguments, options)
        code: int = options.command(options)
        return code

    return reported(command, options)


def reported(command: Callable[[], int | None], options: argparse.Namespace | None = None) -> int:
    """Run a command and return its exit code: its own (None counts as 0), 2 after a mistake, 130 after Ctrl-C.

    A mistake and Ctrl-C are reported in one line. ``options``, which ``command`` may fill, determine its advice.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # replaced by an object without reconfigure, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = command() or 0
        sys.stdout.flush()  # here, where a failure can still be reported
        return code
    except KeyboardInterrupt:
        print(f"ltloss: interrupted{_what_is_kept(options)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard(sys.stdout)
        return _PIPE_CLOSED
    except Exception as error:
        line = _explain(error, getattr(options, "name", ""))
        if line is None:
            raise
        if isinstance(error, OSError):
            _discard(sys.stdout)
        print(f"ltloss: error: {line}", file=sys.stderr)
        return 2


def _explain(error: Exception, command: str) -> str | None:
    """Describe in one line an error that the user can fix. None for a defect of ltloss, which keeps its traceback."""
    text = printable(in_one_line(error))
    if isinstance(error, LtlossError):
        return text
    if isinstance(error, ImportError):
        missing = (error.name or "a package").partition(".")[0]
        if missing == "ltloss_kernels" or missing == "triton":
            return f"{missing}, which the backend 'triton' needs, cannot be imported ({text}); unset LTLOSS_BACKEND"
        if "pip install" in text:
            return text
        return f"{missing} cannot be imported ({text}); run: pip install 'ltloss[train]'"
    if isinstance(error, OSError):
        return explain_os_error(error, "continue with --resume" if command == "train" else "run the command again")
    if _out_of_memory(error):
        return f"out of memory; {_LESS_MEMORY.get(command, 'free some memory, or use another --device')}"
    return None


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, OverflowError)):  # OverflowError: a size that no memory can have
        return True
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and any(words in str(error).lower() for words in _NO_MEMORY)


def _what_is_kept(options: argparse.Namespace | None) -> str:
    if getattr(options, "name", "") == "compare":
        return ", finished trainings are kept; continue with the same command"
    if getattr(options, "name", "") != "train":
        return ""
    out: Path = options.out  # type: ignore[union-attr]
    with suppress(OSError, ValueError):
        if (out / "config.json").is_file():
            return f", finished epochs are kept; continue with `ltloss train --resume --out {out}`"
    return " before anything was written"


def _discard(stream: TextIO) -> None:
    """Redirect a stream that cannot be written to the null device, so that the flush at exit does not fail."""
    with suppress(OSError, ValueError):
        stream.flush()
        return
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line, and whose options cannot be abbreviated."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{**given, "allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is unknown here, where the options of a command are, and not in the parser of all commands."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            close = get_close_matches(unknown[0].partition("=")[0], findall("--[a-z-]+", self.format_usage()), n=1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{f'; did you mean {close[0]}?' if close else ''}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands and their options."""
    from ltloss.training.run.settings import FUSED_SETTINGS, OF_A_RUN

    parser = _Parser(prog="ltloss", description="Train and use image classifiers on long-tailed data.")
    parser.add_argument("--version", action="version", version=f"ltloss {ltloss.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], help: str, description: str = "") -> Any:
        added = commands.add_parser(name, help=help, description=description or None)
        added.set_defaults(command=command, name=name)
        return added

    _add_train(add("train", _train, "train a classifier", "Train a classifier into a run folder."))
    compare = add("compare", run_compare, "compare methods over seeds, tuned alike")
    add_compare(compare)
    _add_settings(compare, without=("loss", "seed", "parallel", *FUSED_SETTINGS, *OF_A_RUN), defaults=DEFAULTS)
    _add_evaluate(add("evaluate", _evaluate, "measure a run on labelled samples", _EVALUATE))
    add_predict(add("predict", run_predict, "classify images (with a gallery) or embeddings", PREDICT))
    add_embed(add("embed", run_embed, "write the features of images into a file to train on", EMBED))
    add_export(add("export", run_export, "write a run as one file for serving: ONNX or torch.export", EXPORT))
    about = "Write RUN/report.html again, from the run's metrics, its checkpoint and its test samples."
    _add_report(add("report", _report, "write RUN/report.html again", about))
    about = "Time the kernels' tiles on this GPU and keep the fastest in the user's cache for later runs."
    _add_tune(add("tune", _tune, "find the fastest kernel tiles for this GPU", about))
    about = (
        "Estimate memory, traffic and time of a training step with the classes spread over devices. Nothing is run on "
        "a device. Exit code 1 if it does not fit."
    )
    _add_plan(add("plan", _plan, "estimate memory, traffic and time of a head spread over devices", about))
    about = (
        "Show versions, devices and which implementation computes, and check the losses on each device against a "
        "float64 reference. Exit code 2 if one fails."
    )
    add("doctor", _doctor, "show what this machine offers ltloss", about)
    return parser


def _add_train(train: argparse.ArgumentParser) -> None:
    train.add_argument("--out", type=path, required=True, metavar="RUN", help="the run folder to write")
    train.add_argument("--config", type=path, metavar="FILE", help="settings from TOML or JSON; the command line wins")
    train.add_argument("--resume", action="store_true", help="continue the run in --out (with its own settings)")
    train.add_argument("--quiet", action="store_true", help="no progress, no table")
    add_recipe(train)
    _add_settings(train)


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    add_run(evaluate)
    whole = "as for train (default: the run's own); other data without train/test parts is measured whole"
    evaluate.add_argument("--data", metavar="DATA", help=whole)
    begin = "where the paths of a list of images begin (default: the run's own for its data, else the list's folder)"
    evaluate.add_argument("--image-root", metavar="FOLDER", help=begin)
    splits = "test and train: the images the run used; all: every image (default: test)"
    evaluate.add_argument("--split", choices=("test", "train", "all"), default="test", help=splits)
    evaluate.add_argument("--json", action="store_true", help="for machine reading")
    add_renamed(
        evaluate, "--many-threshold", "--many-above", type=int, metavar="N", help=setting_help("many_threshold")
    )
    add_renamed(evaluate, "--few-threshold", "--few-below", type=int, metavar="N", help=setting_help("few_threshold"))
    evaluate.add_argument("--device", help=setting_help("device"))


def _add_report(report: argparse.ArgumentParser) -> None:
    add_run(report)
    about = "how the map of features is made; auto: by UMAP where umap-learn is installed (default: auto)"
    report.add_argument("--map", choices=("auto", "umap", "pca"), default="auto", help=about)


def _add_tune(tune: argparse.ArgumentParser) -> None:
    tune.add_argument("--samples", type=int, default=8192, metavar="N", help="N, samples a step (default: 8192)")
    tune.add_argument("--classes", type=int, default=131072, metavar="N", help="C (default: 131072)")
    add_renamed(tune, "--embedding-size", "--width", type=int, default=512, metavar="N", help="D (default: 512)")
    dtypes = ("bfloat16", "float16", "float32")
    tune.add_argument("--dtype", choices=dtypes, default="bfloat16", help="(default: bfloat16)")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    from ltloss.tools.plan import OPTIMIZERS, WIDTHS
    from ltloss.training.model.registry import LOSSES

    plan.add_argument("--classes", type=count, required=True, metavar="N", help="C, such as 100M or 250k")
    add_renamed(plan, "--embedding-size", "--dim", type=count, required=True, metavar="N", help="D")
    plan.add_argument("--batch", type=count, required=True, metavar="N", help="samples a step, of all devices together")
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="devices")
    groups = "groups of devices, each with all classes, that share the batch (default: 1)"
    add_renamed(plan, "--data-groups", "--data", dest="data", type=int, default=1, metavar="N", help=groups)
    devices = "h200, or FILE.json that benchmarks.scaling wrote (default: h200)"
    plan.add_argument("--device", default="h200", help=devices)
    losses = tuple(name for name in LOSSES if name != "softmax")
    loss = f"the loss: {', '.join(losses)} (default: long-tail)"
    plan.add_argument("--loss", choices=losses, default="long-tail", metavar="NAME", help=loss)
    dtype = "dtype of the features (default: bfloat16)"
    plan.add_argument("--dtype", choices=tuple(WIDTHS), default="bfloat16", help=dtype)
    optimizers = "sgd (with momentum), adamw or, with --fused-update, row-wise adagrad (default: sgd)"
    plan.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help=optimizers)
    fused = "update the prototypes inside the backward, as ltloss.optim does: their gradient is never in memory"
    plan.add_argument("--fused-update", action="store_true", help=fused)
    kept = "dtype of the {}; with --fused-update also {} (default: float32)"
    narrow = kept.format("prototypes", "bfloat16 or float8_e4m3fn")
    plan.add_argument("--prototype-dtype", default="float32", help=narrow)
    plan.add_argument("--state-dtype", default="float32", help=kept.format("optimizer's state", "bfloat16"))
    exponentials = (
        "keep the exponentials of the forward for the backward, as use_workspace(keep_exponentials=True) does"
    )
    plan.add_argument("--keep-exponentials", action="store_true", help=exponentials)
    fraction = "fraction of the classes that a step draws (default: 1)"
    plan.add_argument("--sample-rate", type=float, default=1.0, metavar="X", help=fraction)
    plan.add_argument("--json", action="store_true", help="for machine reading")


def _add_settings(
    parser: argparse.ArgumentParser, without: Sequence[str] = (), defaults: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Add one option per setting. The namespace holds only the options given, so that a file can set the others.

    ``defaults``: what --help says of defaults that are the command's own.
    """
    from ltloss.training.run.settings import SETTINGS, setting_type
    from ltloss.training.stored_keys import FORMER_SETTINGS

    former = {now: name for name, now in FORMER_SETTINGS.items()}
    group = parser.add_argument_group("settings")
    for name, item in SETTINGS.items():
        if name in without:
            continue
        flag, kind = "--" + name.replace("_", "-"), setting_type(name)
        about = item.metadata["help"].replace("%", "%%")
        if name in defaults:
            about = sub(r"\(default: .*\)$", f"(default: {defaults[name]})", about)
        about += "" if item.default is None or kind is dict or name == "data" else f" (default: {item.default})"
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": about}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
            continue
        if kind is dict:
            group.add_argument("--loss-option", action="append", type=named_value, metavar="NAME=VALUE", **common)
            continue
        common |= {"type": kind, "choices": item.metadata["choices"]}
        metavar = _METAVARS.get(name, "N" if kind is int else "X" if kind is float else None)
        if name in former:
            add_renamed(group, flag, "--" + former[name].replace("_", "-"), metavar=metavar, **common)
        else:
            group.add_argument(flag, metavar=metavar, **common)


def _train(options: argparse.Namespace) -> int:
    from ltloss.training.run.run_config import read_settings_file

    need("PIL", "safetensors", "tqdm", "matplotlib.figure")
    given = read_settings_file(options.config) if options.config else {}
    on_line = settings_given(options)
    if options.recipe:
        from ltloss.training.comparison.recipes import recipe

        given = {**recipe(options.recipe, {**given, **on_line}.get("optimizer", "sgd")), **given}
    if "loss_options" in on_line:
        on_line["loss_options"] = {**given.get("loss_options", {}), **on_line["loss_options"]}
    from ltloss.training.pages.run_report import write_report
    from ltloss.training.run.trainer import train

    result = train(options.out, {**given, **on_line}, resume=options.resume, quiet=options.quiet)
    if not result.ranks.first:
        return 0
    report = write_report(options.out, device=result.evaluation.config.settings.device)
    if not options.quiet:
        print(result.evaluation.to_text())
        use = "--data FEATURES" if result.evaluation.config.of_embeddings else "--images FOLDER"
        print(f"\nopen {report}, or use the model: ltloss predict {options.out} {use} --out RESULTS")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from ltloss.training.measure.evaluate import evaluate_run

    chosen = picked(options, "image_root", "split", "device", "many_threshold", "few_threshold")
    evaluation = evaluate_run(options.run, options.data, **chosen)
    print(evaluation.to_json() if options.json else evaluation.to_text())
    return 0


def _report(options: argparse.Namespace) -> int:
    from ltloss.training.pages.run_report import write_report

    print(f"open {write_report(options.run, map_method=options.map)}")
    return 0


def _tune(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise UserError("tune needs a CUDA device, and this machine has none; kernels use the built-in tiles untuned")
    shape = (options.samples, options.classes, options.embedding_size)
    if min(shape) < 1:
        raise UserError(f"--samples, --classes and --embedding-size must be at least 1; got {shape}")
    from ltloss.tools.tune_tiles import tune

    return tune(shape, getattr(torch, options.dtype))


def _plan(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from ltloss.tools.plan import HeadConfig, make_plan, read_device

    try:
        device = read_device(options.device)
        problem = HeadConfig(**picked(options, *(item.name for item in fields(HeadConfig))))
    except (ValueError, OverflowError) as error:
        raise UserError(f"{error}; correct the option") from None
    found = make_plan(problem, device)
    print(found.to_json() if options.json else found.to_text())
    return 0 if found.fits else 1


def _doctor(options: argparse.Namespace) -> int:
    from ltloss.tools.doctor import main as doctor

    return doctor()
