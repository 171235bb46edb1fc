"""``ltloss predict``: its options, and the call that they make."""

from __future__ import annotations

import argparse

from ltloss.cli.values import add_run, need, path, picked, setting_help
from ltloss.errors import UserError

PREDICT = (
    "Classify images or embeddings with the checkpoint of a run. predictions.csv in --out has a line for each, and "
    "gallery.html shows the images by class."
)


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``predict``."""
    add_run(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    images = "images to classify, searched recursively"
    what.add_argument("--images", type=path, metavar="FOLDER", help=images)
    features = "embeddings to classify, for a run of embeddings; files as for train, labels optional"
    what.add_argument("--data", type=path, metavar="FEATURES", help=features)
    parser.add_argument("--out", type=path, required=True, help="folder for the results")
    parser.add_argument("--sort-into", type=path, metavar="FOLDER", help="also copy each image to FOLDER/<class>/")
    replace = "replace the results of an earlier prediction in --out"
    parser.add_argument("--overwrite", action="store_true", help=replace)
    parser.add_argument(
        "--top", type=int, default=2, metavar="K", help="best classes per sample in the table (default: 2)"
    )
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--device", help=setting_help("device"))


def run_predict(options: argparse.Namespace) -> int:
    """Write the predictions and print a summary."""
    need("PIL", "safetensors", "tqdm")
    from ltloss.training.predict.predict import predict_embeddings, predict_folder

    chosen = picked(options, "top", "device", "batch_size", "overwrite")
    if options.data is None:
        print(predict_folder(options.run, options.images, options.out, sort_into=options.sort_into, **chosen))
        return 0
    if options.sort_into is not None:
        raise UserError(f"--sort-into {options.sort_into} copies images, and --data holds embeddings; leave it out")
    print(predict_embeddings(options.run, options.data, options.out, **chosen))
    return 0
