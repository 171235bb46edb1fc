"""The classifier of a run: images or embeddings in, features and logits out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ltloss.errors import UserError
from ltloss.training.model.backbones import build_backbone
from ltloss.training.model.heads import Whitening, build_head
from ltloss.training.model.registry import build_loss
from ltloss.training.run.checkpoint import checkpoint_in_use, read_tensors
from ltloss.training.run.run_config import RunConfig

if TYPE_CHECKING:
    from ltloss.training.model.registry import LossHead


class Classifier(nn.Module):
    """Normalisation of pixels, backbone, batch normalisation of the features, and loss head of one run.

    For embeddings: standardisation, and the network that ``settings.head`` names in place of the backbone.

    ``features`` maps images to features. ``loss`` maps features to the loss, to logits and to the best classes. Its
    prototypes ``loss.weight`` (C, D) are a parameter of this module like any other.
    """

    loss: LossHead
    mean: Tensor
    std: Tensor

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        settings = config.settings
        self.config = config
        size, shape = config.embedding_size, config.image_shape
        if config.of_embeddings:
            self.backbone = build_head(settings.head, shape[0], size)
        else:
            self.backbone = build_backbone(settings.backbone, (shape[0], shape[1], shape[2]), size)
        # As in InsightFace. Without it the features of a new network have nearly the same direction, and a loss of
        # directions learns slowly or not at all.
        normed = settings.embedding_norm and not isinstance(self.backbone, Whitening)
        self.norm = nn.BatchNorm1d(size) if normed else nn.Identity()
        self.loss = build_loss(
            settings.loss, config.class_counts, size, settings.all_loss_options, settings.prototype_dtype
        )
        per_channel = (-1, *[1] * (len(shape) - 1))
        self.register_buffer("mean", torch.tensor(config.mean).view(per_channel), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(per_channel), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Features (N, D) of uint8 images (N, channels, H, W) or of embeddings, of the shape ``config.image_shape``."""
        values = images.to(self.mean.device).to(self.mean.dtype)  # in one call they are converted before they are sent
        if not self.config.of_embeddings:
            values = values / 255
        return cast(Tensor, self.norm(self.backbone((values - self.mean) / self.std)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) of what ``features`` takes."""
        return self.loss.logits(self.features(images))

    @classmethod
    def load(cls, run_dir: str | Path, device: str | torch.device | None = None) -> Classifier:
        """The classifier of a run's newest checkpoint (with early stopping the best one), in evaluation mode.

        Raises UserError if ``run_dir`` is no run, has no checkpoint yet, or its checkpoint does not fit.
        """
        run = Path(run_dir)
        classifier = cls(RunConfig.read(run))
        checkpoint = checkpoint_in_use(run)
        if checkpoint is None:
            raise UserError(f"{run} has no checkpoint yet; finish an epoch with `ltloss train --resume --out {run}`")
        weights = read_tensors(checkpoint / "model.safetensors")
        check_tensors(checkpoint / "model.safetensors", weights, classifier.state_dict())
        classifier.load_state_dict(weights)
        return classifier.to(choose_device(device)).eval()


def check_tensors(path: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError for the first tensor of ``path`` that is missing, unknown or of another shape or dtype."""

    def kind(tensor: Tensor | None) -> str:
        return "missing" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    for name in [*wanted, *stored]:
        there, here = kind(stored.get(name)), kind(wanted.get(name))
        if there != here:
            raise UserError(
                f"{path}: tensor {name} is {there} there and {here} in the model that config.json describes; "
                "restore the run's own files, or train again into a new --out"
            )


def choose_device(name: str | torch.device | None) -> torch.device:
    """The device ``name``; for None a GPU if there is one, else the CPU. UserError if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):  # the losses sum in float64, which mps lacks
            raise RuntimeError("not cpu or cuda" + "; mps has no float64" * (device.type == "mps"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name} cannot be used ({str(error).splitlines()[0]}); use cpu, or leave it out"
        ) from None
    return device
