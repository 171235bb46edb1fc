"""Where a training starts, beside what is drawn: the class means of embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ltloss._estimator.heads import Candidate
from ltloss._estimator.space import Part, of_class_means
from ltloss.losses.prototype_head import PrototypeHead
from ltloss.reference import direction
from ltloss.training.data.embeddings import ArrayEmbeddings
from ltloss.training.model.heads import Whitening

if TYPE_CHECKING:
    from ltloss.training.data.embeddings import Source
    from ltloss.training.model.classifier import Classifier


@torch.no_grad()
def start_at_means(classifier: Classifier, source: Source) -> None:
    """Whiten the embeddings of a linear head by their covariance within the classes, and start at the class means.

    Features then have variance 1 within the classes. Prototypes are the directions of the means; those of several
    sub-centres stay as they were drawn. A softmax layer starts as the estimator's: near the nearest class mean.
    """
    if not (isinstance(source, ArrayEmbeddings) and isinstance(classifier.backbone, Whitening)):
        return
    rows, labels = torch.from_numpy(source.rows), torch.from_numpy(source.labels)
    part = Part(rows, labels, torch.ones(len(rows)))
    space, means = of_class_means(source.array, part, len(source.class_names))
    matrix, head = classifier.backbone.matrix, classifier.loss
    root, std = matrix.shape[-1] ** 0.5, classifier.std.cpu()
    matrix.copy_(root * (std if matrix.dim() == 1 else std[:, None]) * space.whitening)
    if not isinstance(head, PrototypeHead):
        start = Candidate(None).of_means(means)
        head.linear.weight.copy_(start.prototypes / root)
        head.linear.bias.copy_(start.intercept)
    elif head.sub_centers == 1:
        prototypes = direction(means)
        lost = (prototypes == 0).all(1)
        prototypes[lost] = direction(torch.randn(int(lost.sum()), prototypes.shape[1]))
        head.load_state_dict({"weight": prototypes}, strict=False)
