"""Bytes on the wire in an optimizer step of several processes. Calculated; nothing here runs or measures anything.

A *payload* is the whole tensor that a collective is about: what is reduced, what a gather puts together (FSDP2's are
filled up to N equal shards), what is broadcast. Of it a rank sends, by a ring of N ranks or a chain of them:

==========================================  =================
collective                                  sent, of B bytes
==========================================  =================
all-reduce                                  2(N − 1)/N · B
all-gather, reduce-scatter                  (N − 1)/N · B
reduce, broadcast: the mean over the ranks  (N − 1)/N · B
==========================================  =================

Sources: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations (2009, J. Parallel
Distrib. Comput. 69), for the ring; NCCL's tests, doc/PERFORMANCE.md, for the others. NCCL may choose a tree, or let a
switch reduce: then fewer bytes leave a rank, and the payload is the same.

What is left out are single numbers: losses, norms, counts of tokens, flags.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from ..lowrank.methods import METHODS
from ..lowrank.refresh import PROBES, products
from .parameters import Parameter, Projection, padded

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast", "reduce"]
Exchange = Literal["low_rank", "dense"]


@dataclasses.dataclass(frozen=True)
class Devices:
    """The processes of a run, of which each has a card, and what joins them."""

    processes: int
    sharded: bool = False
    """Whether FSDP2 shards the model; else DDP has all of it in each process."""
    exchange: Exchange = "dense"
    """Under DDP, whether R of targets is reduced, or G."""
    hooked: bool = False
    """Whether the optimizer has hooks into the backward pass, and so reduces targets itself."""
    micro_batches: int = 1
    """Of an optimizer step."""

    @property
    def engine(self) -> str:
        """What joins the processes."""
        return "FSDP2" if self.sharded else "DDP"


def wire_bytes(
    parameters: Iterable[Parameter],
    devices: Devices,
    *,
    refreshing: Collection[str] | None = None,
    buffer_bytes: int = 0,
) -> dict[Kind, float]:
    """The payload of an optimizer step by the kind of collective; what takes no bytes is left out.

    Args:
        parameters: of the model.
        devices: the processes.
        refreshing: the names of the targets whose bases the step refreshes; `None` for the mean over a gap.
        buffer_bytes: of the model's buffers, which DDP broadcasts before each forward pass that is to be reduced.
    """
    if devices.processes == 1:
        return {}
    payload: dict[Kind, float] = defaultdict(float)
    if not devices.sharded:
        payload["broadcast"] += buffer_bytes
    for parameter in parameters:
        projection = parameter.projection
        share = 0.0  # of the step that is a refresh
        if projection is not None:
            share = 1 / projection.gap if refreshing is None else float(parameter.name in refreshing)
        of_one = _sharded if devices.sharded else _replicated
        for kind, nbytes in of_one(parameter, devices, share).items():
            payload[kind] += nbytes
    return {kind: nbytes for kind, nbytes in payload.items() if nbytes}


def sent_bytes(payload: Mapping[Kind, float], processes: int) -> float:
    """What a rank sends for these payloads by a ring, the mean over the ranks."""
    share = (processes - 1) / processes
    return sum((2 if kind == "all-reduce" else 1) * share * nbytes for kind, nbytes in payload.items())


def _replicated(parameter: Parameter, devices: Devices, share: float) -> dict[Kind, float]:
    """A parameter under DDP: once a step, however many micro-batches it has.

    - A full-rank parameter, and of an optimizer without hooks a target: its gradient, all-reduced, in the gradient's
      dtype (torch, `torch/csrc/distributed/c10d/reducer.cpp`).
    - A target of one with hooks: R, and what norm probes give, in the gradient's dtype, or with `exchange=dense` G,
      all-reduced. Where a step refreshes its basis, G (of the first micro-batch) is reduced to one rank in place of
      that; what other micro-batches bring is exchanged as R (`hf_galore.backward.exchange`).
    - A target whose update needs G itself (a residual, or scaling): G, all-reduced, with hooks and without.
    - A refresh: the new basis as it is kept, and R, broadcast from the rank that has computed them.
    """
    if not parameter.trained:
        return {}
    whole = parameter.numel * parameter.wire_itemsize
    if parameter.projection is None:
        return {"all-reduce": whole}
    low_rank = parameter.low_rank_numel * parameter.wire_itemsize
    hooked = devices.hooked and not parameter.projection.needs_gradient
    if hooked:
        low_rank = math.prod(parameter.held_shape) * parameter.wire_itemsize
    sent = parameter.basis_bytes + low_rank if parameter.basis_bytes else 0  # random projections are made of a seed
    payload: dict[Kind, float] = {"all-reduce": whole, "broadcast": share * sent}
    if hooked:
        several = devices.micro_batches > 1
        usual = whole if devices.exchange == "dense" and not several else low_rank
        payload["all-reduce"] = usual if several else (1 - share) * usual
        payload["reduce"] = share * whole
    return payload


def _sharded(parameter: Parameter, devices: Devices, share: float) -> dict[Kind, float]:
    """A parameter under FSDP2, cut along its first side.

    - Any: the weight, all-gathered for the forward and, where it was freed, for the backward pass of each micro-batch.
    - One whose gradient is built: its gradient, reduce-scattered once a step (torch,
      `torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py`; accelerate's `no_sync` for the other micro-batches).
    - A target: see `_target`.
    """
    whole = parameter.padded_numel(devices.processes) * parameter.wire_itemsize
    payload: dict[Kind, float] = defaultdict(float)
    payload["all-gather"] = parameter.gathers * devices.micro_batches * whole
    if parameter.builds_gradient:
        payload["reduce-scatter"] = whole
    if parameter.projection is not None:
        for kind, nbytes in _target(parameter, parameter.projection, devices, share).items():
            payload[kind] += nbytes
    return payload


def _target(parameter: Parameter, projection: Projection, devices: Devices, share: float) -> dict[Kind, float]:
    """What a target, m × n, adds under FSDP2, where a rank has rows of W and of G, or R of its own tokens alone.

    - `right`: rows of R = GQ come from rows of G, and rows of NQᵀ from rows of N: Q is gathered as it is kept, and
      nothing else. Without G, R (m × r) is reduce-scattered in place of it.
    - `left`: R = PᵀG is a sum over the ranks, and W's rows need all of N: R is reduce-scattered along n, and N gathered
      from there, in its own dtype. P has W's rows, but its codes are of blocks across rows: it is gathered where it is
      kept in codes, or where δP is computed and not G.
    - `full`: R (r × r) is reduce-scattered, and gathered; Q is gathered, and P as with `left`.
    - Where the update needs G itself: R is gathered as N is, and the norms of columns that are divided are summed, and
      that of what is added, in float64.

    Source: `hf_galore.optim.sharded`, `hf_galore.optim.sharded_gradient`.
    """
    (m, n), r, side, ranks = parameter.shape, projection.rank, projection.side, devices.processes
    without, itemsize = projection.without_gradient, parameter.wire_itemsize
    payload: dict[Kind, float] = defaultdict(float)
    of_step = projection.right_bytes + (projection.left_bytes if projection.in_codes else 0)
    of_backward = devices.micro_batches * parameter.basis_bytes if without else 0
    payload["all-gather"] += of_step + of_backward
    # A refresh has the old bases and the new ones besides, in place of those of a projected backward.
    payload["all-gather"] += share * (1 if without else 2) * parameter.basis_bytes
    rows = {"right": m, "left": n, "full": r}[side]
    columns = r
    if without and projection.probes:  # or else G, which FSDP2 reduces once a step, tells its norm
        rows, columns = sorted(parameter.held_shape, reverse=True)  # the long side is divided
        payload["all-gather"] += share * parameter.basis_bytes  # for the probes of new bases
    if without:
        payload["reduce-scatter"] += (devices.micro_batches - share) * padded(rows, ranks) * columns * itemsize
        payload["all-reduce"] += share * 4 * rows * columns  # of the micro-batch that has brought a new basis
    elif side != "right":
        payload["reduce-scatter"] += padded(rows, ranks) * columns * itemsize
    if side != "right":
        of_element = projection.direction_itemsize if side == "left" else itemsize
        payload["all-gather"] += padded(rows, ranks) * (columns if side == "full" else r) * of_element
    if projection.needs_gradient:
        if side != "right":
            payload["all-gather"] += padded(rows, ranks) * r * itemsize
            payload["all-reduce"] += 8 * (n if side == "left" else 1)
        payload["all-reduce"] += 8
    if not parameter.basis_bytes:
        return payload
    for kind, nbytes in _refresh(m, n, projection, ranks).items():
        payload[kind] += share * nbytes
    return payload


def _refresh(m: int, n: int, projection: Projection, ranks: int) -> dict[Kind, float]:
    """The products with G that a refresh with an old basis takes, in float32; none of them is m × n.

    Those of n × r, and of n × 16 random columns, are sums over the ranks, and all-reduced. Those of m × r have W's
    rows, and are gathered; without G they are sums too.

    Source: `hf_galore.lowrank.projection` (`ShardedGradient`).
    """
    r, side = projection.rank, projection.side
    count = products((m, n), r, side, projection.method)
    probes = PROBES if METHODS[projection.method].by_gradient else 0
    with_rows = r * (count // 2) + (probes if side != "right" else 0)
    over_ranks = r * (count - count // 2) + (probes if side != "left" else 0)
    if projection.without_gradient:  # for whose norm there are random columns too
        return {"all-reduce": 4 * (n * over_ranks + m * (with_rows + PROBES))}
    return {"all-reduce": 4 * n * over_ranks, "all-gather": 4 * padded(m, ranks) * with_rows}
