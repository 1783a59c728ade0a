"""The optimizers that are compared, with rates of 1 (`tests.benchmarks.stack_of_llamas` says why)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.stack_of_llamas import Llamas

GAP = 100
# Muon's coefficients (Jordan et al., 2024), and the factor that makes an element as large as Adam's (arXiv:2502.16982).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MUON_MOMENTUM, MUON_SIZE = 0.95, 0.2


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer that takes part."""

    name: str
    make: Callable[[Llamas, int], torch.optim.Optimizer]
    """Takes the models and a rank."""
    has_rank: bool = True
    adapters: bool = False
    """Whether adapters of LoRA are trained, of a rank that gives them as many elements as GaLore's moments have."""
    one_rate: bool = False
    """Whether the matrices learn at the rate of all else."""


def _adamw(model: Llamas, rank: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*model.rest(), *model.matrices()], lr=1.0, weight_decay=0.0)


def _galore(**options: Any) -> Callable[[Llamas, int], torch.optim.Optimizer]:
    def make(model: Llamas, rank: int) -> torch.optim.Optimizer:
        from hf_galore import GaLoreAdamW

        group = {"params": model.matrices(), "rank": rank, "scale": 1.0, "update_proj_gap": GAP, **options}
        return GaLoreAdamW([{"params": model.rest()}, group], lr=1.0, weight_decay=0.0)

    return make


class Both(torch.optim.Optimizer):
    """Two optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self._optimizers:
            optimizer.step()


class Muon(torch.optim.Optimizer):
    """Muon for stacks of matrices: what `torch.optim.Muon` does with each, with its `match_rms_adamw`, in float32."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            gradient = param.grad
            momentum = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            direction = orthogonalised(gradient.lerp(momentum, MUON_MOMENTUM))
            param.add_(direction, alpha=-MUON_SIZE * max(param.shape[-2:]) ** 0.5)


def orthogonalised(matrices: Tensor) -> Tensor:
    """About UVᵀ of each matrix UΣVᵀ, by five steps of Newton and Schulz."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        products = x @ x.mT
        x = a * x + (b * products + c * products @ products) @ x
    found: Tensor = x.mT if tall else x
    return found


def _muon(model: Llamas, rank: int) -> torch.optim.Optimizer:
    return Both(torch.optim.AdamW(model.rest(), lr=1.0, weight_decay=0.0), Muon(model.matrices()))


class OneByOne(torch.optim.Optimizer):
    """An optimizer for matrices that does not know stacks: it has each matrix of them as a parameter."""

    def __init__(self, params: list[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        super().__init__(params, {})
        self._each = [(param, [nn.Parameter(one) for one in param.detach()]) for param in params]
        self._optimizer = make([one for _, ones in self._each for one in ones])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param, ones in self._each:
            for one, gradient in zip(ones, param.grad, strict=True):  # type: ignore[arg-type]
                one.grad = gradient
        self._optimizer.step()


def _galore_torch(model: Llamas, rank: int) -> torch.optim.Optimizer:
    import galore_torch

    def make(matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
        group = {"params": matrices, "rank": rank, "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std"}
        made: torch.optim.Optimizer = galore_torch.GaLoreAdamW([group], lr=1.0, no_deprecation_warning=True)
        return made

    rest = torch.optim.AdamW(model.rest(), lr=1.0, weight_decay=0.0, eps=1e-6)  # its own default for all
    return Both(rest, OneByOne(model.matrices(), make))


_NORMUON = {"rule": "muon", "residual": "normuon"}
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("AdamW", _adamw, has_rank=False, one_rate=True),
        Contender("AdamW, two rates", _adamw, has_rank=False),
        Contender("Muon", _muon, has_rank=False),
        Contender("galore_torch", _galore_torch),
        Contender("default", _galore()),
        Contender("residual=fira", _galore(residual="fira")),
        Contender("residual=sign, 1", _galore(residual="sign")),
        Contender("residual=sign, .1", _galore(residual="sign", residual_scale=0.1)),
        Contender("scaling=channel", _galore(scaling="channel")),
        Contender("scaling=tensor", _galore(scaling="tensor")),
        Contender("rule=muon", _galore(rule="muon")),
        Contender("rule=muon, residual=fira", _galore(rule="muon", residual="fira")),
        Contender("rule=muon, residual=muon", _galore(rule="muon", residual="muon")),
        Contender("rule=muon, residual=muon, 8 bits", _galore(rule="muon", residual="muon", residual_bits=8)),
        Contender("rule=muon, residual=normuon", _galore(**_NORMUON)),
        Contender("rule=muon, residual=normuon, 8 bits", _galore(**_NORMUON, residual_bits=8)),
        Contender(
            "rule=muon, residual=normuon, 8 bits, rotate", _galore(**_NORMUON, residual_bits=8, moments="rotate")
        ),
        Contender("LoRA", _adamw, adapters=True),
    )
}


def adapter_rank(contender: Contender, model_rank: int, hidden: int, intermediate: int) -> int:
    """The rank of adapters that have as many elements as GaLore's moments of one kind; 0 where there are none."""
    if not contender.adapters:
        return 0
    kinds = 4 * [(hidden, hidden)] + 3 * [(hidden, intermediate)]
    elements = sum(model_rank * max(shape) for shape in kinds)
    return max(1, round(elements / sum(sum(shape) for shape in kinds)))
