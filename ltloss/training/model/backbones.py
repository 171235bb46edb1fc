"""Networks that turn images (N, channels, H, W) into features (N, D)."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltloss.errors import UserError, in_one_line, nearest
from ltloss.training.model.weights import load_fitting, read_weights

BACKBONES = ("small-cnn", "resnet32")


def build_backbone(name: str, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module:
    """The network ``name`` for images of ``image_shape`` (channels, height, width); UserError for an unknown name."""
    if name == "small-cnn":
        return small_cnn(image_shape[0], embedding_size)
    if name == "resnet32":
        return ResNet32(image_shape[0], embedding_size)
    return _timm_model(name, image_shape, embedding_size)


def small_cnn(channels: int, embedding_size: int) -> nn.Sequential:
    """Three convolutions with batch normalisation and a linear layer, for images from 4 x 4 pixels up."""

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    return nn.Sequential(
        OrderedDict(
            first=block(channels, 32),
            second=block(32, 64),
            halve=nn.MaxPool2d(2),
            third=block(64, 64),
            pool=nn.AdaptiveAvgPool2d(2),
            flatten=nn.Flatten(),
            embedding=nn.Linear(64 * 4, embedding_size),
        )
    )


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut without parameters, which subsamples and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.extra_channels:
            before = self.extra_channels // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.extra_channels - before))
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + shortcut)


class ResNet32(nn.Module):
    """The CIFAR ResNet-32 (He et al. 2016, section 4.2): 3 stages of 5 blocks with 16, 32 and 64 channels.

    Its 64 pooled channels are the feature; any other embedding size adds a linear layer.
    """

    def __init__(self, channels: int, embedding_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16] * 6 + [32] * 5 + [64] * 5
        self.blocks = nn.Sequential(*(_ResidualBlock(a, b, stride=1 if a == b else 2) for a, b in pairwise(widths)))
        self.embedding = nn.Identity() if embedding_size == 64 else nn.Linear(64, embedding_size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, D) of images (N, channels, H, W)."""
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        features: Tensor = self.embedding(x.mean(dim=(2, 3)))
        return features


def _timm(name: str) -> tuple[Any, str]:
    """The module timm, and the name of the model in it; UserError if either is missing."""
    model_name = name.removeprefix("timm:")
    if importlib.util.find_spec("timm") is None:
        hint = "install it with `pip install timm`" if name != model_name else nearest(name, BACKBONES)
        raise UserError(f"--backbone {name} is not built in and timm is not installed; {hint}")
    try:
        import timm
    except Exception as error:  # any kind: that of torchvision's compiled part where it was made for another torch
        reason = in_one_line(error, 200)
        raise UserError(
            f"--backbone {name} needs timm, which cannot be imported ({reason}); torchvision must be the one made for "
            f"torch {torch.__version__}: pip install --upgrade torch torchvision timm"
        ) from error
    if not timm.is_model(model_name):
        close = nearest(model_name, timm.list_models()) if name != model_name else nearest(name, BACKBONES)
        raise UserError(f"--backbone {name} is unknown, to timm too; {close}")
    return timm, model_name


def _timm_trunk(name: str, size: tuple[int, int] | None, **arguments: Any) -> nn.Module:
    """A timm model without its classifier, for images of that height and width if given."""
    timm, model_name = _timm(name)
    arguments["num_classes"] = 0
    try:
        model = timm.create_model(model_name, **arguments, **({"img_size": size} if size else {}))
    except TypeError:  # convolutional networks take any size and know no img_size
        model = timm.create_model(model_name, **arguments)
    return cast(nn.Module, model.eval())


def _timm_model(name: str, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module:
    """A timm model without its classifier, followed by a linear layer to the embedding; never downloads weights."""
    model = _timm_trunk(name, image_shape[1:], pretrained=False, in_chans=image_shape[0])
    try:
        # `model.num_features` is not the output width of every model, so run it.
        with torch.no_grad():
            width_out = model(torch.zeros(1, *image_shape)).shape[1]
    except (RuntimeError, AssertionError) as error:
        raise _cannot_take(name, image_shape[1:], error) from error
    return nn.Sequential(OrderedDict(trunk=model, embedding=nn.Linear(width_out, embedding_size)))


def _cannot_take(name: str, size: tuple[int, int], error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"--backbone {name} cannot take images of {size[0]} x {size[1]} ({reason}); use --image-size")


class PretrainedBackbone(nn.Module):
    """An unchanged pretrained timm model, with the image size and pixel normalisation of its training.

    Args:
        name: timm:NAME.
        weights: a file with its weights; None for those of timm, which downloads them if necessary.
        image_size: side in pixels; None for that of the model.

    Raises UserError if timm, the model or its weights are missing, or the model cannot take that size.
    """

    mean: Tensor
    std: Tensor
    image_shape: tuple[int, int, int]

    def __init__(self, name: str, weights: Path | None = None, image_size: int | None = None) -> None:
        super().__init__()
        size = None if image_size is None else (image_size, image_size)
        try:
            self.network = _timm_trunk(name, size, pretrained=weights is None)
        except Exception as error:  # any kind: that of the library that downloads
            if weights is not None:
                raise
            reason = in_one_line(error, 200)
            raise UserError(f"--backbone {name}: no pretrained weights ({reason}); give --weights FILE") from error
        if weights is not None:
            _, missing = load_fitting(self.network, read_weights(weights), weights)
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise UserError(f"--weights {weights} lacks {missing[0]}{more} of the tensors of {name}; give others")
        timm, _ = _timm(name)
        about = timm.data.resolve_model_data_config(self.network)
        channels, height, width = about["input_size"]
        self.image_shape = (channels, *(size or (height, width)))
        self.register_buffer("mean", torch.tensor(about["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(about["std"]).view(-1, 1, 1), persistent=False)
        try:
            with torch.no_grad():
                self.network(torch.zeros(1, *self.image_shape))
        except (RuntimeError, AssertionError) as error:
            raise _cannot_take(name, self.image_shape[1:], error) from error

    def features(self, images: Tensor) -> Tensor:
        """Features (N, D) of uint8 images (N, channels, H, W) of the shape ``image_shape``."""
        # In one call pixels are converted before they are sent.
        pixels = images.to(self.mean.device).to(self.mean.dtype) / 255
        return cast(Tensor, self.network((pixels - self.mean) / self.std))
