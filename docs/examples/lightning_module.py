"""Train all weights of a model with Lightning, by its Trainer or by Fabric.

python docs/examples/lightning_module.py             # a tiny classifier with random weights
python docs/examples/lightning_module.py --fabric
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from hf_galore import make_optimizer

OPTIM_ARGS = "rank=8, update_proj_gap=4, scale=1"


class FineTuning(lightning.LightningModule):
    """Any classifier, all of whose weights are trained."""

    def __init__(
        self, model: nn.Module, optim: str = "galore_adamw_8bit_layerwise", optim_args: str = OPTIM_ARGS
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.optim_args = optim_args

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.model(inputs), labels)

    def configure_optimizers(self) -> Any:
        trainer = self.trainer
        optimizer = make_optimizer(
            self.model,
            "all-linear",
            optim=self.optim,
            optim_args=self.optim_args,
            lr=1e-2,
            # Only accelerate tells a layerwise optimizer of accumulation; and what is to be clipped has to wait too.
            hold_gradients=trainer.accumulate_grad_batches > 1 or bool(trainer.gradient_clip_val),
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_end(self) -> None:
        self.optimizers().optimizer.close()  # takes the hooks off the model


def train_with_fabric(
    fabric: lightning.Fabric,
    model: nn.Module,
    batches: Any,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    optim: str = "galore_adamw_8bit_layerwise",
    optim_args: str = OPTIM_ARGS,
) -> None:
    """Train a classifier by a loop of one's own with Fabric."""
    galore = make_optimizer(
        model,
        "all-linear",
        optim=optim,
        optim_args=optim_args,
        lr=1e-2,
        hold_gradients=accumulate > 1 or max_norm is not None,
    )
    prepared, optimizer = fabric.setup(model, galore)
    for number, (inputs, labels) in enumerate(batches, 1):
        closes = number % accumulate == 0
        with fabric.no_backward_sync(prepared, enabled=not closes):
            fabric.backward(cross_entropy(prepared(inputs), labels) / accumulate)
        if closes:
            if max_norm is not None:
                fabric.clip_gradients(prepared, optimizer, max_norm=max_norm)
            optimizer.step()
            optimizer.zero_grad()
    galore.close()


def tiny_classifier() -> nn.Module:
    """Three linear layers."""
    torch.manual_seed(0)
    first, last = nn.Linear(32, 64), nn.Linear(64, 10)
    return nn.Sequential(first, nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), last)


def tiny_rows(rows: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Inputs whose largest of ten elements is the label."""
    inputs = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))
    return list(zip(inputs, inputs[:, :10].argmax(dim=1), strict=True))


def main() -> None:
    """Run by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fabric", action="store_true")
    model, loader = tiny_classifier(), DataLoader(tiny_rows(), batch_size=4)
    if parser.parse_args().fabric:
        train_with_fabric(lightning.Fabric(), model, loader, max_norm=1.0)
    else:
        folder = tempfile.mkdtemp()
        lightning.Trainer(max_epochs=2, gradient_clip_val=1.0, default_root_dir=folder).fit(FineTuning(model), loader)


if __name__ == "__main__":
    main()
