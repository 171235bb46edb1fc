"""Second stages: methods that change a trained network without training its backbone again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ltloss.class_balance import Counts, log_prior_from_counts
from ltloss.errors import UserError
from ltloss.training.data.embeddings import Source
from ltloss.training.model.classifier import Classifier
from ltloss.training.model.softmax_loss import SoftmaxLoss
from ltloss.training.run.run_config import RunConfig
from ltloss.training.run.trainer import Trainer
from ltloss.training.seeds import numpy_generator


def post_hoc_offset(class_counts: Counts, tau: float) -> Tensor:
    """The offset −τ·log π_c, (C,) float32, that post-hoc logit adjustment adds to the logits of a trained classifier.

    Source: Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 9.

    Example:
        >>> from ltloss.training.comparison.second_stage import post_hoc_offset
        >>> post_hoc_offset([3, 1], tau=1.0).exp()
        tensor([1.3333, 4.0000])
    """
    return -log_prior_from_counts(class_counts, tau)


@torch.no_grad()
def normalize_weights(classifier: Classifier, power: float) -> None:
    """τ-normalisation: divide each class weight w_c by ‖w_c‖^power and drop the biases, in place.

    Source: Kang et al., Decoupling representation and classifier, ICLR 2020, eq. 3 and 4. UserError where the
    classifier is not linear: the weights of a cosine classifier have no length to change.
    """
    if not isinstance(classifier.loss, SoftmaxLoss):
        raise UserError(
            f"τ-normalisation needs a network trained with loss softmax, this one has {classifier.config.loss}"
        )
    linear = classifier.loss.linear
    linear.weight /= linear.weight.norm(dim=1, keepdim=True).clamp_min(1e-12) ** power
    linear.bias.zero_()


def class_balanced_order(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """N indices into labels (N,): for each a class is drawn uniformly, then an image of that class uniformly."""
    sizes = np.bincount(labels)
    present = np.flatnonzero(sizes)
    by_class, first = np.argsort(labels, kind="stable"), np.cumsum(sizes) - sizes
    classes = generator.choice(present, len(labels))
    return np.asarray(by_class[first[classes] + generator.integers(sizes[classes])])


class ClassifierRetraining(Trainer):
    """cRT: a new classifier on the frozen backbone of a trained one, with class-balanced sampling.

    Args:
        config: of the first stage, with epochs and learning rate of the second.
        source: training images.
        device: where to train.
        weights: the state_dict of the first stage; all but the weights of its classifier are used.
        measure_amp: as in ``Trainer``.

    Source: Kang et al., Decoupling representation and classifier, ICLR 2020, section 4.1.
    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        device: torch.device,
        weights: Mapping[str, Tensor],
        *,
        measure_amp: bool = False,
    ) -> None:
        super().__init__(config, source, device, measure_amp=measure_amp)
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith("loss.")}
        self.classifier.load_state_dict(kept, strict=False)
        for part in (self.classifier.backbone, self.classifier.norm):
            part.requires_grad_(False)
        self.begin()

    def _prepare_epoch(self, epoch: int) -> None:
        super()._prepare_epoch(epoch)
        self.classifier.backbone.eval()
        self.classifier.norm.eval()

    def _order(self, epoch: int) -> np.ndarray:
        generator = numpy_generator(self.settings.seed, "class-balanced order", epoch)
        return class_balanced_order(self.source.labels, generator)

    def _features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return super()._features(images)
