"""What a plan for several processes has to know of each parameter of a model, as its optimizer trains it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..backward.linear import why_not_patchable
from ..config import RefreshMethod
from ..lowrank.probes import held_shape, probe_shapes
from ..lowrank.projection import Side, basis_shapes, low_rank_shape
from ..optim.optimizer import GaLoreOptimizer
from ..optim.target import Target
from ..rules.adam_8bit import Adam8bit


@dataclasses.dataclass(frozen=True)
class Projection:
    """How a target is projected."""

    side: Side
    rank: int
    gap: int
    """`update_proj_gap`: a refresh in so many steps."""
    method: RefreshMethod
    left_bytes: int = 0
    """The left basis as it is kept, in `proj_bits` with its scales; 0 where that side is not projected."""
    right_bytes: int = 0
    """The right basis, likewise."""
    in_codes: bool = False
    """Whether bases are kept in 8 or 4 bits, whose blocks run across rows."""
    direction_itemsize: int = 4
    """Bytes of an element of the direction that the rule makes of R."""
    without_gradient: bool = False
    """Whether the backward pass computes R without G."""
    probes: int = 0
    """How many norm probes are beside a basis, at most, in what is held of a gradient."""
    matrices: tuple[int, ...] | None = None
    """What the parameter is projected as, m × n or a stack k × m × n, where that is not its own shape."""
    needs_gradient: bool = False
    """Whether updates need G itself, besides R."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter, and what an optimizer keeps of it. Bytes are those of one process that has all of it."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    """Bytes of an element of the weight, and of its gradient, as a rank keeps them."""
    wire_itemsize: int
    """Bytes of an element as it is gathered, and of its gradient as it is reduced: under FSDP2 with mixed precision
    fewer than a rank keeps."""
    trained: bool = True
    moment_bytes: int = 0
    projection: Projection | None = None
    """`None` for a full-rank parameter."""
    unit: str = ""
    """What FSDP2 gathers it with."""
    gathers: int = 2
    """How often FSDP2 gathers it for a micro-batch: for the forward and for the backward pass."""

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def low_rank_numel(self) -> int:
        """Elements of R; 0 for a full-rank parameter."""
        if self.projection is None:
            return 0
        return math.prod(low_rank_shape(self.matrices, self.projection.side, self.projection.rank))

    @property
    def held_shape(self) -> tuple[int, ...]:
        """The shape of what is held of a target's gradient: of R, and what norm probes give."""
        assert self.projection is not None
        side, rank = self.projection.side, self.projection.rank
        probes = probe_shapes(basis_shapes(self.matrices, side, rank), self.projection.probes)
        return held_shape(low_rank_shape(self.matrices, side, rank), probes)

    @property
    def matrices(self) -> tuple[int, ...]:
        """What it is projected as, if it is."""
        found = None if self.projection is None else self.projection.matrices
        return self.shape if found is None else found

    @property
    def basis_bytes(self) -> int:
        """The bases as they are kept."""
        return 0 if self.projection is None else self.projection.left_bytes + self.projection.right_bytes

    @property
    def builds_gradient(self) -> bool:
        """Whether the backward pass builds G, m × n."""
        return self.trained and not (self.projection is not None and self.projection.without_gradient)

    def padded_numel(self, processes: int) -> int:
        """Elements in the collectives of FSDP2, which cuts along the first side and fills the last shards up."""
        return processes * self.shard_numel(processes)

    def moment_bytes_of(self, processes: int) -> int:
        """The moments of a rank: of its rows, or where both sides are projected all r × r."""
        if self.projection is not None and self.projection.side == "full":
            return self.moment_bytes
        return math.ceil(self.moment_bytes / processes)

    def shard_numel(self, processes: int) -> int:
        """Elements of the largest shard: ⌈m / N⌉ rows.

        Source: torch, `torch/distributed/fsdp/_fully_shard/_fsdp_param.py` (`Shard(0)`, `chunk_with_empty`).
        """
        return math.ceil(self.shape[0] / processes) * math.prod(self.shape[1:]) if self.shape else 1


def padded(rows: int, processes: int) -> int:
    """So many rows, filled up to equal parts for all processes."""
    return processes * math.ceil(rows / processes)


def parameters_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    units: Mapping[str, tuple[str, int]] | None = None,
    float32: bool = False,
) -> list[Parameter]:
    """The parameters of a model, frozen ones too, as an optimizer that has taken a step trains them. Reads no numbers.

    Args:
        model: as one process has it.
        optimizer: any; of a GaLore optimizer what it projects.
        units: for FSDP2, the unit of each parameter by its name and how often it is gathered.
        float32: whether FSDP2 keeps the trained weights in float32 and gathers them in the model's dtype.
    """
    targets: dict[int, Target] = {}
    served: set[int] = set()
    if isinstance(optimizer, GaLoreOptimizer):
        targets = {id(target.param): target for target in optimizer.targets()}
        if optimizer.hooks is not None and optimizer.hooks.projected_backward:
            served = _linear_weights(model)
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    found = []
    for name, param in model.named_parameters():  # of two that are tied the first
        upcast = float32 and id(param) in trained and param.element_size() < 4
        itemsize = 4 if upcast else param.element_size()
        target, state = targets.get(id(param)), optimizer.state.get(param, {})
        unit, gathers = ("", 2) if units is None else units[name]
        found.append(
            Parameter(
                name,
                tuple(param.shape),
                itemsize,
                param.element_size(),
                id(param) in trained,
                sum(
                    # torch.optim has its moments in the weight's dtype.
                    value.numel() * (itemsize if value.dtype == param.dtype else value.element_size())
                    for key, value in state.items()
                    if _is_moment(value, () if target is None else target.basis_keys, key)
                ),
                None if target is None else _projection(target, state, id(param) in served, itemsize),
                unit,
                gathers,
            )
        )
    return found


def _is_moment(value: object, basis_keys: Iterable[str], key: str) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and key not in basis_keys


def _projection(target: Target, state: Mapping[str, Tensor], without_gradient: bool, itemsize: int) -> Projection:
    def kept(side: str) -> int:
        # With 16 bits a basis has the weight's dtype.
        return sum(
            state[key].numel() * (itemsize if state[key].dtype == target.param.dtype else state[key].element_size())
            for key in target.basis_keys
            if key.removesuffix("_absmax") == f"basis_{side}"
        )

    group = target.group
    return Projection(
        target.side,
        target.rank,
        group["update_proj_gap"],
        group["refresh"],
        kept("left"),
        kept("right"),
        group["proj_bits"] != 16,
        # 8-bit kernels give it in the gradient's dtype, others in that of the moments.
        target.param.element_size() if isinstance(target.rule, Adam8bit) else max(4, itemsize),
        without_gradient and not target.needs_gradient,
        target.probes,
        target.matrix_shape,
        bool(target.needs_gradient),
    )


def _linear_weights(model: nn.Module) -> set[int]:
    """The weights of linear layers that belong to one module each: whose gradient a projected backward spares."""
    owners: dict[int, list[nn.Module]] = {}
    used_directly = set()
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append(module)
        if isinstance(module, nn.MultiheadAttention):  # which does not call the layer
            used_directly.add(id(module.out_proj.weight))
    served = {key for key, modules in owners.items() if len(modules) == 1 and why_not_patchable(modules[0]) is None}
    return served - used_directly
