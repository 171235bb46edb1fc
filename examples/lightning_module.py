"""The training of plain_loop.py as a LightningModule: the loss is a submodule, so its prototypes are trained and saved.

pip install 'ltloss[lightning]'
python -m examples.lightning_module
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from examples.plain_loop import CLASSES, DIM, data, network
from ltloss import LogitAdjustedLoss
from ltloss.class_balance import Counts, counts_from_labels


class LongTailed(lightning.LightningModule):
    """Network and loss; what differs from any other classifier is that ``predict`` belongs to the loss."""

    def __init__(self, class_counts: Counts, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.backbone = network()
        self.loss_fn = LogitAdjustedLoss.from_counts(class_counts, embedding_size=DIM)

    def forward(self, images: Tensor) -> Tensor:
        """The best class of each image, (N,)."""
        return self.loss_fn.predict(self.backbone(images)).index[:, 0]

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss: Tensor = self.loss_fn(self.backbone(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """The accuracy on a batch."""
        images, labels = batch
        self.log("accuracy", (self(images) == labels).double().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """``self.parameters()`` holds the prototypes, since the loss is a submodule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.003)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def main(folder: Path | None = None, epochs: int = 15) -> lightning.Trainer:
    """Train on the CPU; with ``folder`` write ``folder/last.ckpt``. Returns the trainer."""
    lightning.seed_everything(0, verbose=False)
    train, test = data()
    model = LongTailed(counts_from_labels(train.tensors[1], num_classes=CLASSES), epochs)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    loader = DataLoader(train, batch_size=32, shuffle=True)
    trainer.fit(model, loader, DataLoader(test, batch_size=len(test)))
    if folder is not None:
        trainer.save_checkpoint(folder / "last.ckpt")
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    main()
