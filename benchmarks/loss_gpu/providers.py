"""Who is measured on a GPU: ours, what PyTorch offers, and the fused peers where they can be imported.

Half precision inputs throughout, so every provider multiplies on the tensor cores: the dense ones round the normalised
copies and the cosines to the inputs' dtype, as training code under autocast does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from benchmarks import peers as common
from benchmarks.peers import SCALE, Inputs, Provider
from ltloss.margins import margin_cosine

# Relative errors (by norm) beyond these are mistakes. Half precision: the logits s·cos of the dense providers carry
# s·2^-9 (bf16), and so do, relatively, their probabilities.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def dense_margin_loss(inputs: Inputs) -> Tensor:
    """The loss as training scripts write it: all cosines at once, the own one exchanged, cross-entropy in float32."""
    unit = torch_functional.normalize(inputs.features), torch_functional.normalize(inputs.prototypes)
    cosine = (unit[0] @ unit[1].t()).float()
    labels = inputs.labels[:, None]
    margin = margin_cosine(cosine.gather(1, labels)[:, 0], angular_margin=inputs.margins[inputs.labels])
    return torch_functional.cross_entropy(SCALE * cosine.scatter(1, labels, margin[:, None]), inputs.labels)


def _compiled(inputs: Inputs) -> Callable[[], Tensor]:
    torch.compiler.reset()  # every shape anew: after eight the compiler would give up and run it eagerly
    compiled = torch.compile(lambda: dense_margin_loss(inputs), dynamic=False)
    return lambda: compiled()


def _liger(inputs: Inputs) -> Callable[[], Tensor]:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(inputs.prototypes, inputs.features, inputs.labels)


def _cut_cross_entropy(inputs: Inputs) -> Callable[[], Tensor]:
    function: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda: function(inputs.features, inputs.prototypes, inputs.labels)


def _linear_cross_entropy(inputs: Inputs) -> Callable[[], Tensor]:
    if not hasattr(torch_functional, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy (2.12 has)")
    return common.linear_cross_entropy(inputs)


PLAIN = "no margin, no normalisation"
PROVIDERS = (
    Provider("ltloss", common.ours, common.margin_truth),
    Provider("dense", lambda inputs: lambda: dense_margin_loss(inputs), common.margin_truth, note="eager"),
    Provider("torch.compile", _compiled, common.margin_truth, compiled=True, note="of the dense formula"),
    Provider("linear_cross_entropy", _linear_cross_entropy, common.plain_truth, note=PLAIN),
    Provider("liger", _liger, common.plain_truth, note=PLAIN + ", gradients computed in the forward"),
    Provider("cut-cross-entropy", _cut_cross_entropy, common.plain_truth, note=PLAIN),
    Provider(
        "pytorch-metric-learning", common.metric_learning_arcface, common.scalar_margin_truth, note="scalar margin"
    ),
)
"""Every provider by name; what cannot be imported says so when it is built (ImportError)."""
