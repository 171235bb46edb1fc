from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ltloss.errors import UserError
from ltloss.training.model.backbones import BACKBONES, PretrainedBackbone, ResNet32, build_backbone
from ltloss.training.model.classifier import Classifier


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 20)])
@pytest.mark.parametrize("embedding_size", [64, 10])
def test_any_image_becomes_a_feature(name: str, shape: tuple[int, int, int], embedding_size: int) -> None:
    features = build_backbone(name, shape, embedding_size)(torch.rand(2, *shape))
    assert features.shape == (2, embedding_size)


def test_resnet32_has_the_published_size() -> None:
    # He et al. 2016, table 6: 0.46 million, with the 10-way classifier of 650 parameters.
    parameters = sum(p.numel() for p in ResNet32(3, 64).parameters()) + 650
    assert parameters == 464_154
    assert sum(isinstance(module, nn.Conv2d) for module in ResNet32(3, 64).modules()) == 31


@pytest.mark.parametrize("name", ["timm:resnet18", "resnet18"])
def test_without_timm_its_models_are_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with refused(name, "timm", error=UserError):
        build_backbone(name, (3, 32, 32), 16)


class Sent(TorchDispatchMode):
    """Notes the dtype in which a tensor comes to another device."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.dtype = result.dtype
        return result


@pytest.mark.parametrize("kind", [Classifier, PretrainedBackbone])
def test_pixels_are_sent_to_a_gpu_as_bytes(kind: type[nn.Module]) -> None:
    """A copy that changes the dtype too is converted before it is sent, four bytes for each."""
    with FakeTensorMode(), Sent() as sent:  # CUDA tensors without values, and without a GPU
        images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        mean, std = torch.zeros(3, 1, 1, device="cuda"), torch.ones(3, 1, 1, device="cuda")
        network: Any = types.SimpleNamespace(mean=mean, std=std, config=types.SimpleNamespace(of_embeddings=False))
        network.backbone = network.norm = network.network = nn.Identity()
        assert kind.features(network, images).dtype == torch.float32
    assert sent.dtype == torch.uint8


class Pooled(nn.Module):
    """What a timm model is with num_classes=0."""

    num_features = 99  # as for some of them, not what comes out

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean(dim=(2, 3))


@pytest.fixture
def timm_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module of timm's name with its three functions, which records how models are made."""
    calls: list[dict[str, Any]] = []

    def create_model(name: str, **arguments: Any) -> nn.Module:
        if name == "convnet" and "img_size" in arguments:
            raise TypeError("img_size")
        calls.append({"name": name, **arguments})
        if arguments["pretrained"] and name == "vit":
            raise OSError("no route to host")
        return Pooled(arguments.get("in_chans", 3))

    module = types.ModuleType("timm")
    module.__spec__ = importlib.machinery.ModuleSpec("timm", None)
    functions = {"create_model": create_model, "is_model": {"convnet", "vit"}.__contains__}
    about = {"input_size": (3, 9, 9), "mean": (0.5, 0.0, 0.0), "std": (1.0, 1.0, 0.5)}
    data = types.SimpleNamespace(resolve_model_data_config=lambda _: about)
    vars(module).update(functions, list_models=lambda: ["convnet", "vit"], data=data)
    monkeypatch.setitem(sys.modules, "timm", module)
    return calls


@pytest.mark.parametrize(("name", "size"), [("timm:convnet", None), ("convnet", None), ("vit", (16, 16))])
def test_timm_models_are_made_for_the_images_without_weights(
    name: str, size: tuple[int, int] | None, timm_calls: list[dict[str, Any]]
) -> None:
    model = build_backbone(name, (1, 16, 16), 7)
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 7)
    (call,) = timm_calls
    assert call["pretrained"] is False
    assert call["num_classes"] == 0
    assert call.get("img_size") == size


def test_images_too_small_for_a_model_are_an_error(timm_calls: list[dict[str, Any]]) -> None:
    with refused("timm:convnet", "2 x 2", "--image-size", error=UserError):
        build_backbone("timm:convnet", (1, 2, 2), 7)


def test_a_name_that_timm_does_not_know_is_an_error(timm_calls: list[dict[str, Any]]) -> None:
    with refused("timm:convnetx", "convnet", error=UserError):
        build_backbone("timm:convnetx", (1, 16, 16), 7)
    assert timm_calls == []


def test_a_name_like_none_of_a_thousand_is_a_short_error(
    timm_calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm.list_models", lambda: [f"efficientnet_b{i}" for i in range(1000)])
    with refused("timm:zzz", "efficientnet_b0", error=UserError) as caught:
        build_backbone("timm:zzz", (1, 16, 16), 7)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("error", [RuntimeError("operator torchvision::nms does not exist"), ImportError("libcudart")])
def test_an_installation_of_timm_that_is_broken_is_an_error_that_names_what_broke(
    error: Exception, timm_calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "timm":
                raise error

    spec = sys.modules["timm"].__spec__
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr("sys.meta_path", [Broken(), *sys.meta_path])
    with refused("timm", str(error), error=UserError):
        build_backbone("timm:convnet", (1, 16, 16), 7)


def test_a_pretrained_backbone_takes_images_as_it_was_trained_with(timm_calls: list[dict[str, Any]]) -> None:
    backbone = PretrainedBackbone("timm:convnet")
    assert timm_calls == [{"name": "convnet", "num_classes": 0, "pretrained": True}]
    assert backbone.image_shape == (3, 9, 9)
    images = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    red, green, blue = (images.float() / 255).unbind(1)
    expected = backbone.network(torch.stack([red - 0.5, green, 2 * blue], 1))
    torch.testing.assert_close(backbone.features(images), expected)
    assert PretrainedBackbone("timm:convnet", image_size=12).image_shape == (3, 12, 12)
    with refused("timm:convnet", "2 x 2", "--image-size", error=UserError):
        PretrainedBackbone("timm:convnet", image_size=2)
    with refused("timm:vit", "no route to host", "--weights", error=UserError):
        PretrainedBackbone("timm:vit")


def test_a_pretrained_backbone_takes_weights_from_a_file(timm_calls: list[dict[str, Any]], tmp_path: Path) -> None:
    weights = {name: torch.randn_like(value) for name, value in Pooled(3).state_dict().items()}
    torch.save({"state_dict": {**weights, "fc.weight": torch.zeros(2, 5)}}, tmp_path / "w.pt")
    backbone = PretrainedBackbone("timm:convnet", tmp_path / "w.pt")
    assert timm_calls[0]["pretrained"] is False
    assert all(torch.equal(value, weights[name]) for name, value in backbone.network.state_dict().items())
    torch.save({"conv.weight": weights["conv.weight"]}, tmp_path / "w.pt")
    with refused("--weights", "conv.bias", error=UserError):
        PretrainedBackbone("timm:convnet", tmp_path / "w.pt")
