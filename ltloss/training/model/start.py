"""The start of a training beside random weights: the backbone of another run, the class means of embeddings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ltloss._estimator.heads import Candidate
from ltloss._estimator.space import Part, of_class_means
from ltloss.losses.prototype_head import PrototypeHead
from ltloss.reference import direction
from ltloss.training.data.embeddings import ArrayEmbeddings
from ltloss.training.model.heads import Whitening
from ltloss.training.model.weights import load_fitting, read_weights

if TYPE_CHECKING:
    from ltloss.training.data.embeddings import Source
    from ltloss.training.model.classifier import Classifier


def start_from(classifier: Classifier, source: Source, *, quiet: bool = False) -> None:
    """Take the backbone that ``settings.init_from`` names, and start a linear head at the class means of ``source``.

    A line on stderr says how many tensors were taken. UserError if none fits.
    """
    if (named := classifier.config.settings.init_from) is not None:
        taken, left = load_fitting(classifier, read_weights(Path(named)), Path(named))
        if not quiet:
            rest = f"; as drawn: {', '.join(left[:3])}{' and more' if len(left) > 3 else ''}" if left else ""
            found = f"{len(taken)} of the {len(taken) + len(left)} tensors of the backbone"
            print(f"ltloss: took {found} from {named}{rest}", file=sys.stderr)
    _start_at_means(classifier, source)


@torch.no_grad()
def _start_at_means(classifier: Classifier, source: Source) -> None:
    """Whiten the embeddings of a linear head by their covariance within the classes, and start at the class means.

    Features then have variance 1 within the classes. Prototypes become the directions of the means; sub-centres stay
    random. A softmax layer starts as the estimator's does: as nearest-mean classifier.
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
