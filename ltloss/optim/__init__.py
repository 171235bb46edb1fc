"""Optimizers that update the prototypes inside the backward, a slab of classes at a time: no gradient (C, D) exists.

With a million classes the gradient, and the passes of the optimizer over it, cost more memory and often more time than
the loss. Up to float32 rounding each equals an optimizer on the stored gradient: ``torch.optim.SGD``,
``torch.optim.AdamW`` and row-wise Adagrad.

Example:
    >>> import torch
    >>> from ltloss import ArcFaceLoss
    >>> from ltloss.optim import PrototypeAdamW
    >>> backbone, loss_fn = torch.nn.Linear(32, 16), ArcFaceLoss(num_classes=1000, embedding_size=16)
    >>> optimizers = [torch.optim.AdamW(backbone.parameters()), PrototypeAdamW(loss_fn, lr=1e-3)]
    >>> loss_fn(backbone(torch.randn(8, 32)), torch.arange(8)).backward()
    >>> for optimizer in optimizers:
    ...     optimizer.step()
    ...     optimizer.zero_grad()
"""

from ltloss.optim.rules import PrototypeAdagrad, PrototypeAdamW, PrototypeSGD

__all__ = ["PrototypeAdagrad", "PrototypeAdamW", "PrototypeSGD"]
