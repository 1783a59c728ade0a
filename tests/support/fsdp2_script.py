"""Run by test_fsdp2.py under torchrun, on 4 processes: trains a small model under `fully_shard` in many ways.

The processes divide into groups, each a mesh of its own, so that libraries are imported four times and not ten. Each
saves what it found. Whoever has launched them meanwhile trains the model unsharded, by `unsharded()`.
"""

from __future__ import annotations

import copy
import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from hf_galore.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreOptimizer
from tests.support.helpers import EXACT_ARGS, logged, make_trainer, tiny_llama

BATCH = 24
GALORE = {"rank": 8, "update_proj_gap": 4, "scale": 1.0}


class Block(nn.Module):
    """What is sharded by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 520)
        self.down = nn.Linear(520, 32, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down(torch.nn.functional.gelu(self.up(hidden)))
        return out


class Model(nn.Module):
    """Matrices of either longer side, one that is used twice, uneven and empty shards, and a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(53, 32)
        self.block = Block()
        self.square = nn.Linear(32, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.nine = nn.Linear(32, 9)  # none for the last of 4 processes
        self.four = nn.Linear(9, 4)  # none for the last of 3, and too small to be projected
        self.head = nn.Linear(32, 53, bias=False)
        self.head.weight = self.embedding.weight
        self.block_twice = False  # and the square matrix once

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def start(self) -> dict[str, Tensor]:
        """Its weights, by name; what is tied once."""
        return {name: param.detach() for name, param in self.named_parameters()}

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.block(hidden)
        inner = torch.tanh(self.square(hidden))
        if self.block_twice:
            hidden = hidden + self.block(hidden)
        else:
            inner = torch.tanh(self.square(inner))
        hidden = self.norm(hidden + inner)
        return torch.cat([self.head(hidden), self.four(torch.tanh(self.nine(hidden)))], dim=-1)


TARGETS = ("block.up.weight", "block.down.weight", "square.weight", "nine.weight")


def make_model() -> Model:
    torch.manual_seed(3)
    return Model()


class Case(NamedTuple):
    """One way to train."""

    make: Callable[..., torch.optim.Optimizer] = GaLoreAdamW
    galore: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    steps: int = 9
    accumulation: int = 1
    max_norm: float | None = None
    columns: bool = False
    """Whether matrices are divided by columns."""
    policy: MixedPrecisionPolicy | None = None
    torch_clips: bool = False
    """Whether torch's function clips, which finds DTensors in `.grad`."""
    no_sync: bool = False
    """Whether FSDP2 reduces gradients of the last micro-batch only, which are those of all then."""
    by_layers: bool = False
    """Whether each linear layer of the block is sharded by itself."""
    block_twice: bool = False
    reduction: Literal["mean", "sum", "doubled mean"] = "mean"
    """What FSDP2 makes of the gradients of all processes; the loss is such that they have the mean's in the end."""
    replicas: bool = False
    """Whether there is a second dimension of the mesh, which replicates."""


# One process's refreshes would be from factors, which round otherwise.
LAYERWISE = {"layerwise": True, "projected_backward": False}
ADAM = {"eps": 1e-4, "weight_decay": 0.1}
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CORE: dict[str, Case] = {
    "control": Case(torch.optim.AdamW, options=ADAM, steps=20),
    "adam": Case(options=ADAM, max_norm=0.5, steps=20),
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
    "muon": Case(galore={"rule": "muon", "moments": "rotate"}, options=ADAM, max_norm=0.5),
    "muon_columns": Case(galore={"rule": "muon"}, options=ADAM, columns=True),
    "columns": Case(options=ADAM, columns=True),
    "adafactor_columns": Case(GaLoreAdafactor, columns=True),
    "layerwise": Case(options={**ADAM, **LAYERWISE}, steps=20),
    "layerwise_both_sides": Case(galore={"proj_type": "full", "moments": "rotate"}, options={**ADAM, **LAYERWISE}),
    "layerwise_columns": Case(options={**ADAM, **LAYERWISE}, columns=True),
    "layerwise_clipped": Case(
        options={**ADAM, **LAYERWISE, "hold_gradients": True},
        galore={"moments": "rotate"},
        accumulation=4,
        max_norm=0.5,
        steps=20,
    ),
    "layerwise_8bit": Case(
        GaLoreAdamW8bit, {"gradient_bits": 8}, {**ADAM, **LAYERWISE, "hold_gradients": True}, accumulation=4
    ),
    "layerwise_torch_clips": Case(
        options={**ADAM, **LAYERWISE, "hold_gradients": True}, accumulation=2, max_norm=0.5, torch_clips=True
    ),
    "layerwise_adafactor": Case(GaLoreAdafactor, options=LAYERWISE),
    "projected": Case(options={**ADAM, "layerwise": True, "projected_backward": True}, steps=20),
    "projected_held": Case(
        options={**ADAM, "projected_backward": True}, galore={"moments": "rotate"}, accumulation=2, max_norm=0.5
    ),
    # Rounding tips a code of 4 bits over at its first refresh.
    "projected_columns": Case(
        options={**ADAM, "layerwise": True, "projected_backward": True},
        galore={"proj_type": "full", "proj_bits": 16},
        columns=True,
    ),
    "projected_by_layers": Case(options={**ADAM, "layerwise": True}, by_layers=True),
    "projected_sum": Case(options={**ADAM, "layerwise": True}, reduction="sum"),
    # Not as asked for, but as layerwise has it: gradients are built.
    "projected_doubled": Case(options={**ADAM, "layerwise": True}, reduction="doubled mean"),
    # FSDP2 reduces the block's gradients of the first micro-batch in the midst of the second.
    "projected_block_twice": Case(
        options={**ADAM, "projected_backward": True}, accumulation=2, max_norm=0.5, no_sync=True, block_twice=True
    ),
    "no_sync": Case(options={**ADAM, **LAYERWISE}, accumulation=2, no_sync=True),
    "bfloat16": Case(options=ADAM, policy=BFLOAT16),
    "projected_bfloat16": Case(options={**ADAM, "layerwise": True, "projected_backward": True}, policy=BFLOAT16),
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
    for layer in (model.block.up, model.block.down) if case.by_layers else ():
        fully_shard(layer, **options)
    fully_shard(model.block, **options)
    fully_shard(model, **options)
    for unit in model.modules():
        if not isinstance(unit, FSDPModule):
            continue
        if case.reduction == "sum":
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo divides nothing
        elif case.reduction == "doubled mean":
            unit.set_all_reduce_hook(double)
    return model


def double(gradients: Tensor) -> None:
    gradients.mul_(2)


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
    steps: Iterable[int],
) -> list[float]:
    """Train, and return the norms before clipping."""
    place, places = place_in(mesh)
    scale = {"mean": places, "sum": 1, "doubled mean": places / 2}[case.reduction] if mesh else 1
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(53, (BATCH, 4), generator=generator)
        labels = torch.randint(57, (BATCH, 4), generator=generator)
        chunks = list(zip(tokens.chunk(case.accumulation), labels.chunk(case.accumulation), strict=True))
        for x, y in chunks:
            if case.no_sync and isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(y is chunks[-1][1])
            own = slice(place * len(x) // places, (place + 1) * len(x) // places)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a hook of torch's own
                logits = model(x[own]).flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, y[own].flatten(), reduction="sum")
            (loss * scale / labels.numel()).backward()
        if case.torch_clips:
            assert case.max_norm is not None
            norms.append(float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), case.max_norm))))
        elif case.max_norm is not None:
            norm = optimizer.clip_grad_norm_(case.max_norm)  # type: ignore[attr-defined]
            norms.append(float(norm))
        elif case.options.get("layerwise"):
            norms.append(float(optimizer.grad_norm()))  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
    return norms


def run(case: Case, mesh: DeviceMesh | None) -> dict[str, Any]:
    model, optimizer = made(case, mesh)
    norms = train(model, optimizer, case, mesh, range(case.steps))
    found: dict[str, Any] = {"weights": weights_of(model), "norms": norms}
    if isinstance(optimizer, GaLoreOptimizer):
        memory = optimizer.memory()
        found |= {"bytes": memory.moment_bytes + memory.basis_bytes, **optimizer.refresh_figures()}
    return found


class Products(TorchDispatchMode):
    """Within, the shapes of matrix products are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.shapes.add(tuple(out.shape))
        return out


def products(name: str, mesh: DeviceMesh) -> set[tuple[int, ...]]:
    """The shapes of the products in some steps, refreshes among them."""
    model, optimizer = made(CASES[name], mesh)
    noted = Products()
    with noted:
        train(model, optimizer, CASES[name], mesh, range(6))
    shapes: set[tuple[int, ...]] = noted.shapes
    return shapes


PRODUCTS = ("layerwise", "projected", "projected_by_layers")


def made(case: Case, mesh: DeviceMesh | None) -> tuple[Model, torch.optim.Optimizer]:
    model = make_model()
    model.block_twice = case.block_twice
    if mesh is not None:
        model = shard(model, mesh, case)
    options = dict(case.options)
    if mesh is None and case.no_sync:  # as if there were one micro-batch, of which a basis comes
        options.pop("layerwise", None)
    if case.make is not torch.optim.AdamW:
        options["module"] = model
    return model, case.make(groups_of(model, case), lr=2e-3, **options)


CHECKPOINTED = ("adam_8bit", "adafactor", "4_bits", "layerwise_columns")
SAVED_AFTER, RESUMED_UNTIL = 5, 8


def resumed(
    case: Case, mesh: DeviceMesh, folder: Path, options: StateDictOptions | None = None, state: Any = None
) -> dict[str, Tensor]:
    """The weights of a run that goes on from a checkpoint."""
    model, optimizer = made(case, mesh)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    if state is None:
        state = state_of(model, optimizer)
        load(state, checkpoint_id=folder, process_group=mesh.get_group())
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    train(model, optimizer, case, mesh, range(SAVED_AFTER, RESUMED_UNTIL))
    return weights_of(model)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions | None = None) -> Any:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    return {"model": of_model, "optimizer": of_optimizer}


def checkpoints(folder: Path, meshes: dict[tuple[int, ...], DeviceMesh]) -> dict[str, Any]:
    """Save a checkpoint of 2 processes, and go on: with them, and from the checkpoint with 1, 2 and 4."""
    found: dict[str, Any] = {}
    rank = dist.get_rank()
    whole_state = StateDictOptions(full_state_dict=True)
    for name in CHECKPOINTED:
        case = CASES[name]
        if rank < 2:
            model, optimizer = made(case, meshes[0, 1])
            train(model, optimizer, case, meshes[0, 1], range(SAVED_AFTER))
            state = state_of(model, optimizer)
            save(state, checkpoint_id=folder / name, process_group=meshes[0, 1].get_group())
            in_one_piece = copy.deepcopy(state_of(model, optimizer, whole_state))
            train(model, optimizer, case, meshes[0, 1], range(SAVED_AFTER, RESUMED_UNTIL))
            found[f"{name}/uninterrupted"] = weights_of(model)
            found[f"{name}/in_one_piece"] = resumed(case, meshes[0, 1], folder / name, whole_state, in_one_piece)
        dist.barrier()
        for count in (1, 2, 4):
            ranks = tuple(range(count))
            if rank in ranks:
                found[f"{name}/resumed/{count}"] = resumed(case, meshes[ranks], folder / name)
    return found if rank == 0 else {}


# ---- accelerate


def prepared(case: Case, kind: str = "SHARDED_STATE_DICT") -> tuple[Accelerator, Model, GaLoreOptimizer]:
    """A model and its optimizer as accelerate's FSDP2 makes them, which it has not on a CPU: it is told that it has."""
    accelerator = Accelerator(cpu=True)
    state: Any = accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
        state_dict_type=kind,
    )
    model, optimizer = made(case, None)
    assert isinstance(optimizer, GaLoreOptimizer)
    before = [weakref.ref(param) for param in model.parameters()]
    model, _ = accelerator._prepare_fsdp2(model, optimizer)
    state.distributed_type = DistributedType.FSDP  # preparing has made it anew
    gc.collect()
    # The whole weights are not kept alive, nor was any state made for them.
    assert not any(param() is not None for param in before)
    assert not optimizer.state
    return accelerator, model, optimizer


def accelerated(folder: Path) -> dict[str, Any]:
    """What comes of training by accelerate's FSDP2, and of its checkpoints, in all processes."""
    found: dict[str, Any] = {}
    for name in ("layerwise", "layerwise_clipped"):
        case = CASES[name]
        _, model, optimizer = prepared(case)
        mesh: Any = model.block.up.weight.device_mesh  # type: ignore[attr-defined]
        if optimizer.hooks is not None and case.accumulation > 1:
            optimizer.hooks.attach()  # as a Trainer does when it has prepared the model; else the first step does
        train(model, optimizer, case, mesh, range(case.steps))
        found[f"{name}/accelerate"] = {"weights": weights_of(model), "name": optimizer.name_of(model.block.up.weight)}
        optimizer.close()
    case = CORE["adam_8bit"]
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        accelerator, model, optimizer = prepared(case, kind)
        plugin = accelerator.state.fsdp_plugin
        train(model, optimizer, case, mesh, range(SAVED_AFTER))
        save_fsdp_model(plugin, accelerator, model, str(folder / kind))
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder / kind))
        train(model, optimizer, case, mesh, range(SAVED_AFTER, RESUMED_UNTIL))
        found[f"{kind}/uninterrupted"] = weights_of(model)
        accelerator, model, optimizer = prepared(case, kind)
        load_fsdp_model(accelerator.state.fsdp_plugin, accelerator, model, str(folder / kind))
        load_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, str(folder / kind))
        train(model, optimizer, case, mesh, range(SAVED_AFTER, RESUMED_UNTIL))
        found[f"{kind}/resumed"] = weights_of(model)
    return found if dist.get_rank() == 0 else {}


# ---- transformers


def by_trainer(model: nn.Module, folder: Path, name: str, processes: int) -> dict[str, Any]:
    """What a Trainer makes of a model."""
    overrides: dict[str, Any] = {"per_device_train_batch_size": 4 // processes, "optim_args": EXACT_ARGS}
    overrides |= {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "max_steps": 4}
    if "layerwise" in name:  # whose bases come from the first micro-batch, where that is reduced
        overrides["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    if "adamw" in name:
        overrides["adam_epsilon"] = 1e-3  # as in test_windows
    trainer = make_trainer(model, folder, name, **overrides)
    trainer.train()
    return {"weights": weights_of(model), "norms": logged(trainer, "grad_norm")}


def sharded_at_load(folder: Path) -> dict[str, Any]:
    """What a Trainer makes of models that transformers itself shards, in all processes."""
    found: dict[str, Any] = {}
    if dist.get_rank() == 0:
        tiny_llama().save_pretrained(folder / "tiny")
    dist.barrier()
    for name in BY_TRAINER:
        config = DistributedConfig(fsdp_size=dist.get_world_size())
        model = LlamaForCausalLM.from_pretrained(folder / "tiny", distributed_config=config)
        found[f"{name}/at_load"] = by_trainer(model, folder, name, dist.get_world_size())
    return found if dist.get_rank() == 0 else {}


BY_TRAINER = ("galore_adamw", "galore_adafactor_layerwise")


def refused(mesh: DeviceMesh, with_replicas: DeviceMesh) -> dict[str, str]:
    """What is said of what cannot be done with sharded parameters."""
    said = {}
    for words, replicas in (("one dimension", False), ("two dimensions", True)):
        case = Case(options={"layerwise": True}, replicas=replicas)
        model = shard(make_model(), with_replicas if replicas else mesh, case)
        optimizer = GaLoreAdamW(groups_of(model, case), module=model, **case.options)
        assert optimizer.hooks is not None
        said[words] = str(optimizer.hooks.projected_backward)
        optimizer.close()
    asked = {
        "svd": Case(galore={"refresh": "svd"}),
        "muon": Case(galore={"rule": "muon", "residual": "muon"}),
        "normuon": Case(galore={"rule": "muon", "residual": "normuon"}),
        "projected_backward": Case(options={"projected_backward": True}, replicas=True),
        "exchange": Case(options={"exchange": "low_rank"}),
    }
    for name, case in asked.items():
        model = shard(make_model(), with_replicas if case.replicas else mesh, case)
        try:
            GaLoreAdamW(groups_of(model, case), module=model, **case.options)
        except ValueError as error:
            said[name] = str(error)
    return said | told(mesh)


def told(mesh: DeviceMesh) -> dict[str, str]:
    """What is said of what FSDP2 itself lets through, and would train nothing or something else."""
    plain, asked = Case(), Case(options={"projected_backward": True}, reduction="doubled mean")
    said = {}
    model, optimizer = made(plain, None)
    shard(model, mesh, plain)
    try:
        train(model, optimizer, plain, mesh, range(1))
    except RuntimeError as error:
        said["sharded after"] = str(error)
    model = shard(make_model(), mesh, plain)
    assert isinstance(model, FSDPModule)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))
    try:
        GaLoreAdamW(groups_of(model, plain), module=model)
    except ValueError as error:
        said["gathered"] = str(error)
    model.reshard()
    train(model, GaLoreAdamW(groups_of(model, plain), module=model), plain, mesh, range(1))
    model, optimizer = made(asked, mesh)
    try:
        train(model, optimizer, asked, mesh, range(1))
    except RuntimeError as error:
        said["own reduction"] = str(error)
    model = make_model()
    fully_shard(model.block, mesh=mesh)
    try:
        GaLoreAdamW(groups_of(model, plain), module=model, layerwise=True)
    except ValueError as error:
        said["left out"] = str(error)
    return said


def hooks_called(mesh: DeviceMesh) -> int:
    """How often a program's own hook on a weight is called in some steps of a projected backward."""
    model, optimizer = made(CASES["projected"], mesh)
    called: list[Tensor] = []
    model.block.up.weight.register_post_accumulate_grad_hook(called.append)
    train(model, optimizer, CASES["projected"], mesh, range(3))
    return len(called)


def from_meta(mesh: DeviceMesh) -> dict[str, dict[str, Tensor]]:
    """The weights where the optimizer was made before the model had numbers, and where it was made as ever."""
    case = CORE["adam"]
    with torch.device("meta"):
        model = Model()
    shard(model, mesh, case)
    optimizer = GaLoreAdamW(groups_of(model, case), module=model, lr=2e-3, **case.options)
    model.to_empty(device="cpu")
    usual, others = made(case, mesh)
    model.load_state_dict(usual.state_dict())
    for each, its in ((model, optimizer), (usual, others)):
        train(each, its, case, mesh, range(2))
    return {"late": weights_of(model), "usual": weights_of(usual)}


def unsharded() -> dict[str, Any]:
    """What all else is compared to."""
    return {f"{name}/unsharded": run(case, None) for name, case in CASES.items() if case.policy is None}


Job = tuple[str, list[int]]
"""A case, and the processes that run it."""


def plan() -> list[Job]:
    """What is run: groups that have no process in common run at the same time."""
    jobs: list[Job] = [(name, [0, 1, 2, 3]) for name in (*CORE, "replicas", "columns")]
    jobs += [
        (name, [0, 1, 2]) for name in (*CORE, "both_sides", "4_bits", "layerwise", "layerwise_clipped", "projected")
    ]
    first = ("other_side", "8_bits", "layerwise_both_sides", "layerwise_clipped", "layerwise_adafactor", "no_sync")
    jobs += [(name, [0, 1]) for name in (*CORE, *first)]
    jobs += [(name, [2, 3]) for name in FURTHER if name not in first]
    jobs += [(name, [0]) for name in (*CORE, "bfloat16", "projected_bfloat16")]
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
    found |= checkpoints(folder, meshes)
    found |= sharded_at_load(folder)
    found |= accelerated(folder)
    if rank < 2:
        found["products"] = {name: products(name, meshes[0, 1]) for name in PRODUCTS}
    if rank == 0:
        found["refused"] = refused(meshes[0,], with_replicas)
        found |= {"called": {"hooks": hooks_called(meshes[0,])}, "from meta": from_meta(meshes[0,])}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
