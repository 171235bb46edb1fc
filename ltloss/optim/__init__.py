"""Optimizers that move the prototypes inside the backward, a slab of classes at a time: no gradient (C, D) exists.

For a head of a million classes the gradient, and the optimizer's passes over it, cost more memory and often more time
than the loss. Each of these equals the optimizer of ``torch.optim`` on the stored gradient, to float32 rounding.

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
