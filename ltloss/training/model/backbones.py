"""Networks that turn images (N, channels, H, W) into features (N, D)."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltloss.errors import UserError, nearest

BACKBONES = ("small-cnn", "resnet32")


def build_backbone(name: str, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module:
    """The network ``name`` for images of image_shape (channels, height, width); UserError for an unknown name."""
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
    """Two 3 x 3 convolutions; the shortcut subsamples and pads channels with zeros, so it has no parameters."""

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


def _timm_model(name: str, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module:
    """A timm model without its classifier, followed by a linear layer to the embedding; never downloads weights."""
    model_name = name.removeprefix("timm:")
    if importlib.util.find_spec("timm") is None:
        hint = "install it with `pip install timm`" if name != model_name else nearest(name, BACKBONES)
        raise UserError(f"--backbone {name} is not built in and timm is not installed; {hint}")
    try:
        import timm
    except Exception as error:  # any kind: that of torchvision's compiled part where it was made for another torch
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--backbone {name} needs timm, which cannot be imported ({reason}); torchvision must be the one made for "
            f"torch {torch.__version__}: pip install --upgrade torch torchvision timm"
        ) from error
    if not timm.is_model(model_name):
        close = nearest(model_name, timm.list_models()) if name != model_name else nearest(name, BACKBONES)
        raise UserError(f"--backbone {name} is unknown, to timm too; {close}")
    channels, height, width = image_shape
    arguments = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    try:
        model = timm.create_model(model_name, img_size=(height, width), **arguments)
    except TypeError:  # convolutional networks take any size and know no img_size
        model = timm.create_model(model_name, **arguments)
    try:
        # `model.num_features` is not what every model puts out, so look.
        with torch.no_grad():
            width_out = model.eval()(torch.zeros(1, *image_shape)).shape[1]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--backbone {name} cannot take images of {height} x {width} ({reason}); use --image-size"
        ) from error
    return nn.Sequential(OrderedDict(trunk=model, embedding=nn.Linear(width_out, embedding_size)))
