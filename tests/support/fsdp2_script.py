"""Run by test_fsdp2.py under torchrun, on 4 processes: trains a small model under `fully_shard` in many ways.

The processes divide into groups, each a mesh of its own, so that libraries are imported four times and not ten. One
trains the model unsharded, which everything else is compared to. Each saves what it found.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from hf_galore.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreOptimizer

STEPS, FEWER_STEPS = 20, 12
BATCH = 24
GALORE = {"rank": 8, "update_proj_gap": 6, "scale": 1.0}


class Model(nn.Module):
    """Matrices of which either side is the longer, shards that are uneven and empty, and a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(53, 32)
        self.up = nn.Linear(32, 520)
        self.down = nn.Linear(520, 32, bias=False)
        self.square = nn.Linear(32, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.nine = nn.Linear(32, 9)  # none for the last of 4 processes
        self.four = nn.Linear(9, 4)  # none for the last of 3, and too small to be projected
        self.head = nn.Linear(32, 53, bias=False)
        self.head.weight = self.embedding.weight

    def start(self) -> dict[str, Tensor]:
        """Its weights, by name; what is tied once."""
        return {name: param.detach() for name, param in self.named_parameters()}

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(torch.nn.functional.gelu(self.up(hidden)))
        hidden = self.norm(hidden + torch.tanh(self.square(hidden)))
        return torch.cat([self.head(hidden), self.four(torch.tanh(self.nine(hidden)))], dim=-1)


TARGETS = ("up.weight", "down.weight", "square.weight", "nine.weight")


def make_model() -> Model:
    torch.manual_seed(3)
    return Model()


class Case(NamedTuple):
    """One way to train."""

    make: Callable[..., torch.optim.Optimizer] = GaLoreAdamW
    galore: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    accumulation: int = 1
    max_norm: float | None = None
    columns: bool = False
    """Whether matrices are divided by columns."""
    policy: MixedPrecisionPolicy | None = None
    replicas: bool = False
    """Whether there is a second dimension of the mesh, which replicates."""


ADAM = {"eps": 1e-4, "weight_decay": 0.1}
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CORE: dict[str, Case] = {
    "control": Case(torch.optim.AdamW, options=ADAM),
    "adam": Case(options=ADAM, max_norm=0.5),
    "adam_8bit": Case(GaLoreAdamW8bit, options=ADAM),
    "adafactor": Case(GaLoreAdafactor, options={"beta1": 0.9}, galore={"moments": "rotate"}, accumulation=4),
}
FURTHER: dict[str, Case] = {
    "both_sides": Case(galore={"proj_type": "full", "moments": "rotate"}, options=ADAM),
    "other_side": Case(galore={"proj_type": "reverse_std", "moments": "rotate"}, options=ADAM),
    # Rounding may turn a column of these: what was learnt of it has to be forgotten, then.
    "randomized": Case(galore={"refresh": "randomized", "moments": "reset"}, options=ADAM),
    "4_bits": Case(galore={"proj_bits": 4, "lazy_refresh": True}, options=ADAM),
    "8_bits": Case(galore={"proj_bits": 8, "refresh": "random"}, options=ADAM),
    "lion": Case(galore={"rule": "lion"}, options=ADAM),
    "columns": Case(options=ADAM, columns=True),
    "adafactor_columns": Case(GaLoreAdafactor, columns=True),
    "bfloat16": Case(options=ADAM, policy=BFLOAT16),
}
CASES = {**CORE, **FURTHER, "replicas": CORE["adam"]._replace(replicas=True)}


def groups_of(model: nn.Module, case: Case) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    targets = [named[name] for name in TARGETS]
    others = [param for name, param in named.items() if name not in TARGETS]
    if case.make is torch.optim.AdamW:
        return [{"params": [*targets, *others]}]
    return [{"params": targets, **GALORE, **case.galore}, {"params": others}]


def shard(model: Model, mesh: DeviceMesh, case: Case) -> Model:
    options: dict[str, Any] = {"mesh": mesh}
    if case.columns:
        options["shard_placement_fn"] = lambda param: Shard(int(param.ndim == 2 and param.shape[1] % 4 == 0))
    if case.policy is not None:
        options["mp_policy"] = case.policy
    for module in (model.up, model.down, model.square, model.nine):
        fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(param) for name, param in model.named_parameters()}


def place_in(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Which part of a batch a process takes, of how many."""
    return (0, 1) if mesh is None else (int((mesh.mesh == dist.get_rank()).flatten().nonzero()), mesh.size())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    case: Case,
    mesh: DeviceMesh | None,
    steps: Iterable[int] = range(STEPS),
) -> list[float]:
    """Train, and return the norms before clipping."""
    place, places = place_in(mesh)
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(53, (BATCH, 4), generator=generator)
        labels = torch.randint(57, (BATCH, 4), generator=generator)
        for x, y in zip(tokens.chunk(case.accumulation), labels.chunk(case.accumulation), strict=True):
            own = slice(place * len(x) // places, (place + 1) * len(x) // places)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a hook of torch's own
                logits = model(x[own]).flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, y[own].flatten(), reduction="sum")
            (loss * places / labels.numel()).backward()
        if case.max_norm is not None:
            norm = optimizer.clip_grad_norm_(case.max_norm)  # type: ignore[attr-defined]
            norms.append(float(norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def run(case: Case, mesh: DeviceMesh | None) -> dict[str, Any]:
    model = make_model()
    if mesh is not None:
        model = shard(model, mesh, case)
    optimizer = case.make(groups_of(model, case), lr=2e-3, **case.options)
    norms = train(model, optimizer, case, mesh, range(STEPS if case in CORE.values() else FEWER_STEPS))
    found: dict[str, Any] = {"weights": weights_of(model), "norms": norms}
    if isinstance(optimizer, GaLoreOptimizer):
        memory = optimizer.memory()
        found |= {"bytes": memory.moment_bytes + memory.basis_bytes, **optimizer.refresh_figures()}
    return found


def refused(mesh: DeviceMesh) -> dict[str, str]:
    """What is said of what cannot be done with sharded parameters."""
    said = {}
    for name, galore in {"svd": {"refresh": "svd"}}.items():
        case = Case(galore=galore)
        try:
            GaLoreAdamW(groups_of(shard(make_model(), mesh, case), case))
        except ValueError as error:
            said[name] = str(error)
    return said


Job = tuple[str, list[int]]
"""A case, and the processes that run it."""


def plan() -> list[Job]:
    """What is run: groups that have no process in common run at the same time."""
    jobs: list[Job] = [(name, [0, 1, 2, 3]) for name in (*CORE, "replicas", "columns")]
    jobs += [(name, [0, 1, 2]) for name in (*CORE, "both_sides", "4_bits")]
    jobs += [(name, [0, 1]) for name in (*CORE, "other_side", "8_bits")]
    jobs += [(name, [2, 3]) for name in FURTHER if name not in ("other_side", "8_bits")]
    jobs += [(name, [0]) for name in (*CORE, "bfloat16")]
    return jobs


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # Every process takes part in making every group.
    meshes = {ranks: DeviceMesh("cpu", list(ranks)) for ranks in {tuple(ranks) for _, ranks in plan()}}
    with_replicas = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))
    found: dict[str, Any] = {}
    for name, ranks in plan():
        if rank not in ranks:
            continue
        case = CASES[name]
        result = run(case, with_replicas if case.replicas else meshes[tuple(ranks)])
        if rank == ranks[0]:
            found[f"{name}/{len(ranks)}"] = result
    if rank == 0:
        found["refused"] = refused(meshes[0,])
    if rank == 3:
        found |= {f"{name}/unsharded": run(case, None) for name, case in CASES.items() if case.policy is None}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
