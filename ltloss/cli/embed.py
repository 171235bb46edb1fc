"""``ltloss embed``: its options, and the call that they make."""

from __future__ import annotations

import argparse

from ltloss.cli.values import path, picked, setting_help
from ltloss.errors import UserError, check_counts

EMBED = (
    "Write the features that a pretrained network, or a run, makes of images into FEATURES.npz, which `ltloss train "
    "--data` takes. Labels and splits come from the folders, as for train."
)


def add_embed(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``embed``."""
    what = parser.add_mutually_exclusive_group(required=True)
    images = "images, with labels where they lie in class folders"
    what.add_argument("--images", type=path, metavar="FOLDER", help=images)
    what.add_argument("--data", metavar="DATA", help="as for train")
    parser.add_argument("--image-root", metavar="FOLDER", help=setting_help("image_root"))
    by = parser.add_mutually_exclusive_group(required=True)
    by.add_argument("--backbone", metavar="timm:NAME", help="a pretrained network of timm")
    by.add_argument("--run", type=path, metavar="RUN", help="the newest checkpoint of a run")
    parser.add_argument("--out", type=path, required=True, metavar="FEATURES.npz", help="the file to write")
    weights = "weights of --backbone: .safetensors or a state dict of torch (default: timm's, which it may download)"
    parser.add_argument("--weights", type=path, metavar="FILE", help=weights)
    size = "side in pixels, with --backbone (default: that of the network)"
    parser.add_argument("--image-size", type=int, metavar="N", help=size)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="(default: float32)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--device", help=setting_help("device"))
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads that decode images (default: 4)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run_embed(options: argparse.Namespace) -> int:
    """Write the features and print the name of the file."""
    from ltloss.training.model.backbones import PretrainedBackbone
    from ltloss.training.model.classifier import Classifier, choose_device
    from ltloss.training.predict.embed import Network, data_to_embed, embed, images_to_embed
    from ltloss.training.predict.export import refuse_output

    check_counts(image_size=options.image_size, workers=options.workers)
    refuse_output(options.out, ".npz", options.overwrite)
    if options.images is not None and options.image_root is not None:
        raise UserError(f"--image-root {options.image_root} goes with --data, and --images is a folder; leave it out")
    if options.run is not None:
        for name in ("weights", "image_size"):
            if (value := getattr(options, name)) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {value} goes with --backbone, but --run has its own; leave it out")
        network: Network = (classifier := Classifier.load(options.run, options.device))
        shape = classifier.config.image_shape
    else:
        backbone = PretrainedBackbone(options.backbone, options.weights, options.image_size)
        network, shape = backbone.to(choose_device(options.device)).eval(), backbone.image_shape
    if options.images is not None:
        parts = images_to_embed(options.images, shape, workers=options.workers)
    else:
        parts = data_to_embed(options.data, shape, image_root=options.image_root, workers=options.workers)
    print(embed(network, parts, options.out, **picked(options, "dtype", "batch_size", "overwrite")))
    return 0
