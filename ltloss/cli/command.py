"""The ``ltloss`` command: train, compare, evaluate, predict, report, tune, plan, doctor.

Everything but the standard library is imported inside ``reported``, so that a missing package, a wrong environment
variable and an early Ctrl-C are reported like any other mistake: one line on stderr and exit code 2, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ltloss.cli.compare import add_compare, add_recipe
from ltloss.cli.values import count, named_value, path
from ltloss.errors import LtlossError, UserError, explain_os_error

_LESS_MEMORY = {
    "train": "use a smaller --batch-size, --embedding-size or --image-size",
    "compare": "use fewer --jobs, or a smaller --batch-size, --embedding-size or --image-size",
    "predict": "use a smaller --batch-size",
    "tune": "use smaller --samples, --classes or --width",
}
# On a CPU torch raises a plain RuntimeError, which only these words tell from others.
_NO_MEMORY = ("allocate memory", "not enough memory", "storage size calculation overflow")
_PIPE_CLOSED = 141  # what a shell shows for a program that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    options = argparse.Namespace()

    def command() -> int:
        _parser().parse_args(arguments, options)
        code: int = options.command(options)
        return code

    return reported(command, options)


def reported(command: Callable[[], int | None], options: argparse.Namespace | None = None) -> int:
    """The exit code of a command: its own (None counts as 0), 2 after a mistake, 130 after Ctrl-C, each in one line.

    ``options``, which ``command`` may fill, are those of the command line: they decide what the line advises.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # not a text file of its own, or closed
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
        return _fail(line)


def _explain(error: Exception, command: str) -> str | None:
    """One line for what the user can put right; None for a defect of ltloss, whose traceback is wanted."""
    text = " ".join(str(error).split())
    if isinstance(error, LtlossError):
        return text
    if isinstance(error, ImportError):
        missing = (error.name or "a package").partition(".")[0]
        if missing == "ltloss_kernels" or missing == "triton":
            return f"{missing}, which the backend 'triton' needs, cannot be imported ({text}); unset LTLOSS_BACKEND"
        return f"{missing} cannot be imported ({text}); run: pip install 'ltloss[train]'"
    if isinstance(error, OSError):
        return explain_os_error(error, "continue with --resume" if command == "train" else "run the command again")
    if _out_of_memory(error):
        return f"out of memory; {_LESS_MEMORY.get(command, 'free some memory, or use another --device')}"
    return None


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, OverflowError)):  # the latter: a size beyond every memory
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
    """Let the interpreter's last flush of a stream that cannot be written succeed."""
    with suppress(OSError, ValueError):
        stream.flush()
        return
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _fail(reason: object) -> int:
    print(f"ltloss: error: {reason}", file=sys.stderr)
    return 2


def _need(*modules: str) -> None:
    """ImportError now, rather than after hours of work."""
    for module in modules:
        importlib.import_module(module)


class _Parser(argparse.ArgumentParser):
    """Argparse, with its errors as ours: one line; an option has one spelling, its whole name."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{**given, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ltloss", description="Train and use image classifiers on long-tailed data.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_training(commands)
    _add_using(commands)
    _add_device_commands(commands)
    return parser


def _add_training(commands: Any) -> None:
    train = commands.add_parser("train", help="train a classifier", description="Train a classifier into a run folder.")
    train.set_defaults(command=_train, name="train")
    train.add_argument("--out", type=path, required=True, metavar="RUN", help="the run folder to write")
    train.add_argument("--config", type=path, metavar="FILE", help="settings from TOML or JSON; the command line wins")
    train.add_argument("--resume", action="store_true", help="continue the run in --out (with its own settings)")
    train.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    add_recipe(train)
    _add_settings(train)

    compare = commands.add_parser("compare", help="compare methods over seeds, tuned alike")
    add_compare(compare)
    _add_settings(compare, without=("loss", "seed", "parallel"))


def _add_using(commands: Any) -> None:
    from ltloss.training.run.settings import SETTINGS

    evaluate = commands.add_parser("evaluate", help="measure a run on labelled images")
    evaluate.set_defaults(command=_evaluate, name="evaluate")
    evaluate.add_argument("run", type=path, metavar="RUN")
    whole = "as for train (default: the run's own); other data without train/test parts is measured whole"
    evaluate.add_argument("--data", metavar="DATA", help=whole)
    splits = "test and train: the images the run used; all: every image (default: test)"
    evaluate.add_argument("--split", choices=("test", "train", "all"), default="test", help=splits)
    evaluate.add_argument("--json", action="store_true", help="for machine reading")
    evaluate.add_argument("--many-above", type=int, metavar="N", help=SETTINGS["many_above"].metadata["help"])
    evaluate.add_argument("--few-below", type=int, metavar="N", help=SETTINGS["few_below"].metadata["help"])
    evaluate.add_argument("--device", help=SETTINGS["device"].metadata["help"])

    predict = commands.add_parser("predict", help="classify a folder of images and make a gallery of them")
    predict.set_defaults(command=_predict, name="predict")
    predict.add_argument("run", type=path, metavar="RUN")
    predict.add_argument(
        "--images", type=path, required=True, metavar="FOLDER", help="images to classify, searched recursively"
    )
    predict.add_argument("--out", type=path, required=True, help="folder for the results")
    predict.add_argument("--sort-into", type=path, metavar="FOLDER", help="also copy each image to FOLDER/<class>/")
    predict.add_argument(
        "--overwrite", action="store_true", help="replace the results of an earlier prediction in --out"
    )
    predict.add_argument("--top", type=int, default=2, metavar="K", help="classes an image in the table (default: 2)")
    predict.add_argument("--batch-size", type=int, default=256, metavar="N", help="(default: 256)")
    predict.add_argument("--device", help=SETTINGS["device"].metadata["help"])

    report = commands.add_parser("report", help="write RUN/report.html again")
    report.set_defaults(command=_report, name="report")
    report.add_argument("run", type=path, metavar="RUN")


def _add_device_commands(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="find the fastest kernel tiles for this GPU",
        description="Time the kernels' tiles on this GPU and keep the fastest in the user's cache for later runs.",
    )
    tune.set_defaults(command=_tune, name="tune")
    shape = (
        ("--samples", 8192, "N, samples a step"),
        ("--classes", 131_072, "C"),
        ("--width", 512, "D, the features'"),
    )
    for flag, default, about in shape:
        tune.add_argument(flag, type=int, default=default, metavar="N", help=f"{about} (default: {default})")
    tune.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(default: bfloat16)"
    )

    plan = commands.add_parser(
        "plan",
        help="memory, traffic and time of a head spread over devices",
        description="What a training step of a head takes when its classes are spread over devices. Computes only. "
        "Exit code 1 where it does not fit.",
    )
    plan.set_defaults(command=_plan, name="plan")
    plan.add_argument("--classes", type=count, required=True, metavar="N", help="C, such as 100M or 250k")
    plan.add_argument("--dim", type=count, required=True, metavar="N", help="D, the features'")
    plan.add_argument("--batch", type=count, required=True, metavar="N", help="samples a step, of all devices together")
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="devices")
    plan.add_argument("--data", type=int, default=1, metavar="N", help="groups that share the batch (default: 1)")
    plan.add_argument(
        "--device", default="h200", help="h200, or FILE.json that benchmarks.scaling wrote (default: h200)"
    )
    plan.add_argument("--loss", default="long-tail", help="the loss, any but softmax (default: long-tail)")
    plan.add_argument("--dtype", default="bfloat16", help="of the features (default: bfloat16)")
    plan.add_argument("--optimizer", default="sgd", help="sgd (with momentum) or adamw (default: sgd)")
    plan.add_argument(
        "--sample-rate", type=float, default=1.0, metavar="X", help="fraction of the classes (default: 1)"
    )
    plan.add_argument("--json", action="store_true", help="for machine reading")

    doctor = commands.add_parser("doctor", help="show what this machine offers ltloss")
    doctor.set_defaults(command=_doctor, name="doctor")


def _add_settings(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """One option per setting; only those given end up in the namespace, so that a file can hold the others."""
    from ltloss.training.run.settings import SETTINGS, setting_type

    group = parser.add_argument_group("settings")
    for name, item in SETTINGS.items():
        if name in without:
            continue
        flag, kind = "--" + name.replace("_", "-"), setting_type(name)
        about = item.metadata["help"].replace("%", "%%")
        about += "" if item.default is None or kind is dict or name == "data" else f" (default: {item.default})"
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": about}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif kind is dict:
            group.add_argument("--loss-option", action="append", type=named_value, metavar="NAME=VALUE", **common)
        else:
            metavar = "N" if kind is int else "X" if kind is float else None
            group.add_argument(flag, type=kind, choices=item.metadata["choices"], metavar=metavar, **common)


def _train(options: argparse.Namespace) -> int:
    from ltloss.training.run.settings import SETTINGS, read_settings_file

    _need("PIL", "safetensors", "tqdm", "matplotlib.figure")
    given = read_settings_file(options.config) if options.config else {}
    if options.recipe:
        from ltloss.training.comparison.recipes import recipe

        given = {**recipe(options.recipe), **given}
    on_line = {name: value for name, value in vars(options).items() if name in SETTINGS}
    if "loss_options" in on_line:
        on_line["loss_options"] = {**given.get("loss_options", {}), **dict(on_line["loss_options"])}
    from ltloss.training.pages.run_report import write_report
    from ltloss.training.run.trainer import train

    result = train(options.out, {**given, **on_line}, resume=options.resume, quiet=options.quiet)
    if not result.ranks.first:
        return 0
    report = write_report(options.out)
    if not options.quiet:
        print(result.evaluation.to_text())
        print(f"\nopen {report}, or use the model: ltloss predict {options.out} --images FOLDER --out RESULTS")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from ltloss.training.measure.evaluate import evaluate_run

    evaluation = evaluate_run(
        options.run,
        options.data,
        split=options.split,
        device=options.device,
        many_above=options.many_above,
        few_below=options.few_below,
    )
    print(evaluation.to_json() if options.json else evaluation.to_text())
    return 0


def _predict(options: argparse.Namespace) -> int:
    _need("PIL", "safetensors", "tqdm")
    from ltloss.training.predict.predict import predict_folder

    summary = predict_folder(
        options.run,
        options.images,
        options.out,
        sort_into=options.sort_into,
        top=options.top,
        device=options.device,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
    )
    print(summary)
    return 0


def _report(options: argparse.Namespace) -> int:
    from ltloss.training.pages.run_report import write_report

    print(f"open {write_report(options.run)}")
    return 0


def _tune(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise UserError("tune needs a CUDA device, and there is none here; without it the project's own tiles are used")
    shape = (options.samples, options.classes, options.width)
    if min(shape) < 1:
        raise UserError(f"samples, classes and width must be at least 1; got {shape}")
    from ltloss.tools.tune_tiles import tune

    return tune(shape, getattr(torch, options.dtype))


def _plan(options: argparse.Namespace) -> int:
    from ltloss.errors import nearest
    from ltloss.tools.plan import OPTIMIZERS, WIDTHS, Problem, make_plan, read_device
    from ltloss.training.model.registry import LOSSES

    for name, known in (("dtype", WIDTHS), ("optimizer", OPTIMIZERS), ("loss", set(LOSSES) - {"softmax"})):
        if getattr(options, name) not in known:
            raise UserError(f"--{name} {getattr(options, name)} is unknown; {nearest(getattr(options, name), known)}")
    try:
        device = read_device(options.device)
        problem = Problem(
            options.classes,
            options.dim,
            options.batch,
            options.gpus,
            data=options.data,
            dtype=options.dtype,
            optimizer=options.optimizer,
            sample_rate=options.sample_rate,
            loss=options.loss,
        )
    except (ValueError, OverflowError) as error:
        raise UserError(f"{error}; correct the option") from None
    found = make_plan(problem, device)
    print(found.to_json() if options.json else found.to_text())
    return 0 if found.fits else 1


def _doctor(options: argparse.Namespace) -> int:
    from ltloss.tools.doctor import main as doctor

    return doctor()
