"""Export a trained run as one file for serving: ONNX, or a program of ``torch.export``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ltloss import __version__
from ltloss.errors import UserError, check_counts
from ltloss.export import InferenceHead, Target, export_module

if TYPE_CHECKING:
    from ltloss.training.model.classifier import Classifier
    from ltloss.training.run.run_config import RunConfig

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}

_RESIZING = "the centre at the aspect ratio of image_shape, then bicubic with antialiasing (PIL.ImageOps.fit)"


class _Whole(nn.Module):
    """The whole classifier: its input to the head's outputs, and for images also ``embeddings`` (N, D)."""

    def __init__(self, classifier: Classifier, head: InferenceHead) -> None:
        super().__init__()
        self.classifier, self.head = classifier, head
        del classifier.loss  # a file would hold its prototypes a second time

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.classifier.features(inputs)
        outputs: dict[str, Tensor] = self.head(features)
        return outputs if self.classifier.config.of_embeddings else {"embeddings": features, **outputs}


def export_run(
    run: Path,
    out: Path | None = None,
    *,
    to: Target = "onnx",
    input: Literal["images", "embeddings"] | None = None,
    top: int = 5,
    overwrite: bool = False,
) -> Path:
    """Write the checkpoint that ``run`` uses as a file that needs no ltloss, and return the file's path.

    The outputs are those of :class:`ltloss.export.InferenceHead`; with images also ``embeddings`` (N, D).

    Args:
        run: the folder of a training run.
        out: the file, which must end in ``.onnx`` or ``.pt2``; None for RUN/model.onnx or RUN/model.pt2.
        to: "onnx", or "torch" for a program of ``torch.export``.
        input: "images" (N, channels, H, W) uint8 of the run's size, which the file normalises itself; or "embeddings"
            (N, D) float32, which are the features if the run was trained on images. None: what it was trained on.
        top: how many classes per sample the outputs ``index``, ``cosine`` and ``probability`` have, at most C.
        overwrite: replace an existing file, which is refused otherwise.

    Raises:
        UserError: ``run`` is no run; ``out`` exists, cannot be written to or has another ending; the weights are too
            large for ONNX.
        ImportError: onnx or onnxscript is missing.
    """
    from ltloss.training.model.classifier import Classifier
    from ltloss.training.run.run_config import RunConfig

    config = RunConfig.read(run)
    path = run / f"model{_SUFFIXES[to]}" if out is None else out
    check_counts(top=top)
    refuse_output(path, _SUFFIXES[to], overwrite)
    if input == "images" and config.of_embeddings:
        raise UserError(f"--input images: run {run} takes embeddings of {config.image_shape[0]} features; leave it out")
    classifier = Classifier.load(run, "cpu").requires_grad_(False)
    head = InferenceHead(classifier.loss, min(top, len(config.class_names)))
    input = input or ("embeddings" if config.of_embeddings else "images")
    metadata = _metadata(config, input)
    if input == "images" or config.of_embeddings:
        example = torch.zeros(2, *config.image_shape, dtype=torch.uint8 if input == "images" else torch.float32)
        export_module(_Whole(classifier, head), input, example, path, to=to, metadata=metadata)
    else:
        export_module(head, input, torch.zeros(2, config.embedding_size), path, to=to, metadata=metadata)
    return path


def refuse_output(path: Path, suffix: str, overwrite: bool) -> None:
    """Raise UserError, before any work, if the file ``path`` cannot be written."""
    if path.suffix != suffix:
        raise UserError(f"--out {path} must end in {suffix}; give another name")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; give a file")
    if path.exists() and not overwrite:
        raise UserError(f"--out {path} already exists; give --overwrite to replace it, or another --out")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {path}: {path.parent} is no folder that can be written to; make it, or give another")


def _metadata(config: RunConfig, input: str) -> dict[str, Any]:
    """Facts that a user needs to prepare the file's input and to read its outputs."""
    facts: dict[str, Any] = {
        "class_names": list(config.class_names),
        "loss": config.loss,
        "backbone": config.backbone,
        "ltloss": __version__,
    }
    if input == "images":
        facts |= {
            "image_shape": list(config.image_shape),
            "pixels": f"uint8, 0 to 255, {'grey' if config.image_shape[0] == 1 else 'RGB'}, channels first",
            "resizing": _RESIZING,
            "normalisation": {"mean": list(config.mean), "std": list(config.std), "of": "pixels / 255", "inside": True},
        }
    return facts
