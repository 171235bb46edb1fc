"""Load a folder that ``build.py`` wrote, where ltloss cannot be imported, and compare its results with float64.

    python kernels/hub/check.py FOLDER [torch|triton]

``kernels.get_local_kernel`` loads it where that package is installed. Else Python's import does, from the inner folder
that older versions of that package use. Our kernels run on the GPU, or in Triton's interpreter where there is none.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OURS = ("ltloss", "ltloss_kernels")


class Refusing:
    """An import finder that refuses our packages, wherever they are installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """None for other packages, so that Python asks the next finder; ModuleNotFoundError for ours."""
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"{name} is not to be imported here")
        return None


def load(folder: Path) -> tuple[ModuleType, str]:
    """The package, and the name of what loaded it."""
    try:
        loader = f"kernels {version('kernels')}"
    except PackageNotFoundError:
        pass
    else:
        from kernels import get_local_kernel

        return get_local_kernel(folder), loader
    backend = "cuda" if torch.version.cuda else "cpu"
    spec = importlib.util.spec_from_file_location("of_the_hub", folder / f"build/torch-{backend}/ltloss/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, "Python"


def dense(features: Tensor, prototypes: Tensor, labels: Tensor, scale: float, angle: float, cosine: float) -> Tensor:
    """The combined margin in float64, with its N×C logits. Needs θ_y + angle < π."""
    cosines = F.normalize(features.double()) @ F.normalize(prototypes.double()).t()
    target = torch.cos(cosines.acos() + angle) - cosine
    margined = torch.where(F.one_hot(labels, len(prototypes)).bool(), target, cosines)
    return F.cross_entropy(scale * margined, labels)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((found.double() - expected).detach().abs().max() / expected.detach().abs().max())


def check(hub: ModuleType, device: str) -> dict[str, float]:
    """Errors of losses, gradients and searches by name; AssertionError where an index is wrong."""
    # By hand: the logits are 2·(1 − 0.5) and 2·0, the loss is log(1 + e^-1).
    rows, labels = torch.tensor([[1.0, 0.0], [0.0, 2.0]], device=device), torch.tensor([0, 1], device=device)
    loss = hub.margin_cross_entropy(rows, rows, labels, scale=2.0, cosine_margin=0.5)
    errors = {"by hand": abs(loss.item() - math.log(1.0 + math.exp(-1.0)))}

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 24, generator=generator).to(device).requires_grad_()
    prototypes = torch.randn(257, 24, generator=generator).to(device).requires_grad_()
    labels = torch.randint(257, (20,), generator=generator).to(device)
    leaves = (features, prototypes)
    margins = {"angular_margin": 0.3, "cosine_margin": 0.1}
    expected = dense(features, prototypes, labels, 16.0, *margins.values())
    expected_grads = torch.autograd.grad(expected, leaves)
    module = nn.Module()
    vars(module).update(weight=prototypes, scale=16.0, **margins)
    for name, loss in (
        ("loss", hub.margin_cross_entropy(*leaves, labels, scale=16.0, **margins)),
        ("layer", hub.layers.CombinedMarginLoss.forward(module, features, labels)),
    ):
        errors[name] = error(loss, expected)
        for leaf, one, other in zip("xw", torch.autograd.grad(loss, leaves), expected_grads, strict=True):
            errors[f"d {name}/d{leaf}"] = error(one, other)
    vars(module).update(weight=prototypes.t(), margin=0.1)
    loss = hub.layers.AMSoftmaxLoss.forward(module, features, labels.view(4, 5))
    errors["AMSoftmaxLoss"] = error(loss, dense(*leaves, labels, 16.0, 0.0, 0.1))

    unit = F.normalize(prototypes.detach().double())
    nearest, (cosine, index) = hub.nearest_prototype(prototypes), (unit @ unit.t()).fill_diagonal_(-2.0).max(dim=1)
    assert torch.equal(nearest.index, index)
    best, (cosines, classes) = hub.top_k(features, prototypes, k=3), (F.normalize(features.double()) @ unit.t()).topk(3)
    assert torch.equal(best.index, classes)
    errors |= {"nearest": error(nearest.cosine, cosine), "top_k": error(best.cosine, cosines)}
    return errors


def kernelized(hub: ModuleType, folder: Path, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a module after ``kernels`` replaced its forward by our layer's, and the loss before."""
    import kernels

    layer = hub.layers.CombinedMarginLoss

    @kernels.use_kernel_forward_from_hub(layer.__name__)
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(1)
            self.weight = nn.Parameter(torch.randn(30, features.shape[1], generator=generator).to(features.device))
            self.scale, self.angular_margin, self.cosine_margin = 8.0, 0.2, 0.1

        def forward(self, features: Tensor, labels: Tensor) -> Tensor:
            return dense(features, self.weight, labels, self.scale, self.angular_margin, self.cosine_margin)

    module: Any = Dense()
    before = module(features, labels).detach()
    ours = kernels.LocalLayerRepository(folder, layer_name=layer.__name__)
    device = features.device.type
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({layer.__name__: {device: {mode: ours}}}):
        module = kernels.kernelize(module, mode=mode, device=device)
    assert module.forward.__func__ is layer.forward
    return module(features, labels).detach(), before


def main(folder: Path, backend: str = "torch") -> int:
    """Print the errors; return 1 if one exceeds 1e-5, which float32 rounding does not explain."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "triton" and device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # of its interpreter, on −inf
    sys.meta_path.insert(0, Refusing())
    hub, loader = load(folder)
    with hub.use_backend(backend):
        errors = check(hub, device)
        if loader != "Python":
            generator = torch.Generator().manual_seed(2)
            batch = torch.randn(6, 5, generator=generator).to(device), torch.arange(6, device=device)
            errors["kernelized"] = error(*kernelized(hub, folder, *batch))
    assert not any(name.partition(".")[0] in OURS for name in sys.modules)
    print(f"loaded by {loader}, {backend} on {device}; relative errors: ", end="")
    print(", ".join(f"{name} {value:.0e}" for name, value in errors.items()))
    wrong = [name for name, value in errors.items() if not value <= 1e-5]
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
