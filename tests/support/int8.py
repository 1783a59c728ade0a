"""A small net whose linear layers have weights in 8 bits, trained by a loop of one's own; and any model's in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from accelerate.state import GradientState
from torch import Tensor, nn

from hf_galore.int8 import Int8Weight
from hf_galore.optim import GaLoreOptimizer

Model = TypeVar("Model", bound=nn.Module)


def in_8_bits(model: Model, but: Collection[str] = ()) -> Model:
    """The model, with the weights of its linear layers rounded to 8 bits; of those that are tied to none."""
    tied: dict[int, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            tied[id(param)] = tied.get(id(param), 0) + 1
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in but and tied[id(module.weight)] == 1:
            trains = module.weight.requires_grad
            module.weight = nn.Parameter(Int8Weight.from_float(module.weight.detach()), requires_grad=trains)
    return model


def as_int8(tensor: Tensor) -> Int8Weight:
    """The tensor, which is an int8 weight."""
    assert isinstance(tensor, Int8Weight)
    return tensor


def weight_of(layer: nn.Module) -> Int8Weight:
    """The weight of a layer, a parameter in 8 bits."""
    weight = layer.weight
    assert isinstance(weight, Int8Weight)
    assert isinstance(weight, nn.Parameter)
    return weight


class Net(nn.Module):
    """Matrices that are wide, tall and square, to project; and a head that is not."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.square = nn.Linear(width, width)
        self.head = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.norm(self.up(x))))
        out: Tensor = self.head(x + torch.tanh(self.square(x)))
        return out

    def targets(self) -> list[Tensor]:
        return [self.up.weight, self.down.weight, self.square.weight]


def net(dtype: torch.dtype = torch.float64, *, int8: bool = True, width: int = 40, seed: int = 0) -> Net:
    """The net, of float values that 8 bits have."""
    torch.manual_seed(seed)
    made = in_8_bits(Net(width)).to(dtype)
    return made if int8 else floats_of(made, width)


def floats_of(model: Net, width: int = 40) -> Net:
    """A net of floats with the same values."""
    made = Net(width).to(model.norm.weight.dtype)
    made.load_state_dict(model.state_dict())
    return made


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """All values by name, copied."""
    return {
        name: param.dequantized() if isinstance(param, Int8Weight) else param.detach().clone()
        for name, param in model.named_parameters()
    }


def batch(step: int, dtype: torch.dtype, rows: int = 24, width: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(3 * x[:, :6]).to(dtype)


def train(
    model: Net,
    make: Callable[[Net], torch.optim.Optimizer],
    *,
    steps: int = 6,
    start: int = 0,
    accumulation: int = 1,
    same: bool = False,
    max_norm: float | None = None,
    each_step: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
    forward: Callable[[Net, Tensor], Tensor] = lambda model, x: model(x),
) -> torch.optim.Optimizer:
    """The optimizer, after the last step.

    Args:
        same: whether the micro-batches of a window are one and the same, and not parts of the batch.
        each_step: called after each backward pass and before the step.
    """
    optimizer = make(model)
    dtype, width = model.norm.weight.dtype, model.square.in_features
    for step in range(start, start + steps):
        x, y = batch(step, dtype, width=width)
        parts: Sequence[Any] = (
            [(x, y)] * accumulation if same else list(zip(x.chunk(accumulation), y.chunk(accumulation), strict=True))
        )
        for number, (inputs, wanted) in enumerate(parts):
            GradientState()._set_sync_gradients(number == accumulation - 1)
            loss = nn.functional.mse_loss(forward(model, inputs), wanted)
            (loss / accumulation).backward()
        GradientState()._set_sync_gradients(True)
        if max_norm is not None:
            if isinstance(optimizer, GaLoreOptimizer):
                optimizer.clip_grad_norm_(max_norm)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        each_step(step, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(optimizer, GaLoreOptimizer):
        optimizer.close()
    return optimizer


def codes_apart(found: nn.Module, expected: nn.Module) -> float:
    """The part of all int8 elements that differ."""
    apart = total = 0
    others = dict(expected.named_parameters())
    for name, param in found.named_parameters():
        if isinstance(param, Int8Weight):
            apart += int((param.dequantized() != as_int8(others[name]).dequantized()).sum())
            total += param.numel()
    assert total
    return apart / total
