"""A PyTorch training loop over long-tailed digits, on a CPU in seconds.

    python examples/plain_loop.py

The loss module holds the class prototypes, so its parameters go to the optimizer too, and it predicts.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ltloss import LogitAdjustedLoss
from ltloss.class_balance import counts_from_labels

CLASSES, DIM, EPOCHS = 10, 32, 15
LARGEST, IMBALANCE = 120, 40  # training images of class 0, and how many times as many as of class 9


def data() -> tuple[TensorDataset, TensorDataset]:
    """Digits to train on, the tenth class the rarest, and 50 of each class to test."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    counts = [round(LARGEST * IMBALANCE ** (-c / (CLASSES - 1))) for c in range(CLASSES)]
    of_class = [(labels == c).nonzero()[:, 0] for c in range(CLASSES)]
    train = torch.cat([indices[50 : 50 + count] for indices, count in zip(of_class, counts, strict=True)])
    test = torch.cat([indices[:50] for indices in of_class])
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def network() -> nn.Module:
    """Images (N, 8, 8) to embeddings (N, DIM)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, DIM), nn.BatchNorm1d(DIM))


@torch.no_grad()
def accuracies(backbone: nn.Module, loss_fn: LogitAdjustedLoss, test: TensorDataset) -> Tensor:
    """Fraction correct of each class, (CLASSES,)."""
    backbone.eval()
    images, labels = test.tensors
    correct = loss_fn.predict(backbone(images)).index[:, 0] == labels
    return torch.stack([correct[labels == c].double().mean() for c in range(CLASSES)])


def main() -> Tensor:
    """Train, print a line per epoch, and return the accuracy of each class."""
    torch.manual_seed(0)
    train, test = data()
    backbone = network()
    counts = counts_from_labels(train.tensors[1], num_classes=CLASSES)
    loss_fn = LogitAdjustedLoss.from_counts(counts, embedding_size=DIM)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *loss_fn.parameters()], lr=0.003)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    found = torch.zeros(CLASSES)
    for epoch in range(1, EPOCHS + 1):
        backbone.train()
        for images, labels in DataLoader(train, batch_size=32, shuffle=True):
            loss = loss_fn(backbone(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        found = accuracies(backbone, loss_fn, test)
        print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy {found.mean():.3f}, rarest class {found[-1]:.3f}")
    return found


if __name__ == "__main__":
    main()
