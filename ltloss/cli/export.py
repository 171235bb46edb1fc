"""``ltloss export``: its options, and the call that they make."""

from __future__ import annotations

import argparse

from ltloss.cli.values import add_run, path, picked

EXPORT = (
    "Write the newest checkpoint of a run as one file that needs no ltloss: ONNX, or a program of torch.export (.pt2). "
    "ONNX needs: pip install 'ltloss[export]'."
)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export``."""
    add_run(parser)
    parser.add_argument("--to", choices=("onnx", "torch"), required=True, help="the format")
    written = "the file to write, .onnx or .pt2 (default: RUN/model.onnx, RUN/model.pt2)"
    parser.add_argument("--out", type=path, metavar="FILE", help=written)
    taken = "what the file takes: uint8 images of the run's size, or embeddings (default: what the run takes)"
    parser.add_argument("--input", choices=("images", "embeddings"), help=taken)
    parser.add_argument("--top", type=int, default=5, metavar="K", help="best classes per sample (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run_export(options: argparse.Namespace) -> int:
    """Write the model and print the name of the file."""
    from ltloss.training.predict.export import export_run

    print(f"wrote {export_run(options.run, **picked(options, 'out', 'to', 'input', 'top', 'overwrite'))}")
    return 0
